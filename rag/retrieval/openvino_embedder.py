"""Texts to unit vectors by OpenVINO, from a graph converted once."""

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from rag.retrieval.embedder_tokens import EmbedderTokens, Offsets, TokenIds, batches, padded
from rag.retrieval.embedding import MIN_AGREEMENT, PROBES, FloatArray, fingerprint_of
from rag.runtime import load_openvino

BATCH_TOKENS = 2048  # padding included; 1,024 to 4,096 were as fast, 8,192 slower


class NotConvertibleError(Exception):
    """OpenVINO cannot run this model here; the message says why. torch can."""


class OpenVinoEmbedder:
    """An embedder that needs neither torch nor sentence-transformers once its graph is on disk.

    The products are in bfloat16 where the CPU multiplies it natively, else in float32.
    """

    queued_texts = 0

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        num_threads: int | None = None,
        converted: Path | None = None,
    ) -> None:
        """Load the graph; the first time, convert it, which loads sentence-transformers.

        Args:
            folder: as sentence-transformers loads it.
            name: the name that receipts show.
            num_threads: None takes OMP_NUM_THREADS, else all cores.
            converted: the folder of the graph; None is one inside `folder`, made if need be.

        Raises:
            NotConvertibleError: if the graph cannot be made or kept, or gives other vectors.
        """
        converted = converted or _converted(folder)
        facts = json.loads((converted / "facts.json").read_text())
        if facts["unfit"]:
            raise NotConvertibleError(facts["unfit"])
        try:
            self._compiled = _compiled(converted / "model.xml", num_threads)
        except RuntimeError as error:  # damaged: made anew at the next start
            shutil.rmtree(converted, ignore_errors=True)
            raise NotConvertibleError(f"the graph in {converted} was damaged") from error
        self._requests = threading.local()
        self._tokens = EmbedderTokens(folder, longest=int(facts["max_seq_length"]))
        self._pad_id = int(facts["pad_id"])
        self.fingerprint = fingerprint_of(folder, name)
        self.dim = int(facts["dim"])
        self.max_tokens = self._tokens.max_tokens

    def token_offsets(self, text: str) -> Offsets:
        """Return the `[start, end)` characters of every token of `text`, in order."""
        return self._tokens.offsets(text)

    def embed(
        self, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
    ) -> FloatArray:
        """Return float32 [len(texts), dim], unit length.

        Batches hold texts of similar length up to a number of tokens, so that little padding is
        computed. A text has the same vector in any batch, to a cosine of 0.9999.
        """
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        ids = self._tokens.ids(texts)
        done = 0
        for batch in batches([len(each) for each in ids], batch_tokens=BATCH_TOKENS):
            vectors[batch] = self._run([ids[i] for i in batch])
            done += len(batch)
            if on_progress:
                on_progress(done)
        return vectors

    def _run(self, ids: Sequence[TokenIds]) -> FloatArray:
        if not hasattr(self._requests, "request"):  # one request serves one thread at a time
            self._requests.request = self._compiled.create_infer_request()
        found = self._requests.request.infer(padded(ids, self._pad_id))[0]
        return np.asarray(found, dtype=np.float32)


def _compiled(graph: Path, num_threads: int | None) -> Any:  # noqa: ANN401 - a CompiledModel
    core = load_openvino().Core()
    # It would choose bfloat16 where the CPU emulates it, too.
    is_native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if is_native else "f32",
        # 0 is all cores
        "INFERENCE_NUM_THREADS": num_threads or int(os.environ.get("OMP_NUM_THREADS", "0")),
        "ENABLE_CPU_PINNING": False,  # other processes have the cores, too
    }
    return core.compile_model(str(graph), "CPU", options)


# ---- converting, once a model ---------------------------------------------------------------


def _converted(folder: Path) -> Path:
    """Return the folder with this model's graph and facts, made if it is not there.

    Raises:
        NotConvertibleError: if it cannot be kept.
    """
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    target = folder / f"openvino-{version('openvino')}-{changed}"
    if (target / "facts.json").is_file():
        return target
    try:
        made = Path(mkdtemp(prefix="openvino-new-", dir=folder))
    except OSError as error:
        raise NotConvertibleError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        made.chmod(0o755)  # mkdtemp's is for its owner alone
        try:
            facts = _convert(folder, made)
        except OSError:
            raise
        except Exception as error:  # whatever torch or OpenVINO says of a model they do not know
            facts = {"unfit": f"{type(error).__name__}: {error}"}
        (made / "facts.json").write_text(json.dumps(facts))
        made.rename(target)  # whole or absent; of two processes that make it, one is the first
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        if not (target / "facts.json").is_file():
            raise NotConvertibleError(f"the graph cannot be kept: {error.strerror}") from error
    return target


def _convert(folder: Path, target: Path) -> dict[str, Any]:
    """Write model.xml and model.bin, the graph from token ids to unit vectors; return its facts.

    `unfit` says what is wrong with the vectors it gives here, None where they agree with those of
    sentence-transformers: it is kept, so that such a model is not converted at each start.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    class Graph(torch.nn.Module):
        """A sentence-transformers model with tensors in place of its dictionaries."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
            return torch.nn.functional.normalize(found["sentence_embedding"], dim=-1)

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    example = {"input_ids": torch.ones(2, 7, dtype=torch.int64), "attention_mask": mask}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of branches taken while tracing: compared below
        graph = load_openvino().convert_model(Graph(), example_input=example)
    load_openvino().save_model(graph, str(target / "model.xml"), compress_to_fp16=False)
    facts: dict[str, Any] = {
        "unfit": None,
        "dim": int(model.get_embedding_dimension() or 0),
        "max_seq_length": int(model.max_seq_length or 512),
        "pad_id": int(model.tokenizer.pad_token_id or 0),
    }
    (target / "facts.json").write_text(json.dumps(facts))
    ours = OpenVinoEmbedder(folder, name="", converted=target).embed(PROBES)
    theirs = model.encode(list(PROBES), normalize_embeddings=True, show_progress_bar=False)
    cosine = float(np.min(np.sum(ours * theirs, axis=1)))
    if cosine < MIN_AGREEMENT:
        facts["unfit"] = f"its vectors have a cosine of {cosine:.5f} to sentence-transformers'"
    return facts
