"""Decoding on a CPU: its shortcuts give what the plain way gives."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from rag.lm.forward import forward
from rag.lm.grouped_attention import NAME, use_grouped_attention
from rag.lm.kv_bytes import ROOM_TOKENS, held_kv_bytes, measured_kv_bytes, room_bytes
from rag.lm.native_cache import GrowingLayer, branch, native_cache, select
from rag.lm.spec import ModelSpec
from tiny_families import FAMILIES, tiny_model


def ids_of(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(n) for n in torch.randint(2, 250, (num_tokens,), generator=generator)]


def read(model: Any, cache: Any, rows: int = 1) -> torch.Tensor:  # noqa: ANN401
    """Return logits of what decoding does: a prompt in chunks, single tokens, a few at once."""
    found, start = [], 0
    ids = ids_of(64)
    for length in (30, 20, 1, 1, 1, 4, 1):
        piece = [ids[start : start + length]] * rows
        found.append(forward(model, piece, cache, keep=range(length)))
        start += length
    return torch.cat(found, dim=1)


# ---- attention of grouped heads ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rows"),
    [*((family, 1) for family in sorted(FAMILIES)), ("llama", 3), ("gemma3_text", 3)],
)
def test_grouped_attention_gives_the_plain_logits(family: str, rows: int) -> None:
    model = tiny_model(family)
    expected = read(model, native_cache(model.config), rows)
    use_grouped_attention(model)
    found = read(model, native_cache(model.config), rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grouped_attention_is_used_and_repeats_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    use_grouped_attention(model)
    assert model.config._attn_implementation == NAME
    assert tiny_model("llama").config._attn_implementation == "sdpa"  # another is left alone
    shapes = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def note(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        shapes.append((tuple(query.shape[1:3]), key.shape[1]))
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr("rag.lm.grouped_attention.scaled_dot_product_attention", note)
    read(model, native_cache(model.config))
    # Of 4 heads, 2 share a key head each: 1 query becomes 2 rows, 4 become 8; 20 stay as they are.
    assert set(shapes) == {((2, 2), 2), ((2, 8), 2), ((4, 20), 2)}


def test_padded_rows_attend_as_before() -> None:
    model = tiny_model("llama")

    def padded() -> torch.Tensor:
        cache = native_cache(model.config)
        rows = [[0, 0, 0, *ids_of(5)], ids_of(8, seed=1)]
        forward(model, rows, cache, front_padding=[3, 0])
        step = forward(model, [[7], [8]], cache, front_padding=[3, 0])
        return torch.cat([step, forward(model, [[7, 8], [8, 9]], cache, front_padding=[3, 0])])

    expected = padded()
    use_grouped_attention(model)
    torch.testing.assert_close(padded(), expected, rtol=1e-4, atol=1e-5)


def test_another_attention_than_sdpa_stays() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"


# ---- a cache with room to grow -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_a_growing_cache_gives_the_logits_of_one_that_is_joined(family: str) -> None:
    model = tiny_model(family)
    cache: Any = native_cache(model.config)
    plain: Any = DynamicCache(config=model.config)
    assert torch.equal(read(model, cache), read(model, plain))
    assert any(type(layer) is GrowingLayer for layer in cache.layers)
    for layer, expected in zip(cache.layers, plain.layers, strict=True):
        if type(layer) is GrowingLayer:
            torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=0)
            torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=0)


def test_decoding_writes_in_place_until_the_room_is_full() -> None:
    model = tiny_model("llama")
    cache: Any = native_cache(model.config)
    forward(model, [ids_of(40)], cache)
    places = []
    for _ in range(2 * ROOM_TOKENS):
        forward(model, [[5]], cache)
        places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places[:ROOM_TOKENS])) == 1
    assert len(set(places[ROOM_TOKENS:])) == 1


def test_the_room_is_no_part_of_the_measured_bytes_and_within_its_bound() -> None:
    model = tiny_model("llama")
    spec = ModelSpec.from_config(model.config, dtype_bytes=4)
    cache: Any = native_cache(model.config)
    forward(model, [ids_of(40)], cache)
    assert held_kv_bytes(cache) == measured_kv_bytes(cache)
    forward(model, [[5]], cache)
    room = held_kv_bytes(cache) - measured_kv_bytes(cache)
    assert 0 < room <= room_bytes(spec, 41)


def test_sequences_that_go_on_from_one_do_not_see_each_other() -> None:
    model = tiny_model("llama")
    cache: Any = native_cache(model.config)
    forward(model, [ids_of(40)], cache)
    forward(model, [[5]], cache)  # now there is room
    kept = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
    alone = [forward(model, [[number]], branch(cache, 1)) for number in (6, 7)]
    other = branch(cache, 1)
    shallow: Any = native_cache(model.config)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    assert torch.equal(forward(model, [[6]], cache), alone[0])
    assert torch.equal(forward(model, [[7]], other), alone[1])
    assert torch.equal(forward(model, [[7]], shallow), alone[1])
    assert all(torch.equal(view, before) for view, before in kept)


def test_rows_that_are_dropped_leave_the_room_behind() -> None:
    model = tiny_model("llama")
    cache: Any = native_cache(model.config)
    forward(model, [ids_of(20), ids_of(20, seed=1)], cache)
    forward(model, [[5], [6]], cache)
    alone = branch(cache, 1)  # the first sequence alone
    expected = forward(model, [[9]], alone)
    select(cache, [0])
    torch.testing.assert_close(forward(model, [[9]], cache), expected)


def test_tokens_that_are_taken_back_are_written_over() -> None:
    model = tiny_model("llama")
    cache: Any = native_cache(model.config)
    straight: Any = native_cache(model.config)
    for each in (cache, straight):
        forward(model, [ids_of(30)], each)
        forward(model, [[5]], each)
    forward(model, [[11, 12, 13]], cache)
    cache.crop(-3)
    assert torch.equal(forward(model, [[6]], cache), forward(model, [[6]], straight))
