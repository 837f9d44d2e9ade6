"""Decoding on a CPU: its shortcuts give what the plain way gives."""

import copy
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from rag.lm.forward import forward
from rag.lm.four_bit import FourBitLinear, layout, pack
from rag.lm.gguf_blocks import read_blocks
from rag.lm.grouped_attention import NAME, use_grouped_attention
from rag.lm.kv_bytes import ROOM_TOKENS, held_kv_bytes, measured_kv_bytes, room_bytes
from rag.lm.lean_forward import LEAN_FAMILIES, lean_logits, use_lean_forward
from rag.lm.native_cache import GrowingLayer, branch, native_cache, select
from rag.lm.packed_linear import PackedLinear, can_pack, use_packed_weights
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


# ---- weights as the product reads them ----------------------------------------------------------


needs_bfloat16 = pytest.mark.skipif(
    not can_pack(), reason="this CPU has no native bfloat16 products"
)


@needs_bfloat16
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_weights_give_the_same_logits_bit_for_bit(family: str) -> None:
    model = tiny_model(family).bfloat16()
    expected = read(model, native_cache(model.config))
    replaced = use_packed_weights(model)
    assert torch.equal(read(model, native_cache(model.config)), expected)
    # What has no plain linear layer, or looks at their weights, stays as it was.
    assert (replaced == 0) == (
        family in {"falcon", "gpt2", "deepseek_v32", "jamba", "longcat_flash"}
    )


def test_weights_in_float32_are_left_alone() -> None:
    assert use_packed_weights(tiny_model("llama")) == 0


def test_without_the_kernel_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rag.lm.packed_linear.can_pack", lambda: False)
    assert use_packed_weights(tiny_model("llama").bfloat16()) == 0


@needs_bfloat16
def test_a_product_that_comes_out_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 1.01 * wrong(self, x))
    model = tiny_model("llama").bfloat16()
    assert use_packed_weights(model) == 0
    assert type(model.get_output_embeddings()) is torch.nn.Linear


# ---- one token without the framework ------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(LEAN_FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_lean_pass_gives_the_models_logits_bit_for_bit(
    family: str, dtype: torch.dtype, rows: int
) -> None:
    model = tiny_model(family, use_sliding_window=False).to(dtype)
    use_grouped_attention(model)
    use_packed_weights(model)
    expected = read(model, native_cache(model.config), rows)
    assert use_lean_forward(model)
    assert torch.equal(read(model, native_cache(model.config), rows), expected)


def test_the_lean_pass_serves_single_tokens_of_plain_caches_alone() -> None:
    model = tiny_model("llama")
    use_grouped_attention(model)
    assert use_lean_forward(model)
    cache: Any = native_cache(model.config)
    assert lean_logits(model, [[5]], cache) is None  # nothing is in the cache
    forward(model, [ids_of(20)], cache)
    assert lean_logits(model, [[5, 6]], cache) is None
    assert cache.get_seq_length() == 20
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    forward(model, [[5]], cache)
    assert not passes
    forward(model, [[5]], cache, front_padding=[3])
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma3_text", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_other_models_have_no_lean_pass(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    use_grouped_attention(model)
    assert not use_lean_forward(model)


# ---- weights of 4 bits --------------------------------------------------------------------------


needs_four_bit = pytest.mark.skipif(layout() is None, reason="torch has no 4-bit product here")


def quantised(rows: int, columns: int, kind: str) -> np.ndarray:
    """Return a random tensor in a block format of GGUF; of Q4_K every bit is random."""
    generator = np.random.default_rng(0)
    if kind == "Q4_K":
        data = generator.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
        halves = (generator.random((rows, columns // 256, 2)) / 64).astype(np.float16)
        data[..., :4] = halves.view(np.uint8).reshape(*data.shape[:2], 4)
        return data.reshape(rows, -1)
    weights = generator.standard_normal((rows, columns)).astype(np.float32)
    return np.asarray(gguf.quantize(weights, gguf.GGMLQuantizationType[kind]))


@needs_four_bit
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_product_is_that_of_the_blocks(kind: str, rows: int) -> None:
    found = read_blocks(quantised(128, 512, kind), kind)
    assert found is not None
    assert found.offsets is not None
    numbers = torch.from_numpy(found.numbers).int()
    scales, offsets = torch.from_numpy(found.scales), torch.from_numpy(found.offsets)
    # As the kernel sees them: scale and middle rounded to bfloat16, nothing else.
    middle = (offsets + 8 * scales).bfloat16().float()[..., None]
    weights = (numbers.view(128, -1, 32) - 8) * scales.bfloat16().float()[..., None] + middle
    states = torch.randn(1, rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        product = FourBitLinear(*pack(numbers, scales, offsets))(states)
    expected = states.float() @ weights.view(128, 512).T
    torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.05)
