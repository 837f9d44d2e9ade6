"""Many answers in step: each one's words are those it has alone, within the memory there is."""

from threading import Event
from typing import Any

import pytest
import torch

from conftest import make_tiny_tokenizer, prompt_of
from rag.lm.batch_generation import joined_batch_bytes
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import DocumentPrefix, GenerationDone, PrefillProgress, Prompt, TextPiece
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.local_engine import LocalEngine
from rag.types import Decoding, DecodingWay
from tiny_families import tiny_model

MIB = 2**20
NEW = 24


def random_prompt(num_tokens: int, seed: int, document: tuple[int, ...] = ()) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 250, (num_tokens,), generator=generator).tolist()
    return prompt_of([*document, *ids])


def engine_of(model: Any, **options: Any) -> LocalEngine:  # noqa: ANN401
    return LocalEngine(model, make_tiny_tokenizer(), name="tiny", **options)


def answers(
    engine: LocalEngine, prompts: list[Prompt], prefix: DocumentPrefix | None = None
) -> list[tuple[str, GenerationDone]]:
    """Return text and last step of each prompt, and check that it comes once and last."""
    texts = [""] * len(prompts)
    done: dict[int, GenerationDone] = {}
    for number, step in engine.generate_many(
        prompts, max_new_tokens=NEW, stop=Event(), prefix=prefix
    ):
        assert number not in done
        if isinstance(step, TextPiece):
            texts[number] += step.text
        elif isinstance(step, GenerationDone):
            done[number] = step
    return [(texts[number], done[number]) for number in range(len(prompts))]


def passes(model: Any) -> list[tuple[int, int]]:  # noqa: ANN401
    """Return a list that will tell the rows and tokens of each forward pass."""
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        seen.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen2", "gpt2", "bloom", "opt", "deepseek_v3"),
        *("gemma3_text", "mistral", "gpt_oss", "gemma3n_text"),  # windows of 16 tokens
        *("lfm2", "qwen3_next", "falcon_h1"),  # recurrent states
    ],
)
def test_answers_in_step_are_those_given_alone(family: str) -> None:
    model = tiny_model(family)
    engine = engine_of(model)
    prompts = [random_prompt(length, seed=length) for length in (40, 3, 75, 40, 12)]
    alone = [answers(engine, [prompt])[0] for prompt in prompts]
    seen = passes(model)
    together = answers(engine, prompts)
    assert seen.count((5, 1)) > 0
    for (text, done), (expected, expected_done) in zip(together, alone, strict=True):
        assert text == expected
        assert done.kv_tokens == expected_done.kv_tokens
        assert done.new_tokens == expected_done.new_tokens
        assert done.decoding == Decoding(DecodingWay.PLAIN, num_rows=5)


def test_rows_that_end_early_leave_the_others_alone() -> None:
    model = tiny_model("gemma3_text")
    engine = engine_of(model)
    prompts = [random_prompt(length, seed=length) for length in (40, 12, 30)]
    written = model.generate(
        torch.tensor([prompts[1].ids]), do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )[0, 12:]
    # What the second writes at its fifth place ends every answer from now on.
    model.generation_config.eos_token_id = int(written[4])
    ended = [answers(engine, [prompt])[0] for prompt in prompts]
    assert ended[1][1].new_tokens <= 5
    assert len({done.new_tokens for _, done in ended}) > 1
    together = answers(engine, prompts)
    assert [text for text, _ in together] == [text for text, _ in ended]
    assert [d.new_tokens for _, d in together] == [d.new_tokens for _, d in ended]


def test_a_document_that_all_begin_with_is_read_once() -> None:
    model = tiny_model("gemma3_text")
    engine = engine_of(model)
    document = random_prompt(600, seed=1).ids
    prompts = [random_prompt(length, length, document) for length in (20, 9, 31)]
    alone = [answers(engine, [prompt])[0] for prompt in prompts]
    seen = passes(model)
    together = answers(engine, prompts, DocumentPrefix(600, ("1:1:a",)))
    assert [shape for shape in seen if shape[1] > 1] == [
        *((1, 512), (1, 88)),
        *((1, 31), (1, 20), (1, 9)),  # the longest first
    ]
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert [done.reused_tokens for _, done in together] == [600, 600, 0]
    # Something else beside it: nothing is shared, and nothing is wrong.
    mixed = [prompts[0], random_prompt(700, seed=5)]
    expected = [answers(engine, [prompt])[0][0] for prompt in mixed]
    found = answers(engine, mixed, DocumentPrefix(600, ("1:1:a",)))
    assert [text for text, _ in found] == expected


def test_a_kept_document_serves_the_whole_table(tmp_path: Any) -> None:  # noqa: ANN401
    model = tiny_model("llama")
    kept = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=8 * MIB)
    document, prefix = random_prompt(600, seed=1).ids, DocumentPrefix(600, ("1:1:a",))
    prompts = [random_prompt(length, length, document) for length in (20, 9)]
    first = answers(engine_of(model, document_kv=kept), prompts, prefix)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    again = answers(engine_of(model, document_kv=kept), prompts, prefix)
    assert [done.reused_tokens for _, done in again] == [600, 600]
    assert [text for text, _ in again] == [text for text, _ in first]


def test_batches_keep_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    prompts = [random_prompt(length, seed=length) for length in (60, 50, 40, 30)]
    free = answers(engine, prompts)
    two_rows = joined_batch_bytes(engine.spec, 2, 60 + NEW)
    monkeypatch.setattr(engine._prefill, "usable_bytes", lambda: two_rows)
    seen = passes(model)
    tight = answers(engine, prompts)
    assert max(rows for rows, _ in seen) == 2
    assert [text for text, _ in tight] == [text for text, _ in free]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_the_bytes_of_a_row_are_the_predicted_ones_without_its_padding(family: str) -> None:
    engine = engine_of(tiny_model(family))
    prompts = [random_prompt(length, seed=length) for length in (40, 5, 22)]
    for _, done in answers(engine, prompts):
        assert done.kv_tokens is not None
        if done.new_tokens > 1:  # a window is cut to its width by the first step
            assert done.kv_bytes == kv_cache_bytes(engine.spec, done.kv_tokens)


def test_stop_ends_every_answer_and_each_says_so() -> None:
    engine = engine_of(tiny_model("llama"))
    prompts = [random_prompt(length, seed=length) for length in (700, 600, 20)]
    stop, done = Event(), {}
    for number, step in engine.generate_many(prompts, max_new_tokens=NEW, stop=stop):
        if isinstance(step, PrefillProgress) and (number, step.done) == (1, 512):
            stop.set()
        if isinstance(step, GenerationDone):
            done[number] = step
    assert {number: step.new_tokens for number, step in done.items()} == {0: 1, 1: 0, 2: 0}
    assert {number: step.kv_tokens for number, step in done.items()} == {0: 700, 1: 512, 2: 0}
    assert all(step.stopped for step in done.values())


def test_nothing_to_answer_is_no_answer() -> None:
    assert answers(engine_of(tiny_model("llama")), []) == []
