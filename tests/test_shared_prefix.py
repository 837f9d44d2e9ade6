"""Rows that share a document's cache: what each writes alone, in memory that was promised."""

from collections.abc import Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from eval.bench.windowed import peak_allocated_bytes
from rag.lm.batch_generation import joined_batch_bytes, shared_batch_bytes
from rag.lm.chunked_attention import NAME as CHUNKED
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import DocumentPrefix, GenerationDone, PrefillProgress
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.native_cache import native_cache
from rag.lm.partial_attention import attend, attend_plain
from rag.lm.shared_prefix import (
    SharedPrefixCache,
    can_share,
    forward_shared,
)
from rag.lm.spec import CHUNK_TOKENS, ModelSpec
from rag.lm.windowed_attention import WINDOWED_FAMILIES
from test_generation import MIB, NEW, answers, engine_of, passes, random_prompt
from tiny_families import TINY, tiny_model

DOCUMENT = random_prompt(600, seed=1).ids
PREFIX = DocumentPrefix(600, ("1:1:a",))


def prompts_of(lengths: Sequence[int]) -> list[Any]:
    return [random_prompt(length, length, DOCUMENT) for length in lengths]


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_neox", "olmo2", "granite"])
def test_answers_behind_one_document_are_those_given_alone(family: str) -> None:
    model = tiny_model(family)
    engine = engine_of(model)
    prompts = prompts_of((20, 9, 31, 31, 1))
    alone = [answers(engine, [prompt])[0] for prompt in prompts]
    assert can_share(model, engine.spec)
    seen = passes(model)
    together = answers(engine, prompts, PREFIX)
    # The document once; what comes after it in one pass, the shorter ones padded; then in step.
    assert seen[:4] == [(1, 512), (1, 88), (5, 31), (5, 1)]
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert [done.reused_tokens for _, done in together] == [600, 600, 0, 600, 600]
    for (_, done), (_, expected) in zip(together, alone, strict=True):
        assert (done.new_tokens, done.kv_tokens) == (expected.new_tokens, expected.kv_tokens)
        assert done.kv_tokens is not None
        assert done.kv_bytes == kv_cache_bytes(engine.spec, done.kv_tokens)


@pytest.mark.parametrize("family", sorted(WINDOWED_FAMILIES))
def test_every_family_passes_the_proof_on_itself(family: str) -> None:
    model = tiny_model(family)
    spec = engine_of(model).spec
    has_windows = any(layer.window for layer in spec.layers)
    assert can_share(model, spec) is not has_windows


def test_what_attends_otherwise_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gemma3_text", "gpt_oss", "deepseek_v3", "bloom", "falcon_h1"):
        model = tiny_model(family)
        assert not can_share(model, engine_of(model).spec)
    model = tiny_model("llama")
    quantised = engine_of(model).spec.quantised
    assert quantised is None or not can_share(model, quantised)
    # A model whose layers do something else with what attention gives is found out by the proof.
    attention = model.model.layers[0].self_attn
    original = attention.forward

    def louder_in_company(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        out, weights = original(*args, **kwargs)
        return out * (1 if kwargs["hidden_states"].shape[0] == 1 else 2), weights

    monkeypatch.setattr(attention, "forward", louder_in_company)
    assert not can_share(model, engine_of(model).spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_and_its_plain_twin_agree(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 3, 300, 16, generator=generator).to(dtype)
    key, value = (torch.randn(2, 3, 70, 16, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, 300, 70, generator=generator) < 0.4
    mask[..., 0] = True
    for visible in (None, mask):
        out, sums = attend(query, key, value, visible, scale=0.25)
        plain, plain_sums = attend_plain(query, key, value, visible, scale=0.25)
        torch.testing.assert_close(
            out, plain, atol=0.02 if dtype is torch.bfloat16 else 1e-5, rtol=0
        )
        torch.testing.assert_close(sums, plain_sums, atol=1e-3, rtol=0)


def test_as_many_rows_as_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    prompts = prompts_of((60, 59, 58, 57, 56))
    free = answers(engine, prompts, PREFIX)
    two_rows = shared_batch_bytes(engine.spec, 2, 660 + NEW, shared_tokens=600)
    monkeypatch.setattr(engine._prefill, "usable_bytes", lambda: two_rows)
    seen = passes(model)
    tight = answers(engine, prompts, PREFIX)
    assert [shape for shape in seen if 1 < shape[1] < 88] == [(2, 60), (2, 58), (1, 56)]
    assert seen.count((1, 512)) == 1  # the document is read once for all batches
    assert [text for text, _ in tight] == [text for text, _ in free]
    assert [done.reused_tokens for _, done in tight] == [0, 600, 600, 600, 600]


def test_many_rows_read_their_questions_in_passes_of_a_chunk() -> None:
    model = tiny_model("llama")
    prompts = prompts_of([40] * 32)
    seen = passes(model)
    answers(engine_of(model), prompts, PREFIX)
    assert [shape for shape in seen if shape[0] == 32][:4] == [(32, 16), (32, 16), (32, 8), (32, 1)]
    assert all(rows * tokens <= CHUNK_TOKENS["cpu"] for rows, tokens in seen)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("kv_heads", "num_rows", "shared", "own"),
    [(2, 8, 4096, 96), (2, 32, 4096, 96), (8, 16, 4096, 96), (2, 2, 600, 2048)],
)
def test_a_batch_takes_no_more_memory_than_promised(
    kv_heads: int,
    num_rows: int,
    shared: int,
    own: int,
    device_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU; and in the ways of a GPU, where no kernel gives its sums under a mask."""
    shape = {
        **TINY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 4,
        "max_position_embeddings": 8192,
    }
    config = CONFIG_MAPPING["llama"](**shape)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.eval()
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    assert can_share(model, spec)

    def chosen(*case: Any) -> str:  # noqa: ANN401 - the last says whether there is a mask
        return "plain" if case[-1] else "cpu"

    if device_type == "cuda":
        spec = replace(spec.on_device("cuda", has_kernel=bool), chunk_tokens=CHUNK_TOKENS["cpu"])
        model.set_attn_implementation(CHUNKED)
        monkeypatch.setattr("rag.lm.partial_attention._choose", chosen)
    ids = torch.randint(2, 250, (1, shared), generator=torch.Generator().manual_seed(1))
    tails = [[7] * own for _ in range(num_rows)]
    step = max(1, CHUNK_TOKENS["cpu"] // num_rows)

    def batch() -> None:
        prefix = native_cache(model.config)
        with torch.inference_mode():
            for piece in torch.split(ids, CHUNK_TOKENS["cpu"], dim=1):
                model(input_ids=piece, past_key_values=prefix, use_cache=True, logits_to_keep=1)
        cache = SharedPrefixCache(prefix)
        for begin in range(0, own, step):
            rows = [tail[begin : begin + step] for tail in tails]
            forward_shared(model, rows, cache, front_padding=[0] * num_rows)

    measured = peak_allocated_bytes(batch, "cpu")
    promised = shared_batch_bytes(spec, num_rows, shared + own, shared_tokens=shared)
    assert measured <= promised <= 2.5 * measured, (measured, promised)
    if own < shared / 10:
        assert promised < joined_batch_bytes(spec, num_rows, shared + own) / 4


def test_a_kept_document_is_shared_without_a_copy(tmp_path: Any) -> None:  # noqa: ANN401
    kept = DocumentKV(tmp_path, memory_bytes=8 * MIB, disk_bytes=0)
    engine = engine_of(tiny_model("llama"), document_kv=kept)
    prompts = prompts_of((20, 9))
    first = answers(engine, prompts, PREFIX)
    again = answers(engine, prompts, PREFIX)
    assert [done.reused_tokens for _, done in first] == [0, 600]
    assert [done.reused_tokens for _, done in again] == [600, 600]
    assert [text for text, _ in again] == [text for text, _ in first]


@pytest.mark.parametrize(("when", "kv_tokens"), [(512, {0: 0, 1: 512}), (600, {0: 0, 1: 600})])
def test_stop_while_the_document_is_read(when: int, kv_tokens: dict[int, int]) -> None:
    engine = engine_of(tiny_model("llama"))
    stop, done = Event(), {}
    steps = engine.generate_many(prompts_of((9, 20)), max_new_tokens=NEW, stop=stop, prefix=PREFIX)
    for number, step in steps:
        if isinstance(step, PrefillProgress) and step.done == when:
            stop.set()
        if isinstance(step, GenerationDone):
            done[number] = step
    assert {number: step.kv_tokens for number, step in done.items()} == kv_tokens
    assert all(step.stopped and not step.new_tokens for step in done.values())


def test_stop_before_anything_is_read() -> None:
    stop = Event()
    stop.set()
    engine = engine_of(tiny_model("llama"))
    steps = engine.generate_many(prompts_of((9, 20)), max_new_tokens=NEW, stop=stop, prefix=PREFIX)
    assert [(number, step.kv_tokens) for number, step in steps if isinstance(step, GenerationDone)]
