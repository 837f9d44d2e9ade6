"""Drafts from the text so far: the same answer, token for token, in fewer passes."""

from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import make_tiny_tokenizer, prompt_of
from rag.lm.engine import GenerationDone, Message, TextPiece
from rag.lm.forward import forward
from rag.lm.grouped_attention import use_grouped_attention
from rag.lm.lean_forward import LEAN_FAMILIES, kind_of, lean_pass, use_lean_forward
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import native_cache
from rag.lm.packed_linear import can_pack, use_packed_weights
from rag.lm.prompt_lookup import NO_DRAFTS, ModelPasses, PromptLookup, _place, without_drafts
from rag.lm.row_check import check_rows
from rag.settings import Settings
from rag.types import Decoding, DecodingWay
from tiny_families import tiny_model

LENGTHS = (4, 8, 16)
needs_bfloat16 = pytest.mark.skipif(
    not can_pack(), reason="this CPU has no native bfloat16 products"
)


@pytest.mark.parametrize(
    ("text", "two", "place"),
    [
        ("abcd", True, None),
        ("ab", True, None),
        ("abcab", True, 2),
        ("abcab", False, None),
        ("aaa", True, 2),
        ("xabcyab1xab", True, 3),  # after x, a and b: not after the later two alone
        ("xabcyab1xab", False, 3),
        ("xab1xab2xab", True, 7),  # the latest
        ("yab1zab2xab", True, 7),
        ("yab1zab2xab", False, None),
    ],
)
def test_a_draft_begins_where_the_last_tokens_stood(
    text: str, two: bool, place: int | None
) -> None:
    assert _place(np.array([ord(letter) for letter in text]), two=two) == place


def lean_model(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Any:  # noqa: ANN401
    model = tiny_model(family, use_sliding_window=False).to(dtype)
    use_grouped_attention(model)
    use_packed_weights(model)
    assert use_lean_forward(model)
    return model


def drafting_model() -> Any:  # noqa: ANN401
    """Return one whose passes of several tokens are exact here, or skip the test."""
    model = lean_model()
    lean = lean_pass(model)
    assert lean is not None
    if not check_rows(model, lean, LENGTHS):
        pytest.skip("products of several tokens round otherwise on this CPU")
    return model


def answer(engine: LocalEngine, ids: list[int], new: int) -> tuple[str, GenerationDone]:
    steps = list(engine.generate(prompt_of(ids), max_new_tokens=new, stop=Event()))
    done = steps[-1]
    assert isinstance(done, GenerationDone)
    return "".join(step.text for step in steps if isinstance(step, TextPiece)), done


def facts(found: tuple[str, GenerationDone]) -> tuple[object, ...]:
    text, done = found
    return text, done.new_tokens, done.kv_tokens, done.kv_bytes, done.is_cut_off


def note_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:  # noqa: ANN401
    """Return a list that will tell the tokens of each lean pass."""
    lean: Any = lean_pass(model)
    plain, seen = lean.logits, []

    def note(rows: Any, cache: Any) -> Tensor:  # noqa: ANN401
        seen.append(len(rows[0]))
        found: Tensor = plain(rows, cache)
        return found

    monkeypatch.setattr(lean, "logits", note)
    return seen


def write(model: Any, ids: list[int], new: int) -> tuple[list[int], Any]:  # noqa: ANN401
    """Return tokens and cache of an answer of `new` tokens, whichever they are."""
    cache: Any = native_cache(model.config)
    written = [int(forward(model, [ids], cache)[0, -1].argmax())]
    lookup = PromptLookup(ModelPasses(model, cache), ids)
    while len(written) < new:
        written.append(lookup.next_id(written[-1], most=new - len(written)))
    lookup.take_back()
    return written, cache


def repetitive(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(2, 60, (12,), generator=generator).tolist()
    return ids * 3


@needs_bfloat16
@pytest.mark.parametrize("family", sorted(LEAN_FAMILIES))
@pytest.mark.parametrize("new", [2, 5, 50])
def test_tokens_and_cache_are_those_of_one_token_a_pass(
    family: str, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lean_model(family)
    seen = note_passes(model, monkeypatch)
    for seed in range(2):
        with without_drafts(model):
            expected, plain = write(model, repetitive(seed), new)
        assert set(seen) == {1}
        found, cache = write(model, repetitive(seed), new)
        assert found == expected
        seen.clear()
        assert cache.get_seq_length() == plain.get_seq_length() == 36 + new - 1
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(layer.keys, other.keys)
            assert torch.equal(layer.values, other.values)


@needs_bfloat16
def test_a_text_that_repeats_itself_takes_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drafting_model()
    seen = note_passes(model, monkeypatch)
    write(model, repetitive(0), 100)  # a model of random weights soon says the same again
    assert max(seen) == 16
    assert len(seen) < 60


@needs_bfloat16
def test_an_answer_and_its_receipt_are_the_same_wherever_it_ends() -> None:
    model = lean_model()
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    for new in (1, 2, 7, 30):
        with without_drafts(model):
            expected = answer(engine, repetitive(1), new)
        assert facts(answer(engine, repetitive(1), new)) == facts(expected)


@needs_bfloat16
def test_an_answer_says_what_was_drafted_and_what_of_it_was_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = drafting_model()
    seen = note_passes(model, monkeypatch)
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    _, done = answer(engine, repetitive(0), 60)
    assert done.decoding is not None
    assert done.decoding.way is DecodingWay.DRAFTS
    passes = [size for size in seen if size <= max(LENGTHS)]  # the prompt has 36 tokens
    assert done.decoding.drafted == sum(passes) - len(passes)
    # all but the first token of an answer are a pass's own, or were drafted
    assert done.new_tokens == 1 + len(passes) + done.decoding.accepted
    with without_drafts(model):
        _, done = answer(engine, repetitive(0), 60)
    assert done.decoding == Decoding(DecodingWay.PLAIN, refused=NO_DRAFTS)


@needs_bfloat16
def test_a_stop_in_the_middle_of_what_was_read_ahead_leaves_nothing_of_it() -> None:
    model = lean_model()
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    for after in (1, 2, 5, 9):
        stop, texts = Event(), []
        for step in engine.generate(prompt_of(repetitive(0)), max_new_tokens=60, stop=stop):
            if isinstance(step, TextPiece):
                texts.append(step.text)
                if len(texts) == after:
                    stop.set()
        assert isinstance(step, GenerationDone)
        assert step.stopped
        assert step.kv_tokens == 36 + step.new_tokens - 1


@needs_bfloat16
def test_no_pass_goes_beyond_the_longest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drafting_model()
    most: list[int] = []
    seen = note_passes(model, monkeypatch)
    for new in (2, 4, 5, 6, 9, 17, 30):
        seen.clear()
        write(model, repetitive(0), new)
        most.append(max(seen))
        assert most[-1] <= new - 1
    assert max(most) > 1


class Unsteady(torch.nn.Linear):
    """A product that rounds otherwise in company, as some kernels do."""

    def forward(self, states: Tensor) -> Tensor:
        found = super().forward(states)
        return found if states.shape[1] == 1 else found * 1.01


def unsteady(linear: Any) -> Unsteady:  # noqa: ANN401
    made = Unsteady(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16)
    made.requires_grad_(False)
    torch.nn.init.normal_(made.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return made


@needs_bfloat16
def test_a_product_that_differs_in_company_is_computed_token_by_token() -> None:
    model = drafting_model()
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj = unsteady(layer.mlp.down_proj)
    assert use_lean_forward(model)
    lean: Any = lean_pass(model)
    assert check_rows(model, lean, LENGTHS)
    assert lean.alone == {kind_of(model.get_decoder().layers[0].mlp.down_proj)}
    with without_drafts(model):
        expected, _ = write(model, repetitive(0), 40)
    assert write(model, repetitive(0), 40)[0] == expected


@needs_bfloat16
def test_where_most_products_differ_in_company_nothing_is_drafted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lean_model()
    for layer in model.get_decoder().layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, unsteady(getattr(layer.mlp, name)))
    model.set_output_embeddings(unsteady(model.get_output_embeddings()))
    assert use_lean_forward(model)
    lean: Any = lean_pass(model)
    assert not check_rows(model, lean, LENGTHS)
    seen = note_passes(model, monkeypatch)
    write(model, repetitive(0), 60)
    assert set(seen) == {1}


def test_what_is_between_the_products_is_tried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lean_model()
    lean: Any = lean_pass(model)
    plain = lean._normed
    monkeypatch.setattr(
        lean,
        "_normed",
        lambda states, weight: plain(states, weight) * (1 if states.shape[1] == 1 else 1.01),
    )
    assert not check_rows(model, lean, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_answers_are_the_same_on_every_model(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    expected, _ = write(model, repetitive(2), 30)  # transformers alone: there is no lean pass
    use_grouped_attention(model)
    use_lean_forward(model)
    with without_drafts(model):
        assert write(model, repetitive(2), 30)[0] == expected
    assert write(model, repetitive(2), 30)[0] == expected


@pytest.mark.model
def test_a_copied_passage_is_the_same_in_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine.load("smollm2-135m", Settings(decode_weights="stored"))
    passage = (
        "The lighthouse of Tarn Head was built in 1871 by Ewan Rae, who kept it for thirty years."
        " It stands 41 metres above the sea and its lamp can be seen for 19 miles on a clear night."
    )
    asked = f"{passage}\n\nRepeat the two sentences above, word for word."
    prompt = engine.encode_chat([Message("user", asked)])
    engine.warm_up()
    model = engine._model
    seen = note_passes(model, monkeypatch)
    with without_drafts(model):
        expected = answer(engine, list(prompt.ids), 60)
    alone = len(seen)
    seen.clear()
    assert facts(answer(engine, list(prompt.ids), 60)) == facts(expected)
    lean: Any = lean_pass(model)
    if check_rows(model, lean, LENGTHS):  # else this machine rounds otherwise in company
        assert len(seen) < alone / 2
