"""Texts to unit vectors on a GPU, which waits neither for the tokenizer nor for the host.

The host tokenizes a lot of texts ahead and reads vectors a batch behind. All of it runs on a CPU,
too, where its tests are.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rag.errors import FathomError, OutOfMemoryError
from rag.retrieval.embedder_tokens import EmbedderTokens, Offsets, TokenIds, batches, padded
from rag.retrieval.embedding import MIN_AGREEMENT, PROBES, FloatArray, fingerprint_of

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding

LOT_CHARACTERS = 1_000_000  # tokenized at a time, a quarter million tokens: 25 MB of encodings
LOTS_AHEAD = 2  # beside the one in hand: the tokenizer need not wait for Python between them
# sixteen lots of an ingest's chunks: but for the first, each is tokenized while another is computed
QUEUED_TEXTS = 16_384
BATCH_TOKENS = 131_072  # padding included; computing it takes several times its launches
# as fast as bfloat16, with three more bits: a least cosine of 0.999998 against 0.99992
DTYPES = ("float16", "bfloat16", "float32")
THREAD_NAME = "fathom-tokenizing"

T = TypeVar("T")


class NotTheSameError(Exception):
    """The vectors are not those of sentence-transformers; the message says why."""


class GpuEmbedder:
    """A sentence-transformers model called on batches of our own."""

    queued_texts = QUEUED_TEXTS

    def __init__(self, folder: Path, *, name: str, device: str = "cuda") -> None:
        """Load the model in the first of `DTYPES` that gives its float32 vectors.

        Args:
            folder: as sentence-transformers loads it.
            name: the name that receipts show.
            device: cuda; cpu for tests.

        Raises:
            NotTheSameError: if none does.
            OutOfMemoryError: if memory runs out.
        """
        from sentence_transformers import SentenceTransformer

        plain = SentenceTransformer(str(folder), device=device, local_files_only=True).eval()
        self._device = device
        self._tokens = EmbedderTokens(folder, longest=int(plain.max_seq_length or 512))
        self.fingerprint = fingerprint_of(folder, name)
        self.dim = int(plain.get_embedding_dimension() or 0)
        self.max_tokens = self._tokens.max_tokens
        self._pad_id = int(getattr(plain.tokenizer, "pad_token_id", None) or 0)
        self._choose_dtype(plain)

    def token_offsets(self, text: str) -> Offsets:
        """Return the `[start, end)` characters of every token of `text`, in order."""
        return self._tokens.offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Return float32 [len(texts), dim], unit length.

        A text has the same vector in any batch, to a cosine of 0.9999. A batch for which there is
        no memory is computed in halves, and those of the lots after it are no larger.

        Raises:
            OutOfMemoryError: if there is none for a single text.
        """
        import torch

        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        behind: _Queued | None = None
        done = 0

        def read(queued: _Queued) -> None:
            nonlocal done
            vectors[queued.places] = queued.vectors()
            done += len(queued.places)
            if on_progress:
                on_progress(done)

        # leaving it waits for the lot in hand: no thread outlives the call, however it ends
        with ThreadPoolExecutor(1, THREAD_NAME) as thread, torch.inference_mode():
            for queued in self._all_queued(texts, thread):
                if behind:
                    read(behind)
                behind = queued
            if behind:
                read(behind)
        return vectors

    def _all_queued(self, texts: Sequence[str], thread: ThreadPoolExecutor) -> Iterator["_Queued"]:
        """Queue one batch after the other; the next lots are tokenized while one is computed.

        The thread runs the tokenizer alone, which leaves Python's lock to this one.
        """
        batch_tokens = BATCH_TOKENS
        lots = deque(_lots(texts))
        tokenize = thread.submit if len(lots) > 1 else _at_once  # a question starts no thread
        ahead: deque[tuple[range, list[str], Future[list[Encoding]]]] = deque()
        while lots or ahead:
            while lots and len(ahead) <= LOTS_AHEAD:
                lot = lots.popleft()
                of_lot = [texts[i] for i in lot]
                ahead.append((lot, of_lot, tokenize(self._tokens.encoded, of_lot)))
            lot, of_lot, encoded = ahead.popleft()
            ids = self._tokens.ids(of_lot, encoded.result())
            for batch in batches([len(each) for each in ids], batch_tokens=batch_tokens):
                waiting = [batch]
                while waiting:
                    part = waiting.pop()
                    part_ids = [ids[i] for i in part]
                    vectors = self._computed(part_ids)
                    if vectors is not None:
                        yield _Queued.from_device([lot[i] for i in part], vectors)
                        continue
                    longest = len(part_ids[-1])
                    if len(part) == 1:
                        raise OutOfMemoryError(
                            f"memory ran out while a text of {longest:,} tokens was embedded"
                        )
                    batch_tokens = min(batch_tokens, longest * len(part) // 2)
                    middle = len(part) // 2
                    waiting += [part[middle:], part[:middle]]

    def _computed(self, ids: Sequence[TokenIds]) -> "torch.Tensor | None":
        """Return float32 [len(ids), dim] on the device, not waited for; None if memory ran out."""
        import torch

        try:
            tokens, mask = (self._to_device(each) for each in padded(ids, self._pad_id))
            found = self._model({"input_ids": tokens, "attention_mask": mask})
            return torch.nn.functional.normalize(found["sentence_embedding"].float(), dim=-1)
        except torch.OutOfMemoryError:  # with it goes what holds the tensors of the attempt
            return None

    def _to_device(self, array: "np.ndarray[Any, np.dtype[np.int64]]") -> "torch.Tensor":
        import torch

        tensor = torch.from_numpy(array)
        if self._device == "cpu":
            return tensor
        # torch keeps pinned memory until it is copied, and gives it to the next batch
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _choose_dtype(self, plain: Any) -> None:  # noqa: ANN401 - a SentenceTransformer
        """Hold the model in the first of `DTYPES` in which our vectors are those of `plain`.

        Raises:
            NotTheSameError: if there is none, or the model wants more than tokens and mask.
        """
        import torch

        theirs = plain.float().encode(
            list(PROBES), normalize_embeddings=True, show_progress_bar=False
        )
        for dtype in DTYPES:
            self._model = copy.deepcopy(plain).to(getattr(torch, dtype))
            try:
                ours = self.embed(PROBES)
            except FathomError:
                raise
            except Exception as error:  # whatever a model says that it does not know
                raise NotTheSameError(f"{type(error).__name__}: {error}") from error
            cosine = float(np.min(np.sum(ours * theirs, axis=1)))
            if cosine >= MIN_AGREEMENT:  # which a NaN is not
                return
        raise NotTheSameError(f"its vectors have a cosine of {cosine:.5f}")


@dataclass(frozen=True, slots=True)
class _Queued:
    """A batch on its way to the host: the places of its texts, and where its vectors will be."""

    places: list[int]
    on_host: "torch.Tensor"
    copied: "torch.cuda.Event | None"

    @staticmethod
    def from_device(places: list[int], vectors: "torch.Tensor") -> "_Queued":
        """Queue the copy behind what computes the vectors; on a CPU they are there."""
        import torch

        if not vectors.is_cuda:
            return _Queued(places, vectors, None)
        on_host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        on_host.copy_(vectors, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return _Queued(places, on_host, copied)

    def vectors(self) -> FloatArray:
        """Return float32 [len(places), dim], once they have arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return np.asarray(self.on_host.numpy(), dtype=np.float32)


def _at_once(work: Callable[[list[str]], T], texts: list[str]) -> "Future[T]":
    """Return what a thread would give, done here."""
    done: Future[T] = Future()
    done.set_result(work(texts))
    return done


def _lots(texts: Sequence[str]) -> Iterator[range]:
    """Yield the places of the texts in order, in lots of up to LOT_CHARACTERS, or of one text."""
    first = num_characters = 0
    for place, text in enumerate(texts):
        if place > first and num_characters + len(text) > LOT_CHARACTERS:
            yield range(first, place)
            first, num_characters = place, 0
        num_characters += len(text)
    if texts:
        yield range(first, len(texts))
