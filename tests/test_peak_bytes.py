"""The bound on a forward pass's memory, against what torch allocates in real ones."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from eval.bench.windowed import peak_allocated_bytes
from rag.errors import ModelFetchError
from rag.lm.chunked_attention import NAME as CHUNKED
from rag.lm.known_models import known_models
from rag.lm.kv_bytes import measured_kv_bytes, room_bytes
from rag.lm.loading import open_model
from rag.lm.native_cache import native_cache
from rag.lm.peak_bytes import peak_bytes
from rag.lm.spec import LayerSpec, ModelSpec
from rag.settings import load_settings
from tiny_families import TINY, WINDOW, tiny_model


def beside_the_cache(model: Any, num_tokens: int, chunk_tokens: int) -> int:  # noqa: ANN401
    """Return the peak of a prefill in chunks, less what the cache holds at its end."""
    ids = torch.randint(2, 250, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    caches = []

    def prefill() -> None:
        caches.append(native_cache(model.config))
        with torch.inference_mode():
            for piece in torch.split(ids, chunk_tokens, dim=1):
                model(input_ids=piece, past_key_values=caches[0], use_cache=True, logits_to_keep=1)

    peak = peak_allocated_bytes(prefill, str(model.device))
    return peak - measured_kv_bytes(caches[0])


def none(layer: LayerSpec) -> bool:
    """Say that a device has no kernel for heads of any width."""
    return layer.head_width < 0


# Shapes with the proportions of a real model, so that fixed costs do not hide the formula.
GROUPED = {
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("family", "shape", "num_tokens"),
    [
        ("llama", {}, 512),
        ("llama", {}, 1024),
        ("llama", {}, 4096),
        ("llama", {"num_key_value_heads": 8}, 4096),
        ("llama", {"num_key_value_heads": 1}, 4096),
        ("qwen3", {"head_dim": 64}, 4096),
        ("phi3", {"sliding_window": 1024}, 4096),
    ],
)
def test_the_bound_holds_and_is_near(family: str, shape: dict[str, Any], num_tokens: int) -> None:
    config = CONFIG_MAPPING[family](**{**GROUPED, **shape})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    measured = beside_the_cache(model.eval(), num_tokens, 512)
    predicted = peak_bytes(spec, num_tokens)
    assert measured <= predicted <= 1.6 * measured + 2**20, (measured, predicted)


@pytest.mark.model
def test_the_bound_is_near_for_a_real_model() -> None:
    settings = load_settings()
    try:
        opened = open_model("smollm2-135m", settings)
    except ModelFetchError:
        pytest.skip("smollm2-135m is not fetched: make test fetches it")
    model = opened.load_hastened()
    spec = ModelSpec.from_config(opened.config, dtype_bytes=opened.dtype.itemsize)
    bound, room = peak_bytes(spec, 1024), room_bytes(spec, 1024)
    assert beside_the_cache(model, 1024, 512) <= bound
    model.set_attn_implementation("sdpa")  # repeats heads, which is planned for
    measured = beside_the_cache(model, 1024, 512)
    assert measured <= bound <= 1.5 * measured + room  # a prefill alone makes no room


@pytest.mark.parametrize(
    "family",
    "gemma2 gemma3_text gpt_oss deepseek_v3 falcon bloom gpt2 mixtral llama4_text falcon_h1"
    " qwen3_next kimi_linear jamba zamba2".split(),
)
def test_the_bound_holds_for_other_kinds_of_layers(family: str) -> None:
    model = tiny_model(family).bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2)
    for num_tokens in (200, 1000):
        assert beside_the_cache(model, num_tokens, 200) <= peak_bytes(
            spec, num_tokens, chunk_tokens=200
        )


# A narrow feed-forward layer, so that it is the attention that decides.
NARROW = {"intermediate_size": 64}


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {}),
        ("llama", NARROW),
        ("llama", {**NARROW, "num_key_value_heads": 8}),
        ("llama", {**NARROW, "num_key_value_heads": 1}),
        ("qwen3", {**NARROW, "head_dim": 64}),
        ("phi3", NARROW),  # queries, keys and values are projected in one piece
        ("gpt_neox", NARROW),
        ("cohere", NARROW),  # turns queries in float32
        ("glm4", NARROW),
        ("gemma3_text", {**NARROW, "head_dim": 64, "sliding_window": 256}),
    ],
)
def test_the_bound_holds_where_chunks_are_attended_to_in_two_parts(
    family: str, shape: dict[str, Any]
) -> None:
    """The code that a GPU runs, on a CPU, whose kernel allocates outputs and sums as that does."""
    if family == "gemma3_text":
        shape = {**shape, "layer_types": ["sliding_attention", "full_attention"]}
    config = CONFIG_MAPPING[family](**{**GROUPED, **shape})
    spec = ModelSpec.from_config(config, dtype_bytes=2).on_device("cuda", has_kernel=bool)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()  # type: ignore[no-untyped-call]
    model.set_attn_implementation(CHUNKED)
    measured = [beside_the_cache(model, num_tokens, 512) for num_tokens in (1024, 4096)]
    predicted = [peak_bytes(spec, num_tokens, chunk_tokens=512) for num_tokens in (1024, 4096)]
    for found, bound in zip(measured, predicted, strict=True):
        assert found <= bound <= 1.4 * found + 2**20, (found, bound)


@pytest.mark.parametrize(
    "family", "llama gemma3_text gemma4_text llama4_text falcon_h1 mixtral opt qwen3_next".split()
)
def test_the_bound_holds_in_two_parts_for_other_kinds_of_layers(family: str) -> None:
    model = tiny_model(family).bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2).on_device("cuda", has_kernel=bool)
    assert any(layer.maskless for layer in spec.layers)
    model.set_attn_implementation(CHUNKED)
    for num_tokens in (200, 1000):
        found = beside_the_cache(model, num_tokens, 200)
        assert found <= peak_bytes(spec, num_tokens, chunk_tokens=200)


# MiB of a prefill in chunks of 4,096 on an H200, less the cache, by its tokens: docs/benchmarks.md,
# "A GPU".
@pytest.mark.parametrize(
    ("name", "measured_mib"),
    [
        (
            "llama-3.1-8b",
            {8_192: 1_490 - 1_024, 32_768: 4_562 - 4_096, 131_072: 16_850 - 16_384},
        ),
        ("gemma-3-4b", {8_192: 625 - 276, 32_768: 1_105 - 756, 131_072: 3_045 - 2_676}),
    ],
)
def test_the_bound_is_near_what_a_gpu_took(name: str, measured_mib: dict[int, int]) -> None:
    fields = dict(known_models()[name].config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    masked, parts = (spec.on_device("cuda", has_kernel=which) for which in (none, bool))
    for num_tokens, measured in measured_mib.items():
        assert measured <= peak_bytes(parts, num_tokens) / 2**20 <= 1.4 * measured
        assert peak_bytes(parts, num_tokens) < peak_bytes(masked, num_tokens)


def test_the_terms_by_hand() -> None:
    config = CONFIG_MAPPING["llama"](**GROUPED)
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    longer = peak_bytes(spec, 6144) - peak_bytes(spec, 4096)
    # A token more: a mask bit as a byte and as a number, keys and values of all heads.
    assert longer == 2048 * (512 + 512 * 2 + 2 * 8 * 32 * 2)
    parts = spec.on_device("cuda", has_kernel=lambda layer: layer.head_width == 32)
    assert peak_bytes(parts, 6144) == peak_bytes(parts, 5120)
    # Long enough for one layer's keys and values, twice 2 heads of 32, to be the most there is.
    assert peak_bytes(parts, 300_000) - peak_bytes(parts, 200_000) == 100_000 * 2 * 2 * 32 * 2
    masked = spec.on_device("cuda", has_kernel=lambda layer: layer.head_width != 32)
    assert masked == spec.on_device("cuda", has_kernel=none)
    # One token goes under a mask where several are in step, and is planned so.
    assert peak_bytes(parts, 1000, chunk_tokens=1) == peak_bytes(masked, 1000, chunk_tokens=1)
    windowed = ModelSpec.from_config(tiny_model("mistral").config, dtype_bytes=2)
    assert peak_bytes(windowed, 512 + WINDOW) == peak_bytes(windowed, 10**6)
