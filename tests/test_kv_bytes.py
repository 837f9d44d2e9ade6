"""Predicted cache bytes against the tensors of real runs, and what a config may not say."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from rag.errors import UnsupportedModelError
from rag.lm.kv_bytes import (
    KVDtype,
    kv_bytes_by_kind,
    kv_cache_bytes,
    measured_kv_bytes,
)
from rag.lm.layers import cache_layers
from rag.lm.meta_model import build_meta_model, measured_layers, same_cache
from rag.lm.spec import VERIFIED_FAMILIES, ModelSpec
from tiny_families import FAMILIES, WINDOW, tiny_config, tiny_model


def real_cache(model: Any, num_tokens: int) -> DynamicCache:  # noqa: ANN401
    """Return the cache after a prefill of all tokens but one and a decode step."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 250, (1, num_tokens), generator=generator)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_predicted_cache_bytes_are_those_of_the_real_tensors(family: str) -> None:
    model = tiny_model(family).bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2)
    for num_tokens in (WINDOW - 6, 3 * WINDOW + 1):
        assert measured_kv_bytes(real_cache(model, num_tokens)) == kv_cache_bytes(spec, num_tokens)
    assert spec.cache_basis == "verified"
    assert spec.num_parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_prompt_in_pieces_is_the_prompt_in_one_piece(family: str) -> None:
    model = tiny_model(family)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.15)  # as initialised, attention would hardly matter
    ids = torch.randint(2, 250, (1, 60), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[0, -1]
        for piece in torch.split(ids, [20, 20, 19, 1], dim=1):
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0, -1]
    is_same = bool((logits - whole).abs().max() < 1e-3 * whole.abs().max())
    assert is_same is ModelSpec.from_config(model.config).prefills_in_chunks


def test_verified_families_are_those_that_are_verified() -> None:
    assert set(FAMILIES) == VERIFIED_FAMILIES
    assert len(FAMILIES) >= 40


def test_the_tiny_models_do_have_every_kind_of_layer() -> None:
    kinds = {
        family: " ".join(layer.kind for layer in ModelSpec.from_config(tiny_config(family)).layers)
        for family in ("gemma3n_text", "llama4_text", "deepseek_v32", "nemotron_h", "zamba2")
    }
    assert kinds == {
        "gemma3n_text": "sliding sliding sliding sliding full shared shared shared shared shared",
        "llama4_text": "chunked chunked chunked full",
        "deepseek_v32": "latent latent",
        "nemotron_h": "linear full none linear",
        "zamba2": "linear hybrid linear hybrid",
    }


# What real shapes hold after n tokens, worked out by hand from the published widths.
LLAMA_8B = 32 * 2 * 8 * 128  # layers, keys and values, heads, head width
GEMMA_FULL, GEMMA_SLIDING = 10 * 2 * 16 * 128, 52 * 2 * 16 * 128


@pytest.mark.parametrize(
    ("family", "shape", "num_tokens", "elements"),
    [
        (
            "llama",
            {
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            32768,
            32768 * LLAMA_8B,
        ),
        (
            "gemma3_text",
            {
                "hidden_size": 5376,
                "num_hidden_layers": 62,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "head_dim": 128,
                "sliding_window": 1024,
            },
            32768,
            32768 * GEMMA_FULL + 1023 * GEMMA_SLIDING,
        ),
        ("deepseek_v3", {"num_hidden_layers": 61}, 1000, 1000 * 61 * (512 + 64)),
        ("falcon", {"num_hidden_layers": 32, "hidden_size": 4544}, 10, 10 * 32 * 2 * 64),
    ],
)
def test_real_shapes_by_hand(
    family: str, shape: dict[str, Any], num_tokens: int, elements: int
) -> None:
    config = CONFIG_MAPPING[family](**shape)
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    assert spec.cache_basis == "verified"
    assert kv_cache_bytes(spec, num_tokens) == 2 * elements
    assert kv_cache_bytes(spec, num_tokens, kv_dtype=KVDtype.FP8) == elements
    assert kv_cache_bytes(spec, num_tokens, kv_dtype=KVDtype.INT8) == elements
    assert kv_cache_bytes(spec, num_tokens, kv_dtype=KVDtype.INT4) == elements // 2
    assert kv_cache_bytes(spec, num_tokens, kv_dtype=KVDtype.Q8_0) == elements // 32 * 34
    assert kv_cache_bytes(spec, num_tokens, kv_dtype=KVDtype.Q4_0) == elements // 32 * 18


def test_bytes_by_kind_add_up_and_the_state_keeps_its_format() -> None:
    spec = ModelSpec.from_config(tiny_config("zamba2"), dtype_bytes=2)
    by_kind = kv_bytes_by_kind(spec, 100)
    # Per layer 96 x 4 convolution elements of 2 bytes and 4 x 16 x 16 recurrent ones of 4.
    state = 96 * 4 * 2 + 4 * 16 * 16 * 4
    assert by_kind == {"linear": 2 * state, "hybrid": 2 * (state + 100 * 2 * 4 * 16 * 2)}
    assert sum(by_kind.values()) == kv_cache_bytes(spec, 100)
    eight_bit = kv_bytes_by_kind(spec, 100, kv_dtype=KVDtype.INT8)
    assert eight_bit == {"linear": 2 * state, "hybrid": 2 * (state + 100 * 2 * 4 * 16)}


def test_fp8_is_what_the_quantised_cache_of_transformers_holds() -> None:
    from transformers.cache_utils import QuantizedCache

    model = tiny_model("llama").bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2)
    cache = QuantizedCache(backend="fp8", config=model.config)
    ids = torch.arange(2, 42)[None]
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    predicted = kv_cache_bytes(spec, 40, kv_dtype=KVDtype.FP8)
    assert quantised_bytes(cache) == predicted


def quantised_bytes(cache: Any) -> int:  # noqa: ANN401
    """Return the bytes of the one-byte tensors in a quantised cache: all but scales."""
    return sum(
        tensor.numel()
        for layer in cache.layers
        for value in vars(layer).values()
        for tensor in (value if isinstance(value, tuple) else (value,))
        if isinstance(tensor, torch.Tensor) and tensor.element_size() == 1
    )


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "deepseek_v32", "qwen3_next", "zamba2"])
def test_the_run_without_weights_agrees_with_the_formulas(family: str) -> None:
    config = tiny_config(family)
    measured = measured_layers(build_meta_model(config), config)
    assert measured is not None
    assert same_cache(measured, cache_layers(config))


def test_a_family_without_formula_is_measured() -> None:
    config = tiny_config("exaone_moe", head_dim=12, n_group=1, topk_group=1)
    assert config.model_type not in VERIFIED_FAMILIES
    model = tiny_model("exaone_moe", head_dim=12, n_group=1, topk_group=1).bfloat16()
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    assert spec.cache_basis == "measured"
    for num_tokens in (9, 61):
        assert measured_kv_bytes(real_cache(model, num_tokens)) == kv_cache_bytes(spec, num_tokens)


def test_a_wrong_formula_yields_to_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of what the layers cache, as a formula that missed an upstream change would say.
    monkeypatch.setattr("rag.lm.layers.head_width", lambda config: 4)
    config = tiny_config("llama")
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    assert spec.cache_basis == "measured"
    assert kv_cache_bytes(spec, 10) == 10 * 2 * 2 * (2 * 8) * 2


@pytest.mark.parametrize(
    "family", ["mamba", "mamba2", "minimax", "recurrent_gemma", "deepseek_v4", "falcon_mamba"]
)
def test_families_with_a_cache_of_their_own_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=family) as raised:
        ModelSpec.from_config(CONFIG_MAPPING[family]())
    assert "llama" in raised.value.hint


def test_a_state_cannot_be_rolled_back() -> None:
    able = {
        family: ModelSpec.from_config(tiny_config(family)).can_roll_back
        for family in ("llama", "mistral", "deepseek_v3", "qwen3_next", "zamba2", "lfm2", "jamba")
    }
    assert able == {
        "llama": True,
        "mistral": True,
        "deepseek_v3": True,
        "qwen3_next": False,
        "zamba2": False,
        "lfm2": False,
        "jamba": False,
    }


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("num_attention_heads", 5, "hidden_size 32 does not divide by its 5 heads"),
        ("num_key_value_heads", 3, "4 attention heads do not divide by 3"),
        ("num_key_value_heads", -2, "-2"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("hidden_size", None, "hidden_size"),
        ("vocab_size", 0, "vocab_size is 0"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("sliding_window", -7, "sliding_window is -7"),
        ("max_position_embeddings", -1, "max_position_embeddings -1"),
        ("max_position_embeddings", None, "not usable"),
        ("rope_parameters", None, "rope_parameters"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "spiral"),
    ],
)
def test_a_config_that_lies_is_refused(field: str, value: Any, found: str) -> None:  # noqa: ANN401
    config = tiny_config("mistral")
    config.head_dim = None
    config.__dict__[field] = value
    with pytest.raises(UnsupportedModelError) as raised:
        ModelSpec.from_config(config)
    assert found in raised.value.message
