"""Likelihoods of continuations: exact whatever is shared, batched, cut or kept."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from conftest import make_tiny_tokenizer, prompt_of
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import DocumentPrefix, ScoreRequest
from rag.lm.local_engine import LocalEngine
from tiny_families import tiny_model

MIB = 2**20


def ids(num_tokens: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 250, (num_tokens,), generator=generator).tolist())


def one_by_one(model: Any, request: ScoreRequest) -> list[float]:  # noqa: ANN401
    """Score one request in one pass without a cache."""
    whole = torch.tensor([[*request.prompt_ids, *request.continuation_ids]])
    with torch.inference_mode():
        logs = model(input_ids=whole, use_cache=False).logits[0].float().log_softmax(-1)
    begin = len(request.prompt_ids)
    return [float(logs[at - 1, whole[0, at]]) for at in range(begin, whole.shape[1])]


def options_after_one_prompt(prompt_tokens: int) -> list[ScoreRequest]:
    """Return answers of many lengths to one long prompt, the first token alone among them."""
    prompt = ids(prompt_tokens, seed=1)
    return [ScoreRequest(prompt, ids(length, seed=length)) for length in (7, 1, 30, 4, 12)]


def one_question_after_each_sentence() -> list[ScoreRequest]:
    """Return prompts of an instruction that all share and a sentence that none does."""
    question = ids(15, seed=2)
    return [
        ScoreRequest(ids(20, seed=1) + ids(length, seed=length), question)
        for length in (40, 3, 25, 25, 60, 11)
    ]


def check(model: Any, requests: list[ScoreRequest]) -> None:  # noqa: ANN401
    found = LocalEngine(model, make_tiny_tokenizer(), name="tiny").score(requests, stop=Event())
    assert found is not None
    for request, scores in zip(requests, found, strict=True):
        assert list(scores) == pytest.approx(one_by_one(model, request), abs=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen2", "gpt2", "bloom", "deepseek_v3"),  # full, two of them windowed in part
        *("gemma3_text", "mistral", "gpt_oss", "gemma3n_text"),  # windows far shorter than the text
        *("lfm2", "qwen3_next", "falcon_h1"),  # states that cannot be rolled back
    ],
)
def test_scores_are_those_of_one_request_alone(family: str) -> None:
    model = tiny_model(family)
    check(model, options_after_one_prompt(90))
    check(model, one_question_after_each_sentence())


def test_prompts_longer_than_a_chunk_and_prompts_that_share_nothing() -> None:
    model = tiny_model("gemma3_text")
    check(model, options_after_one_prompt(700))
    check(model, [ScoreRequest(ids(n, seed=n), ids(9, seed=1)) for n in (600, 4, 1, 530)])
    check(model, [ScoreRequest(ids(30, seed=1), ids(600, seed=2))])


def passes(model: Any) -> list[tuple[int, int]]:  # noqa: ANN401
    """Return a list that will tell the rows and tokens of each forward pass."""
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        seen.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_a_dozen_sentences_take_two_passes() -> None:
    model = tiny_model("llama")
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    seen = passes(model)
    instruction, question = ids(30, seed=1), ids(20, seed=2)
    requests = [ScoreRequest((*instruction, n, *ids(39, seed=n)), question) for n in range(2, 14)]
    engine.score(requests, stop=Event())
    assert seen == [(1, 30), (12, 59)]


def test_batches_keep_within_the_memory_and_the_scores_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gemma3_text")
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    requests = one_question_after_each_sentence()
    free = engine.score(requests, stop=Event())
    seen = passes(model)
    monkeypatch.setattr(engine._prefill, "usable_bytes", lambda: 0)
    tight = engine.score(requests, stop=Event())
    assert [rows for rows, _ in seen] == [1] * len(
        set(requests)
    )  # two are equal; the prefix is kept
    assert free is not None
    assert tight is not None
    for one, other in zip(free, tight, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_stop_ends_between_passes() -> None:
    model = tiny_model("llama")
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    stop = Event()
    seen = passes(model)
    model.register_forward_hook(lambda *_: stop.set())
    assert engine.score(options_after_one_prompt(700), stop=stop) is None
    assert seen == [(1, 512)]
    assert engine.score(options_after_one_prompt(20), stop=stop) is None
    assert len(seen) == 1


def test_a_kept_document_is_read_once_for_answers_and_scores(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    engine = LocalEngine(
        model,
        make_tiny_tokenizer(),
        name="tiny",
        document_kv=DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB),
    )
    prefix = DocumentPrefix(600, ("1:1:a",))
    document = ids(600, seed=1)
    requests = [ScoreRequest(document + ids(8, seed=n), ids(5, seed=n)) for n in (2, 3)]
    first = engine.score(requests, stop=Event(), prefix=prefix)
    seen = passes(model)
    again = engine.score(requests, stop=Event(), prefix=prefix)
    assert seen == [(2, 12)]
    assert first is not None
    assert again is not None
    for request, one, other in zip(requests, first, again, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert one == pytest.approx(one_by_one(model, request), abs=1e-4)
    prompt = prompt_of(requests[0].prompt_ids)
    assert engine.cached_tokens(prompt, prefix) == 600
    # One request beside it that does not begin with the document: nothing is taken from it.
    other_prompt = ScoreRequest(ids(50, seed=9), ids(5, seed=2))
    mixed = engine.score([requests[0], other_prompt], stop=Event(), prefix=prefix)
    assert mixed is not None
    assert mixed[1] == pytest.approx(one_by_one(model, other_prompt), abs=1e-4)


def test_what_others_begin_with_costs_no_row_and_the_same_prompt_no_prefill() -> None:
    model = tiny_model("qwen2")
    engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny")
    prompt, stretch = ids(40, seed=1), ids(9, seed=3)
    requests = [
        ScoreRequest(prompt, (*stretch[:n], option)) for n in range(9) for option in (5, 6, 7)
    ]
    seen = passes(model)
    found = engine.score(requests, stop=Event())
    assert seen == [(1, 39), (1, 9)]
    assert found is not None
    for request, scores in zip(requests, found, strict=True):
        assert list(scores) == pytest.approx(one_by_one(model, request), abs=1e-4)
    seen.clear()
    assert engine.score(requests, stop=Event()) == found
    assert seen == [(1, 9)]


def test_nothing_to_score() -> None:
    engine = LocalEngine(tiny_model("llama"), make_tiny_tokenizer(), name="tiny")
    assert list(engine.score([], stop=Event()) or ()) == []
    for prompt, continuation in (((), (1,)), ((1,), ())):
        with pytest.raises(ValueError, match="at least one token"):
            ScoreRequest(prompt, continuation)
