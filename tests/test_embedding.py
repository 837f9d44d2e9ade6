"""Every embedder gives the same vectors, whatever runs it and whatever is beside a text."""

import errno
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rag.retrieval import openvino_embedder
from rag.retrieval.embedding import Embedder, SentenceTransformerEmbedder, open_embedder
from rag.retrieval.gpu_embedder import GpuEmbedder
from rag.retrieval.openvino_embedder import OpenVinoEmbedder
from tiny_bert import save_bert

TEXTS = (
    ["The fee is 35 crowns a night." * n for n in (1, 2, 3)]
    + ["Berth seven"] * 40
    + ["", "a" * 127, "b" * 5000, "Überfahrt 12²"]  # as long as it reads, and far longer
)
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is an extra")


@pytest.fixture(scope="module")
def tiny_embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random embedder as sentence-transformers saves one."""
    from sentence_transformers import SentenceTransformer

    bert = save_bert(tmp_path_factory.mktemp("bert"), num_labels=1)
    folder = tmp_path_factory.mktemp("embedder")
    SentenceTransformer(str(bert), device="cpu", local_files_only=True).save(str(folder))
    return folder


@pytest.fixture(
    scope="module", params=["torch", "gpu", pytest.param("openvino", marks=needs_openvino)]
)
def embedder(request: pytest.FixtureRequest, tiny_embedder: Path) -> Embedder:
    """Return the tiny model, run by each in turn, that for a GPU on the CPU."""
    if request.param == "torch":
        return SentenceTransformerEmbedder(tiny_embedder, name="tiny")
    if request.param == "gpu":
        return GpuEmbedder(tiny_embedder, name="tiny", device="cpu")
    return OpenVinoEmbedder(tiny_embedder, name="tiny")


def _least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sum(ours * theirs, axis=1).min())


def test_vectors_are_those_of_sentence_transformers(
    embedder: Embedder, tiny_embedder: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(tiny_embedder), device="cpu", local_files_only=True)
    expected = plain.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), embedder.dim)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-3)
    assert _least_cosine(vectors, expected) >= 0.9999


def test_a_text_has_the_same_vector_in_any_batch(embedder: Embedder) -> None:
    done: list[int] = []
    together = embedder.embed(TEXTS, on_progress=done.append)
    assert done == sorted(done)
    assert done[-1] == len(TEXTS)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert _least_cosine(together, alone) >= 0.9999
    assert embedder.embed([]).shape == (0, embedder.dim)


@needs_openvino
def test_what_runs_a_model_is_not_part_of_its_name(tiny_embedder: Path) -> None:
    """A library made with one is searched with the other."""
    torch = SentenceTransformerEmbedder(tiny_embedder, name="tiny")
    for other in (
        OpenVinoEmbedder(tiny_embedder, name="tiny"),
        GpuEmbedder(tiny_embedder, name="tiny", device="cpu"),
    ):
        for fact in ("fingerprint", "dim", "max_tokens"):
            assert getattr(torch, fact) == getattr(other, fact)
        assert torch.token_offsets("The fee") == other.token_offsets("The fee")


@needs_openvino
def test_once_converted_neither_torch_nor_the_library_that_reports_is_loaded(
    tiny_embedder: Path,
) -> None:
    open_embedder(tiny_embedder, name="tiny")
    code = (
        "import sys; from pathlib import Path; from rag.retrieval.embedding import open_embedder;"
        f"e = open_embedder(Path({str(tiny_embedder)!r}), name='tiny'); e.embed(['fee']);"
        "heavy = ('torch', 'transformers', 'sentence_transformers', 'openvino_telemetry');"
        "print(type(e).__name__, [m for m in heavy if sys.modules.get(m)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["OpenVinoEmbedder", "[]\n"]


@needs_openvino
def test_a_model_whose_vectors_differ_is_left_to_torch_and_not_converted_again(
    tiny_embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "embedder"
    shutil.copytree(tiny_embedder, folder, ignore=shutil.ignore_patterns("openvino-*"))
    monkeypatch.setattr(openvino_embedder, "MIN_AGREEMENT", 1.1)
    assert isinstance(open_embedder(folder, name="tiny"), SentenceTransformerEmbedder)
    (facts,) = folder.glob("openvino-*/facts.json")
    assert "cosine of" in json.loads(facts.read_text())["unfit"]
    monkeypatch.setattr(openvino_embedder, "_convert", lambda *_: pytest.fail("made again"))
    assert isinstance(open_embedder(folder, name="tiny"), SentenceTransformerEmbedder)


@needs_openvino
def test_a_graph_that_cannot_be_kept_or_read_leaves_torch_and_nothing_behind(
    tiny_embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "embedder"
    shutil.copytree(tiny_embedder, folder, ignore=shutil.ignore_patterns("openvino-*"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _disk_full)
        assert isinstance(open_embedder(folder, name="tiny"), SentenceTransformerEmbedder)
    assert list(folder.glob("openvino-*")) == []
    assert isinstance(open_embedder(folder, name="tiny"), OpenVinoEmbedder)
    (graph,) = folder.glob("openvino-*/model.xml")
    graph.write_text("cut sho")
    assert isinstance(open_embedder(folder, name="tiny"), SentenceTransformerEmbedder)
    assert isinstance(open_embedder(folder, name="tiny"), OpenVinoEmbedder)


def _disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
