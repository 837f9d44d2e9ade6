"""Several answers written in step by one static step: each row's words, bytes and end.

Here the step is called, which is the plain twin of what a GPU records; test_gpu.py records it.
"""

import gc
import weakref
from threading import Event
from typing import Any

import pytest
import torch

from conftest import prompt_of
from eval.bench.windowed import peak_allocated_bytes
from rag.lm.agreement import difference, tolerance
from rag.lm.batch_generation import shared_batch_bytes
from rag.lm.engine import DocumentPrefix, GenerationDone, Prompt, TextPiece
from rag.lm.forward import forward
from rag.lm.kv_bytes import kv_cache_bytes, static_capacity, static_kv_bytes
from rag.lm.native_cache import merge, native_cache
from rag.lm.partial_attention import _cudnn, _flash
from rag.lm.shared_prefix import (
    SharedPrefixCache,
    attend_prefix,
    can_share,
    forward_in_step,
    forward_shared,
)
from rag.lm.static_cache import STATIC_FAMILIES, attend_one
from rag.lm.static_decode import PLAIN_STEPS, Rows, StaticDecoder, can_decode_statically
from test_generation import answers
from test_static_decode import (
    NEW,
    _Devices,
    engine_of,
    hiding,
    ids_of,
    prefilled,
    same,
    spec_of,
)
from tiny_families import WINDOW, tiny_model

DOCUMENT = ids_of(60, seed=1)
PREFIX = DocumentPrefix(documents=("one@1",), num_tokens=60)
LENGTHS = (20, 3, 31, 31, 1)
# What a row has of its own before it writes; all rows are padded to the longest.
PADDING = [max(LENGTHS) - length for length in LENGTHS]
# Families, and whether their rows share the document.
KINDS = [("llama", True), ("smollm3", True), ("llama", False), ("gemma3_text", False)]


def prompts() -> list[Prompt]:
    return [prompt_of([*DOCUMENT, *ids_of(length, seed=length)]) for length in LENGTHS]


def cache_of(model: Any, *, is_shared: bool) -> tuple[Any, list[int]]:  # noqa: ANN401
    """Return the cache of rows of `LENGTHS` behind the document, and the likeliest next tokens."""
    tails = [ids_of(length, seed=length) for length in LENGTHS]
    if not is_shared:
        caches = [native_cache(model.config) for _ in tails]
        logits = torch.cat(
            [
                forward(model, [DOCUMENT + tail], each)
                for tail, each in zip(tails, caches, strict=True)
            ]
        )
        return merge(caches), logits[:, -1].argmax(-1).tolist()
    document = native_cache(model.config)
    forward(model, [DOCUMENT], document)
    cache = SharedPrefixCache(document)
    padded = [[0] * pad + tail for pad, tail in zip(PADDING, tails, strict=True)]
    logits = forward_shared(model, padded, cache, front_padding=PADDING)
    return cache, logits[:, -1].argmax(-1).tolist()


def decoder_of(model: Any, *, is_shared: bool, max_new_tokens: int = NEW) -> StaticDecoder:  # noqa: ANN401
    cache, first_ids = cache_of(model, is_shared=is_shared)
    return StaticDecoder(
        model, cache, first_ids, max_new_tokens=max_new_tokens, front_padding=PADDING
    )


# ---- what they give ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(STATIC_FAMILIES))
def test_rows_in_step_are_word_for_word_those_of_the_plain_way_alone(family: str) -> None:
    model = tiny_model(family)
    plain, static = engine_of(model, static=False), engine_of(model, static=True)
    alone = [answers(plain, [prompt])[0] for prompt in prompts()]
    # As rows that happen to begin alike, and with the document known as one.
    prefixes = [None, PREFIX] if can_share(model, static.spec) else [None]
    for prefix in prefixes:
        assert can_decode_statically(model, static.spec, "shared" if prefix else "joined")
        found = answers(static, prompts(), prefix)
        assert [text for text, _ in found] == [text for text, _ in alone]
        assert all(
            same(row, expected) for (_, row), (_, expected) in zip(found, alone, strict=True)
        )
        assert max(row.new_tokens for _, row in found) > PLAIN_STEPS + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "is_shared"), [("llama", True), ("smollm3", True), ("gemma3_text", False)]
)
def test_their_logits_are_the_plain_ones(family: str, is_shared: bool, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    plain, newest = cache_of(model, is_shared=is_shared)
    decoder = decoder_of(model, is_shared=is_shared)
    for _ in range(NEW - 1):
        expected = forward_in_step(model, [[n] for n in newest], plain, front_padding=PADDING)
        decoder.advance()
        if dtype == torch.float32:
            torch.testing.assert_close(decoder.logits, expected[:, -1], rtol=1e-4, atol=1e-5)
        else:
            for found, row in zip(decoder.logits, expected[:, -1], strict=True):
                assert difference(found, row) < tolerance(model) / 4
        newest = decoder.token[:, 0].tolist()


def test_one_row_behind_a_document_is_the_row_that_has_it_to_itself() -> None:
    model = tiny_model("llama")
    document = native_cache(model.config)
    forward(model, [DOCUMENT], document)
    cache, tail = SharedPrefixCache(document), ids_of(20)
    logits = forward_shared(model, [tail], cache, front_padding=[0])
    first_id = int(logits[0, -1].argmax())
    whole = native_cache(model.config)
    forward(model, [DOCUMENT + tail], whole)
    behind = StaticDecoder(model, cache, [first_id], max_new_tokens=NEW)
    alone = StaticDecoder(model, whole, [first_id], max_new_tokens=NEW)
    for _ in range(NEW - 1):
        assert behind.next_ids() == alone.next_ids()
        torch.testing.assert_close(behind.logits, alone.logits, rtol=1e-4, atol=1e-5)
        assert (behind.num_tokens, behind.kv_bytes()) == (alone.num_tokens, alone.kv_bytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 16])
def test_what_was_attended_to_before_counts_in_full(dtype: torch.dtype, parts: int) -> None:
    torch.manual_seed(1)
    query = torch.randn(3, 6, 1, 8).to(dtype)
    before_key, before_value = (torch.randn(1, 2, 50, 8).to(dtype) for _ in range(2))
    key, value = (torch.randn(3, 2, 64, 8).to(dtype) for _ in range(2))
    slots = torch.arange(64)
    hidden = torch.stack([(slots < padding) | (slots > 20) for padding in (0, 9, 20)])
    value[:, :, -1] = 0  # the slot that stands for what was attended to before
    before = attend_prefix(query, before_key, before_value, scale=0.3)
    found = attend_one(query, key, value, hiding(hidden), parts=parts, scale=0.3, before=before)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(),
        torch.cat((before_key.expand(3, 2, 50, 8), key), dim=2).float(),
        torch.cat((before_value.expand(3, 2, 50, 8), value), dim=2).float(),
        attn_mask=torch.cat((torch.ones(3, 50, dtype=torch.bool), ~hidden), dim=1)[:, None, None],
        scale=0.3,
        enable_gqa=True,
    )
    assert found.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("kernel", [_flash, _cudnn])
def test_a_kernel_of_a_gpu_is_called_as_torch_declares_it(kernel: Any) -> None:  # noqa: ANN401
    query, key = (torch.zeros(1, 4, n, 64, dtype=torch.bfloat16, device="meta") for n in (24, 100))
    out, sums = kernel(query, key, key, 0.1, False)
    assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
    assert (sums.shape, sums.dtype) == (query.shape[:3], torch.float32)


@pytest.mark.parametrize("prefix", [PREFIX, None])
def test_rows_that_come_out_otherwise_are_found_out_and_written_the_plain_way(
    prefix: DocumentPrefix | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    right = attend_one

    def without_padding(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        **options: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        return right(query, key, value, bias[:1].expand_as(bias), **options)

    with monkeypatch.context() as patch:
        patch.setattr("rag.lm.static_cache.attend_one", without_padding)
        assert can_decode_statically(model, spec_of(model))  # a row alone has none
        kind: Rows = "shared" if prefix else "joined"
        assert not can_decode_statically(model, spec_of(model), kind)
        assert "logits differ" in caplog.text
    expected = answers(engine_of(model, static=False), prompts(), prefix)
    found = answers(engine_of(model, static=True), prompts(), prefix)
    assert [text for text, _ in found] == [text for text, _ in expected]


# ---- where they end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", PREFIX), ("llama", None), ("gemma3_text", None)]
)
def test_rows_end_each_in_its_own_time(family: str, prefix: DocumentPrefix | None) -> None:
    model = tiny_model(family)
    decoder = decoder_of(model, is_shared=prefix is not None)
    steps = [decoder.token[:, 0].tolist()]
    steps += [decoder.next_ids() for _ in range(NEW - 1)]
    written = [list(row) for row in zip(*steps, strict=True)]
    # The token that ends the most rows at different places.
    end_id = max(
        {n for row in written for n in row},
        key=lambda n: len({row.index(n) for row in written if n in row}),
    )
    model.generation_config.eos_token_id = end_id
    alone = [answers(engine_of(model, static=False), [prompt])[0] for prompt in prompts()]
    found = answers(engine_of(model, static=True), prompts(), prefix)
    assert len({row.new_tokens for _, row in found}) > 1
    assert [text for text, _ in found] == [text for text, _ in alone]
    assert all(same(row, expected) for (_, row), (_, expected) in zip(found, alone, strict=True))


def test_only_the_rows_that_are_left_are_read() -> None:
    model = tiny_model("llama")
    all_rows, few = (decoder_of(model, is_shared=True) for _ in range(2))
    for left, kept in (
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ([1, 3, 4], [1, 3, 4]),
        ([0, 2], [1, 4]),
    ):
        few.select(left)  # of those that were left before
        for _ in range(3):
            expected = all_rows.next_ids()
            assert few.next_ids() == [expected[row] for row in kept]


def test_a_stop_ends_all_rows_and_nothing_is_shown_after_it() -> None:
    model = tiny_model("llama")
    engine, stop = engine_of(model, static=True), Event()
    shown, done = 0, {}
    steps = engine.generate_many(prompts(), max_new_tokens=200, stop=stop, prefix=PREFIX)
    for number, step in steps:
        if isinstance(step, TextPiece):
            shown += 1
            if shown == 12:
                stop.set()
        elif isinstance(step, GenerationDone):
            done[number] = step
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert all(row.stopped for row in done.values())
    written = [row.new_tokens for row in done.values()]
    assert max(written) - min(written) <= 1 < max(written) < 200
    for row, length in zip((done[n] for n in range(5)), LENGTHS, strict=True):
        assert row.kv_tokens == 60 + length + row.new_tokens - 1
        assert row.kv_bytes == kv_cache_bytes(engine.spec, row.kv_tokens)


def test_a_caller_that_goes_away_leaves_the_engine_usable() -> None:
    model = tiny_model("llama")
    engine = engine_of(model, static=True)
    expected = answers(engine, prompts(), PREFIX)
    steps = engine.generate_many(prompts(), max_new_tokens=NEW, stop=Event(), prefix=PREFIX)
    while not isinstance(next(steps)[1], TextPiece):
        pass
    steps.close()  # type: ignore[attr-defined]
    assert model.config._attn_implementation == "sdpa"
    found = answers(engine, prompts(), PREFIX)
    assert [text for text, _ in found] == [text for text, _ in expected]


# ---- where they stay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "is_shared"), [("llama", True), ("llama", False), ("gemma3_text", False)]
)
@pytest.mark.parametrize("num_new", [8, 33, 34, 35])  # 31 tokens and 33 new ones are 64 slots
def test_their_bytes_are_those_that_are_predicted(
    family: str, is_shared: bool, num_new: int
) -> None:
    model = tiny_model(family)
    spec = spec_of(model)
    decoder = decoder_of(model, is_shared=is_shared, max_new_tokens=num_new)
    longest = 60 + max(LENGTHS) + num_new - 1
    rows = {"num_rows": len(LENGTHS), "shared_tokens": 60 if is_shared else 0}
    assert decoder.cache.allocated_bytes == static_kv_bytes(spec, longest, **rows)
    for written in range(num_new - 1):
        assert decoder.num_tokens == 60 + max(LENGTHS) + written
        for padding, length in zip(PADDING, LENGTHS, strict=True):
            assert decoder.kv_bytes(padding) == kv_cache_bytes(spec, 60 + length + written)
        decoder.next_ids()
    assert int(decoder.cache.position) == longest - rows["shared_tokens"]
    assert decoder.cache.get_max_length() >= longest - rows["shared_tokens"]
    with pytest.raises(ValueError, match="no room for more than"):
        decoder.next_ids()


def test_the_document_stands_once_and_nothing_moves() -> None:
    model = tiny_model("llama")
    cache, first_ids = cache_of(model, is_shared=True)
    document = [(layer.prefix_keys, layer.prefix_values) for layer in cache.layers]
    decoder = StaticDecoder(
        model, cache, first_ids, max_new_tokens=2 * WINDOW, front_padding=PADDING
    )
    assert not cache.layers  # what was copied is not held twice

    def addresses() -> list[int]:
        static = decoder.cache
        tensors = [decoder.token, decoder.logits, static.position]
        for layer in static.static_layers:
            tensors += [layer.states, *layer.prefix, layer.place.slot, layer.place.bias]
        return [tensor.data_ptr() for tensor in tensors]

    for layer, (keys, values) in zip(decoder.cache.static_layers, document, strict=True):
        assert (layer.prefix[0] is keys, layer.prefix[1] is values) == (True, True)
        assert layer.states.shape[3] == static_capacity(
            max(LENGTHS) + 2 * WINDOW - 1, has_prefix=True
        )
    kept = [(keys.clone(), values.clone()) for keys, values in document]
    before = addresses()
    for _ in range(2 * WINDOW - 1):
        decoder.next_ids()
        assert addresses() == before
    for then, now in zip(kept, document, strict=True):
        assert torch.equal(then[0], now[0])
        assert torch.equal(then[1], now[1])


def test_a_batch_takes_no_more_memory_than_promised() -> None:
    model = tiny_model("llama", max_position_embeddings=8192)
    spec = spec_of(model)
    num_rows, shared, own = 16, 2048, 60
    assert can_share(model, spec)
    document = ids_of(shared)

    def batch() -> None:
        prefix = native_cache(model.config)
        for begin in range(0, shared, 512):
            forward(model, [document[begin : begin + 512]], prefix)
        cache = SharedPrefixCache(prefix)
        for begin in range(0, own, 30):
            tails = [ids_of(30, seed=begin)] * num_rows
            forward_shared(model, tails, cache, front_padding=[0] * num_rows)
        decoder = StaticDecoder(
            model, cache, [7] * num_rows, max_new_tokens=NEW, front_padding=[0] * num_rows
        )
        for _ in range(3):
            decoder.next_ids()
        decoder.close()

    measured = peak_allocated_bytes(batch, "cpu")
    promised = shared_batch_bytes(spec, num_rows, shared + own + NEW, shared_tokens=shared)
    assert measured <= promised <= 3 * measured, (measured, promised)


def test_their_memory_is_free_at_once_and_the_document_stays() -> None:
    model = tiny_model("llama")
    gc.collect()
    gc.disable()
    try:
        cache, first_ids = cache_of(model, is_shared=True)
        document = cache.layers[0].prefix_keys
        decoder = StaticDecoder(model, cache, first_ids, max_new_tokens=NEW, front_padding=PADDING)
        decoder.next_ids()
        kept = weakref.ref(decoder.cache.static_layers[0].states)
        decoder.close()
        del decoder
        assert kept() is None
        assert torch.isfinite(document).all()
    finally:
        gc.enable()


@pytest.mark.parametrize(("family", "is_shared"), KINDS)
def test_a_step_of_rows_neither_asks_nor_tells_the_host_anything(
    family: str, is_shared: bool
) -> None:
    """On a device without values, reading one raises, and so does a tensor of the CPU."""
    model = tiny_model(family).to(torch.bfloat16).to("meta")
    prefix = native_cache(model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 20, dtype=torch.long, device="meta"), past_key_values=prefix)
    cache: Any = merge([prefix, prefix])
    if is_shared:
        cache = SharedPrefixCache(prefix)
        forward_shared(model, [[0] * 5] * 2, cache, front_padding=[2, 0])
    decoder = StaticDecoder(model, cache, [5, 6], max_new_tokens=NEW, front_padding=[2, 0])
    with _Devices() as operations:
        decoder.advance()
    assert "aten.bmm.dtype" in operations.seen  # the products of a GPU
    assert set().union(*operations.seen.values()) == {"meta"}


def test_a_row_alone_is_no_other_step_than_before() -> None:
    """One row, no padding, no prefix: nothing of what rows need is computed for it."""
    model = tiny_model("llama")
    cache, first_id = prefilled(model, 40)
    decoder = StaticDecoder(model, cache, [first_id], max_new_tokens=NEW)
    layer = decoder.cache.static_layers[0]
    assert layer.prefix == ()
    assert (layer.place.parts, layer.place.num_slots) == (1, 64)
    assert decoder.cache.position_ids.tolist() == [[40]]
