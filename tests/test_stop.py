"""A stop is heard within a pass, leaves nothing half behind, and changes nothing unless it comes.

What is counted are layers that were computed, never seconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from conftest import make_tiny_engine, make_tiny_tokenizer, prompt_of
from rag.answering.service import AnswerReady
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import (
    DocumentPrefix,
    GenerationDone,
    GenerationStep,
    PrefillProgress,
    ScoreRequest,
)
from rag.lm.forward import PassStoppedError, forward
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import native_cache
from rag.lm.shared_prefix import can_share
from rag.types import Route
from test_document_kv import MIB, random_ids
from tiny_families import FAMILIES, tiny_model
from ui.assembly import Fathom

NUM_LAYERS = 6
DOCUMENT, NEW = 600, 6
PREFIX = DocumentPrefix(DOCUMENT, ("1:1:a",))
SHARED = random_ids(DOCUMENT, seed=1)


def engine(document_kv: DocumentKV | None = None) -> LocalEngine:
    model = make_tiny_engine(num_hidden_layers=NUM_LAYERS)._model
    return LocalEngine(
        model, make_tiny_tokenizer(), name="tiny", document_kv=document_kv, weights_id="seed 7"
    )


@contextmanager
def stopping(model: Any, layer: int, of_pass: int) -> Iterator[tuple[Event, list[int]]]:  # noqa: ANN401
    """Yield a stop that comes while a layer is computed, and the layers computed in each pass.

    `of_pass` counts the passes of several tokens from 0; those of one token go another way.
    """
    stop, passes = Event(), list[int]()

    def count(number: int) -> Callable[..., None]:
        def computed(*_: object) -> None:
            if number == 0:
                passes.append(0)
            passes[-1] += 1
            if (len(passes) - 1, number) == (of_pass, layer):
                stop.set()

        return computed

    layers = model.get_decoder().layers
    hooks = [one.register_forward_hook(count(number)) for number, one in enumerate(layers)]
    try:
        yield stop, passes
    finally:
        for hook in hooks:
            hook.remove()


def answer(
    asked: LocalEngine, tails: list[list[int]], stop: Event | None = None
) -> dict[int, list[GenerationStep]]:
    """Return the steps of answers to a document and some tails; how far it was read is no step."""
    prompts = [prompt_of(SHARED + tail) for tail in tails]
    found: dict[int, list[GenerationStep]] = {number: [] for number in range(len(tails))}
    steps = asked.generate_many(prompts, max_new_tokens=NEW, stop=stop or Event(), prefix=PREFIX)
    for number, step in steps:
        if not isinstance(step, PrefillProgress):
            found[number].append(step)
    return found


def words(found: dict[int, list[GenerationStep]]) -> dict[int, list[GenerationStep]]:
    return {
        n: [s for s in steps if not isinstance(s, GenerationDone)] for n, steps in found.items()
    }


TAIL, OTHER = random_ids(24, seed=2), random_ids(30, seed=3)


@pytest.mark.parametrize("of_pass", [0, 1, 2])  # a chunk, the rest of the document, the question
def test_a_prompt_is_left_in_the_middle_of_a_chunk_and_nothing_of_it_is_kept(
    tmp_path: Path, of_pass: int
) -> None:
    expected = words(answer(engine(), [TAIL]))
    kept = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    stopped = engine(kept)
    with stopping(stopped._model, 2, of_pass) as (stop, passes):
        (done,) = answer(stopped, [TAIL], stop)[0]
    assert passes == [NUM_LAYERS] * of_pass + [3]
    assert isinstance(done, GenerationDone)
    assert (done.stopped, done.new_tokens, done.kv_tokens, done.kv_bytes) == (True, 0, 0, 0)
    is_whole = of_pass == 2
    assert stopped.cached_tokens(prompt_of(SHARED + TAIL), PREFIX) == (DOCUMENT if is_whole else 0)
    assert list(tmp_path.glob("*.safetensors")) == []
    again = answer(stopped, [TAIL])
    assert words(again) == expected
    assert isinstance(again[0][-1], GenerationDone)
    assert again[0][-1].reused_tokens == (DOCUMENT if is_whole else 0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # written by the one that was not stopped


def test_questions_behind_a_shared_document_are_left_and_the_document_stays(tmp_path: Path) -> None:
    expected = words(answer(engine(), [TAIL, OTHER]))
    kept = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=0)
    stopped = engine(kept)
    assert can_share(stopped._model, stopped.spec)  # tries a few tokens, which are not counted
    with stopping(stopped._model, 2, 2) as (stop, passes):
        found = answer(stopped, [TAIL, OTHER], stop)
    assert passes == [NUM_LAYERS, NUM_LAYERS, 3]
    for (done,) in found.values():
        assert isinstance(done, GenerationDone)
        assert (done.stopped, done.new_tokens, done.kv_tokens) == (True, 0, DOCUMENT)
        assert done.kv_bytes == stopped.spec.num_layers * DOCUMENT * 2 * 2 * 8 * 4
    again = answer(stopped, [TAIL, OTHER])
    assert words(again) == expected


@pytest.mark.parametrize("of_pass", [0, 1])  # what the requests begin with, the requests
def test_likelihoods_are_left_and_are_the_same_afterwards(of_pass: int) -> None:
    requests = [ScoreRequest(tuple(SHARED[:60]), tuple(TAIL[n:])) for n in range(4)]
    expected = engine().score(requests, stop=Event())
    stopped = engine()
    with stopping(stopped._model, 2, of_pass) as (stop, passes):
        assert stopped.score(requests, stop=stop) is None
    assert passes == [NUM_LAYERS] * of_pass + [3]
    assert stopped.score(requests, stop=Event()) == expected


def strides(asked: LocalEngine, stop: Event) -> list[tuple[int, GenerationStep]]:
    front, back = SHARED[:20], SHARED[-20:]
    middles = [random_ids(100, seed=seed) for seed in (4, 5)]
    frames = [prompt_of([*front, sign, *back]) for sign in (3, 4)]
    prompts = [prompt_of([*front, *middle, *back]) for middle in middles]
    found = asked.generate_in_strides(prompts, frames, max_new_tokens=NEW, stop=stop)
    return [(number, step) for number, step in found if not isinstance(step, GenerationDone)]


# What stands before the text, the first stride, the end of its prompt, the second stride.
@pytest.mark.parametrize(("of_pass", "num_read"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_a_scan_is_left_within_a_stride(of_pass: int, num_read: int) -> None:
    expected = strides(engine(), Event())
    stopped = engine()
    strides(stopped, Event())  # proves the window, by passes that are not counted
    counted = [0]
    hook = stopped._model.register_forward_pre_hook(
        lambda _, inputs, options: counted.append(options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    strides(stopped, Event())
    hook.remove()
    # passes of one token, which write a reply, are passes of layers here
    at = [n for n, num_tokens in enumerate(counted[1:]) if num_tokens > 1][of_pass]
    with stopping(stopped._model, 2, at) as (stop, passes):
        found = strides(stopped, stop)
    assert passes == [NUM_LAYERS] * at + [3]
    assert found == expected[: len(found)]
    assert sum(isinstance(step, PrefillProgress) for _, step in found) == num_read
    assert strides(stopped, Event()) == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_of_every_family_are_found_and_compute_the_same(family: str) -> None:
    model = tiny_model(family)
    ids = [random_ids(20, seed=1)]
    plain = forward(model, ids, native_cache(model.config))
    assert torch.equal(forward(model, ids, native_cache(model.config), stop=Event()), plain)
    stop = Event()
    stop.set()
    with pytest.raises(PassStoppedError):
        forward(model, ids, native_cache(model.config), stop=stop)
    assert torch.equal(forward(model, ids, native_cache(model.config)), plain)


@pytest.mark.parametrize("route", [None, Route.FULL, Route.RETRIEVAL, Route.SCAN])
def test_a_stop_before_an_answer_is_not_said_to_be_the_documents_silence(
    small_fathom: Fathom, route: Route | None
) -> None:
    stop = Event()
    stop.set()
    *_, last = small_fathom.service().stream("What is the harbour fee?", route=route, stop=stop)
    assert isinstance(last, AnswerReady)
    assert last.answer.abstained
    assert last.answer.answer.startswith("Stopped before an answer was found.")
    assert last.answer.receipt.new_tokens == last.answer.receipt.read.tokens == 0
    assert "stopped" in last.answer.receipt.read.not_read
