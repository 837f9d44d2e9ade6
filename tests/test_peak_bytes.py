"""The bound on a forward pass's memory, against what torch allocates in real ones."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from eval.bench.windowed import peak_allocated_bytes
from rag.errors import ModelFetchError
from rag.lm.kv_bytes import measured_kv_bytes, room_bytes
from rag.lm.loading import open_model
from rag.lm.native_cache import native_cache
from rag.lm.peak_bytes import peak_bytes
from rag.lm.spec import ModelSpec
from rag.settings import load_settings
from tiny_families import TINY, WINDOW, tiny_model


def beside_the_cache(model: Any, num_tokens: int, chunk_tokens: int) -> int:  # noqa: ANN401
    """Return the peak of a prefill in chunks, less what the cache holds at its end."""
    ids = torch.randint(2, 250, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    caches = []

    def prefill() -> None:
        caches.append(native_cache(model.config))
        with torch.inference_mode():
            for piece in torch.split(ids, chunk_tokens, dim=1):
                model(input_ids=piece, past_key_values=caches[0], use_cache=True, logits_to_keep=1)

    peak = peak_allocated_bytes(prefill, "cpu")
    return peak - measured_kv_bytes(caches[0])


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
    model.set_attn_implementation("sdpa")  # repeats heads, as a GPU does
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


def test_the_terms_by_hand() -> None:
    config = CONFIG_MAPPING["llama"](**GROUPED)
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    longer = peak_bytes(spec, 6144) - peak_bytes(spec, 4096)
    # A token more: a mask bit as a byte and as a number, keys and values of all heads.
    assert longer == 2048 * (512 + 512 * 2 + 2 * 8 * 32 * 2)
    windowed = ModelSpec.from_config(tiny_model("mistral").config, dtype_bytes=2)
    assert peak_bytes(windowed, 512 + WINDOW) == peak_bytes(windowed, 10**6)
