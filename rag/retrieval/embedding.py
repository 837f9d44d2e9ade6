"""Texts to unit vectors: what every embedder can do, and which one a machine gets.

With gpu_embedder.py, openvino_embedder.py and reranker.py the only home of sentence-transformers.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rag.retrieval.embedder_tokens import EmbedderTokens, Offsets

logger = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float32]
BATCH_TEXTS = 32

MIN_AGREEMENT = 0.9999  # cosine to sentence-transformers' float32 vectors, else it embeds itself

# What a faster embedder is tried on: one word, a sentence, and more than most embedders read.
PROBES = (
    "Fathom",
    "How long may a tenant stay after the notice has been given?",
    "Total revenue 2023: $4,512 million; 2022: $3,998 million. " * 8,
    "The quick brown fox jumps over the lazy dog. " * 60,
)


class Embedder(Protocol):
    """Turns texts into vectors, and counts tokens the way it will read them."""

    @property
    def fingerprint(self) -> str:
        """Name and checksum: vectors of equal fingerprints can be compared."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    @property
    def max_tokens(self) -> int:
        """Longest text it reads, in its own tokens, special tokens not counted."""

    @property
    def queued_texts(self) -> int:
        """How many texts it has in hand while it computes others; 0 where each call is one queue.

        Who has many to embed gives it so many more at a time, and nothing of it waits.
        """

    def token_offsets(self, text: str) -> Offsets:
        """Return the `[start, end)` characters of every token of `text`, in order."""

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Return float32 [len(texts), dim], unit length; `on_progress` gets the count so far."""


def open_embedder(
    folder: Path, *, name: str, device: str = "cpu", num_threads: int | None = None
) -> Embedder:
    """Return the fastest embedder that this machine has for a model.

    On a CPU that is OpenVINO where it is installed and can run the model with the same vectors,
    else torch; on a GPU torch in half precision, overlapped, where that gives the same vectors,
    else as it is. They agree to a cosine of 0.9999, so that a library made with one is searched
    with another (docs/decisions/0035).

    Args:
        folder: with modules.json, config.json, tokenizer.json and model.safetensors.
        name: the name that receipts show.
        device: cuda or cpu.
        num_threads: for OpenVINO, which does not follow torch's; None takes OMP_NUM_THREADS, else
            all cores.
    """
    if device == "cpu" and find_spec("openvino") is not None:
        from rag.retrieval.openvino_embedder import NotConvertibleError, OpenVinoEmbedder

        try:
            return OpenVinoEmbedder(folder, name=name, num_threads=num_threads)
        except NotConvertibleError as error:
            logger.info("%s is embedded with torch: %s", name, error)
    if device == "cuda":
        from rag.retrieval.gpu_embedder import GpuEmbedder, NotTheSameError

        try:
            return GpuEmbedder(folder, name=name, device=device)
        except NotTheSameError as error:
            logger.info("%s is embedded by sentence-transformers: %s", name, error)
    return SentenceTransformerEmbedder(folder, name=name, device=device)


def fingerprint_of(folder: Path, name: str) -> str:
    """Return the name with a checksum of the model, whatever runs it."""
    weights = (folder / "model.safetensors").stat().st_size
    config = (folder / "config.json").read_bytes() + (folder / "tokenizer.json").read_bytes()
    return f"{name}@{hashlib.sha256(config).hexdigest()[:12]}-{weights}"


class SentenceTransformerEmbedder:
    """An embedder from a folder that sentence-transformers can load, run by it: the plain way."""

    queued_texts = 0

    def __init__(self, folder: Path, *, name: str, device: str = "cpu") -> None:
        """Load the model.

        Args:
            folder: with modules.json, config.json, tokenizer.json and model.safetensors.
            name: the name that receipts show.
            device: cuda or cpu.
        """
        import torch
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        # Where the CPU multiplies bfloat16 natively, twice as fast at a cosine of 0.9999 or more to
        # float32's vectors (docs/decisions/0014); elsewhere bfloat16 is slower.
        self._bfloat16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
        self._tokens = EmbedderTokens(folder, longest=int(self._model.max_seq_length or 512))
        self.fingerprint = fingerprint_of(folder, name)
        self.dim = int(self._model.get_embedding_dimension() or 0)
        self.max_tokens = self._tokens.max_tokens

    def token_offsets(self, text: str) -> Offsets:
        """Return the `[start, end)` characters of every token of `text`, in order."""
        return self._tokens.offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Return float32 [len(texts), dim], unit length.

        Batches hold texts of similar length, so that little padding is computed. A text has the
        same vector in any batch, to a cosine of 0.9999.
        """
        import torch

        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(texts), BATCH_TEXTS):
            batch = by_length[first : first + BATCH_TEXTS]
            # for a text alone, casting the weights would cost more than it saves
            bfloat16 = self._bfloat16 and len(batch) > 1
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                vectors[batch] = self._model.encode(
                    [texts[i] for i in batch],
                    batch_size=BATCH_TEXTS,
                    normalize_embeddings=True,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                )
            if on_progress:
                on_progress(first + len(batch))
        return vectors
