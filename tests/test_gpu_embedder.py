"""The embedder for a GPU, whole, on the CPU: what is overlapped there is the same here."""

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Encoding

from rag.errors import OutOfMemoryError
from rag.retrieval import gpu_embedder
from rag.retrieval.embedding import FloatArray
from rag.retrieval.gpu_embedder import LOTS_AHEAD, THREAD_NAME, GpuEmbedder, NotTheSameError
from test_embedding import tiny_embedder as tiny_embedder

LOT_CHARACTERS = 600
BATCH_TOKENS = 256
SAME = 0.9999

_random = Random(3)
TEXTS = ["".join(_random.choices("abcdefgh tuv", k=_random.randint(0, 120))) for _ in range(60)]
TEXTS.append("long " * 300)  # of more characters than a lot, and more tokens than the model reads


@pytest.fixture
def embedder(tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch) -> GpuEmbedder:
    """Return the tiny model with small lots and batches."""
    shrink_lots(monkeypatch)
    return GpuEmbedder(tiny_embedder, name="tiny", device="cpu")


def shrink_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TEXTS several lots of several batches."""
    monkeypatch.setattr(gpu_embedder, "LOT_CHARACTERS", LOT_CHARACTERS)
    monkeypatch.setattr(gpu_embedder, "BATCH_TOKENS", BATCH_TOKENS)


def plain_vectors(folder: Path, texts: list[str]) -> FloatArray:
    """Return what sentence-transformers finds on a CPU, in float32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    found = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


def _least_cosine(ours: FloatArray, theirs: FloatArray) -> float:
    return float(np.sum(ours * theirs, axis=1).min())


def _dtype(embedder: GpuEmbedder) -> torch.dtype:
    dtype: torch.dtype = next(embedder._model.parameters()).dtype
    return dtype


def _before_each_batch(embedder: GpuEmbedder, act: Callable[[torch.Tensor], None]) -> None:
    """Call `act` with the token ids of each batch, int64 [texts, longest]."""
    embedder._model.register_forward_pre_hook(lambda _, given: act(given[0]["input_ids"]))


def _on_each_lot(embedder: GpuEmbedder, act: Callable[[list[str]], None]) -> None:
    """Call `act` with the texts of each lot, in the thread that tokenizes it, before it does."""
    tokenize = embedder._tokens.encoded

    def encoded(texts: Sequence[str]) -> list[Encoding]:
        act(list(texts))
        return tokenize(texts)

    embedder._tokens.encoded = encoded  # type: ignore[method-assign]


def _tokenizing_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def test_lots_and_batches_give_the_vectors_in_the_callers_order(
    embedder: GpuEmbedder, tiny_embedder: Path
) -> None:
    lots: list[int] = []
    batches: list[tuple[int, ...]] = []
    _on_each_lot(embedder, lambda texts: lots.append(len(texts)))
    _before_each_batch(embedder, lambda tokens: batches.append(tuple(tokens.shape)))
    done: list[int] = []
    vectors = embedder.embed(TEXTS, on_progress=done.append)
    expected = plain_vectors(tiny_embedder, TEXTS)
    assert _least_cosine(vectors, expected) >= SAME
    assert _least_cosine(vectors, np.roll(expected, 1, axis=0)) < 0.99, "else order is not seen"
    assert _dtype(embedder) == torch.float16
    assert vectors.dtype == np.float32
    assert sum(lots) == len(TEXTS)
    assert len(batches) > len(lots) > 3
    assert max(rows * width for rows, width in batches) <= BATCH_TOKENS
    assert done == sorted(set(done))
    assert (len(done), done[-1]) == (len(batches), len(TEXTS))
    assert _tokenizing_threads() == []


def test_lots_are_tokenized_while_one_before_is_computed_and_only_so_many(
    embedder: GpuEmbedder,
) -> None:
    lots: list[list[str]] = []
    second = threading.Event()

    def tokenizing(texts: list[str]) -> None:
        lots.append(texts)
        if len(lots) == 2:
            assert threading.current_thread().name.startswith(THREAD_NAME)
            second.set()

    computed = 0
    ahead: list[int] = []

    def computing(tokens: torch.Tensor) -> None:
        nonlocal computed
        if not computed:
            assert second.wait(timeout=60), "the second lot waits for the first"
        in_hand = sum(int(end) <= computed for end in np.cumsum([len(lot) for lot in lots]))
        ahead.append(len(lots) - 1 - in_hand)
        computed += len(tokens)

    _on_each_lot(embedder, tokenizing)
    _before_each_batch(embedder, computing)
    embedder.embed(TEXTS)
    assert computed == len(TEXTS)
    assert 1 <= max(ahead) <= LOTS_AHEAD
    assert [text for lot in lots for text in lot] == TEXTS
    for lot, following in itertools.pairwise(lots):
        assert len(lot) == 1 or sum(map(len, lot)) <= LOT_CHARACTERS
        assert sum(map(len, lot)) + len(following[0]) > LOT_CHARACTERS, "a lot is filled"


def test_a_question_starts_no_thread(embedder: GpuEmbedder) -> None:
    seen: list[str] = []
    _on_each_lot(embedder, lambda _: seen.append(threading.current_thread().name))
    embedder.embed(["How long may a tenant stay?"])
    assert seen == [threading.current_thread().name]


def test_what_fails_while_tokenizing_ahead_is_raised_in_the_caller(embedder: GpuEmbedder) -> None:
    done: list[int] = []
    with pytest.raises((TypeError, UnicodeError)):
        embedder.embed([*TEXTS, "half a character: \ud83d"], on_progress=done.append)
    assert 0 < done[-1] < len(TEXTS)
    assert _tokenizing_threads() == []
    assert embedder.embed(["and then"]).shape == (1, embedder.dim)


def test_a_stop_leaves_no_thread_behind(embedder: GpuEmbedder) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedder.embed(TEXTS, on_progress=stop)
    assert _tokenizing_threads() == []


def test_a_batch_without_memory_is_computed_in_halves_and_later_ones_are_smaller(
    embedder: GpuEmbedder, tiny_embedder: Path
) -> None:
    """A card with room for a few tokens: asked for more, the model raises what torch would."""
    batches: list[int] = []

    def computing(tokens: torch.Tensor) -> None:
        batches.append(tokens.numel())
        if tokens.numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    _before_each_batch(embedder, computing)
    room = 130  # the longest that the model reads is 128
    vectors = embedder.embed(TEXTS)
    assert _least_cosine(vectors, plain_vectors(tiny_embedder, TEXTS)) >= SAME
    failed = [place for place, tokens in enumerate(batches) if tokens > room]
    assert failed, "else nothing was tried"
    assert failed[-1] < len(batches) / 2, "the batches after it would fit"
    room = 120
    with pytest.raises(OutOfMemoryError, match="a text of 128 tokens") as raised:
        embedder.embed(TEXTS)
    assert raised.value.hint
    assert _tokenizing_threads() == []
    room = 1_000
    batches.clear()
    embedder.embed(TEXTS)
    assert max(batches) > 130, "a call that comes later begins with the whole"


def test_what_overflows_float16_is_embedded_in_another_type(
    tiny_embedder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "loud"
    shutil.copytree(tiny_embedder, folder, ignore=shutil.ignore_patterns("openvino-*"))
    weights = load_file(folder / "model.safetensors")
    (name,) = (each for each in weights if each.endswith("0.output.LayerNorm.weight"))
    weights[name] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    embedder = GpuEmbedder(folder, name="loud", device="cpu")
    assert _dtype(embedder) != torch.float16
    assert _least_cosine(embedder.embed(TEXTS), plain_vectors(folder, TEXTS)) >= 0.999


def test_a_model_with_other_vectors_is_refused(tiny_embedder: Path, tmp_path: Path) -> None:
    """One that puts words of its own before each text, as its configuration says."""
    folder = tmp_path / "prompted"
    shutil.copytree(tiny_embedder, folder, ignore=shutil.ignore_patterns("openvino-*"))
    path = folder / "config_sentence_transformers.json"
    facts: dict[str, Any] = json.loads(path.read_text())
    facts |= {"prompts": {"passage": "passage: "}, "default_prompt_name": "passage"}
    path.write_text(json.dumps(facts))
    with pytest.raises(NotTheSameError, match="cosine"):
        GpuEmbedder(folder, name="prompted", device="cpu")
