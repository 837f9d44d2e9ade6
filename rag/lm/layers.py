"""What each layer of a model caches, as formulas over its config.

The kind and window of a layer are those of the cache that transformers itself builds for the
config; only the widths are worked out here. `rag.lm.meta_model` checks them against the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Families whose predicted cache is compared, byte for byte, with the tensors of the real modelling
# code: tests/test_kv_bytes.py runs each of them and holds this set to its own table.
VERIFIED_FAMILIES = frozenset(
    {
        "apertus",
        "arcee",
        "bamba",
        "biogpt",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "ernie4_5",
        "exaone4",
        "falcon",
        "falcon_h1",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "helium",
        "hunyuan_v1_dense",
        "jamba",
        "kimi_linear",
        "lfm2",
        "llama",
        "llama4_text",
        "longcat_flash",
        "minicpm3",
        "ministral",
        "mistral",
        "mixtral",
        "mpt",
        "nemotron",
        "nemotron_h",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "xglm",
        "zamba2",
    }
)

# Families that cannot run on the cache the engine makes: their state is elsewhere, or its keys and
# values are one tensor.
_OTHER_CACHE = frozenset(
    {
        "deepseek_v4",
        "falcon_mamba",
        "mamba",
        "mamba2",
        "minimax",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
    }
)

# Families whose answer was seen to depend on how the prompt is cut into prefill chunks; why was not
# found out. tests/test_kv_bytes.py shows of all others that it does not.
ONE_PIECE_FAMILIES = frozenset({"bamba", "deepseek_v32", "jamba"})

# Families whose modelling code knows no grouped heads, whatever else their config may hold.
_UNGROUPED = frozenset(
    {
        "biogpt",
        "bloom",
        "codegen",
        "gpt2",
        "gpt_neox",
        "gptj",
        "mpt",
        "opt",
        "persimmon",
        "xglm",
    }
)

LayerKind = Literal["full", "sliding", "chunked", "latent", "linear", "hybrid", "shared", "none"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: what it caches per token and what it keeps whatever the length, in elements.

    - full: keys and values of every token; latent: one compressed latent of every token (MLA), and
      its index key where the family selects keys by an index;
    - sliding: a token attends to itself and to the `window - 1` tokens before it; chunked: to those
      of its own chunk of `window` tokens, and the cache holds as many as a sliding one;
    - linear: a state of constant size; hybrid: that beside keys and values;
    - shared: attends to the keys and values of an earlier layer; none: no attention at all.

    `state_elements` are in the model's dtype, `float32_state_elements` in float32 whatever that is.
    `head_width` is that of one head of the layer's own keys, 0 where it caches none. `maskless`
    says that chunks are attended to by a kernel that needs no mask; see `ModelSpec.on_device`.
    """

    kind: LayerKind
    window: int | None
    key_elements_per_token: int
    value_elements_per_token: int
    query_elements_per_token: int
    index_elements_per_token: int = 0
    state_elements: int = 0
    float32_state_elements: int = 0
    head_width: int = 0
    maskless: bool = False

    @property
    def elements_per_token(self) -> int:
        """Keys, values and index keys of one token."""
        return (
            self.key_elements_per_token
            + self.value_elements_per_token
            + self.index_elements_per_token
        )

    def kept_tokens(self, num_tokens: int) -> int:
        """Return how many of `num_tokens` tokens the layer keeps once a decode step has run."""
        return num_tokens if self.window is None else min(num_tokens, self.window - 1)


def unsupported(problem: str) -> UnsupportedModelError:
    """Return the error that refuses a model, with `problem` saying what was found."""
    return UnsupportedModelError(
        f"the model's cache and positions cannot be predicted exactly: {problem}",
        hint="choose a model of one of these families: " + ", ".join(sorted(VERIFIED_FAMILIES)),
    )


def check_shape(text: PreTrainedConfig) -> None:
    """Refuse a config that contradicts itself or lacks what every decoder has.

    Raises:
        UnsupportedModelError: naming the field, what it holds and what was expected.
    """
    if text.model_type in _OTHER_CACHE:
        raise unsupported(f"model type {text.model_type!r} keeps its state in a cache of its own")
    for layer in {id(config): config for config in text.per_layer_config}.values():
        heads = _positive(layer, "num_attention_heads", "n_head", "n_heads")
        hidden = _positive(layer, "hidden_size", "n_embd", "d_model")
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        if not getattr(layer, "head_dim", None) and hidden % heads:
            raise unsupported(f"hidden_size {hidden} does not divide by its {heads} heads")
        if kv_heads < 0 or heads % kv_heads:
            raise unsupported(
                f"{heads} attention heads do not divide by {kv_heads} key-value heads"
            )
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(layer, name, None)
            if window is not None and (not isinstance(window, int) or window < 0):
                raise unsupported(f"{name} is {window!r}, expected a positive number of tokens")
    _positive(text, "vocab_size")
    _positive(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def cache_layers(text: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    """Return one LayerSpec per layer of the cache that transformers builds for `text`.

    Args:
        text: the decoder's config, of a verified family.

    Raises:
        UnsupportedModelError: if a layer is of a kind that no formula covers.
    """
    from transformers import DynamicCache

    caches = DynamicCache(config=text).layers
    sharing = getattr(text, "kv_sharing_modes", None) or [None] * len(caches)
    return tuple(
        _layer(text, layer_config, cache, is_shared=mode == "reuse")
        for layer_config, cache, mode in zip(text.per_layer_config, caches, sharing, strict=True)
    )


def cache_kind(cache: Any, layer_type: str | None) -> tuple[LayerKind, int | None]:  # noqa: ANN401
    """Return the kind and window of one layer of a transformers cache.

    Exact classes are compared: a subclass may keep more than keys and values.

    Raises:
        UnsupportedModelError: if the class is not known, or its window holds no token.
    """
    from transformers.cache_utils import (
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )

    kinds: dict[type, LayerKind] = {
        DynamicLayer: "full",
        DynamicIndexedLayer: "latent",
        LinearAttentionLayer: "linear",
        LinearAttentionAndFullAttentionLayer: "hybrid",
        DummyLayer: "none",
    }
    if type(cache) is DynamicSlidingWindowLayer:
        window = int(cache.sliding_window)
        if window < 2:
            raise unsupported(f"a sliding window of {window} tokens")
        return ("chunked" if layer_type == "chunked_attention" else "sliding"), window
    if type(cache) not in kinds:
        raise unsupported(f"a layer keeps a {type(cache).__name__}")
    return kinds[type(cache)], None


def query_elements(text: Any) -> int:  # noqa: ANN401 - a config of any family
    """Return the width of one token's queries; for MLA the mean of that of scores and of values."""
    heads = _positive(text, "num_attention_heads", "n_head", "n_heads")
    if getattr(text, "kv_lora_rank", None):
        scored = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return heads * (scored + int(text.v_head_dim)) // 2
    return heads * head_width(text)


def _layer(text: Any, layer_config: Any, cache: Any, *, is_shared: bool) -> LayerSpec:  # noqa: ANN401
    """Return the spec of one layer, its widths by the formulas of its family."""
    layer_type = getattr(layer_config, "layer_type", None)
    kind, window = cache_kind(cache, layer_type)
    if kind == "sliding" and getattr(layer_config, "attention_chunk_size", None) == window:
        kind = "chunked"
    if kind == "none":
        queries = query_elements(layer_config) if is_shared else 0
        return LayerSpec("shared" if is_shared else "none", None, 0, 0, queries)
    state, float32_state = _state(text) if kind in ("linear", "hybrid") else (0, 0)
    if kind == "linear":
        return LayerSpec(kind, None, 0, 0, 0, 0, state, float32_state)
    keys, values = _widths(layer_config)
    index = int(text.index_head_dim) if hasattr(cache, "indexer_keys") else 0
    if getattr(text, "kv_lora_rank", None):
        kind = "latent"
    queries, width = query_elements(layer_config), head_width(layer_config)
    return LayerSpec(kind, window, keys, values, queries, index, state, float32_state, width)


def _widths(config: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the elements of the keys and of the values of one token in one layer."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    heads = _positive(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = heads
    if config.model_type == "falcon":
        grouped = config.new_decoder_architecture or not config.multi_query
        kv_heads = int(config.num_kv_heads) if grouped else 1
    elif config.model_type == "gpt_bigcode":
        kv_heads = 1 if config.multi_query else heads
    elif config.model_type not in _UNGROUPED:
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return kv_heads * head_width(config), kv_heads * head_width(config)


def head_width(config: Any) -> int:  # noqa: ANN401 - a config of any family
    """Return the width of one head of queries, and of keys where it is no latent."""
    heads = _positive(config, "num_attention_heads", "n_head", "n_heads")
    width = _positive(config, "hidden_size", "n_embd", "d_model") // heads
    if config.model_type in _UNGROUPED:
        return width
    named = getattr(config, "attention_head_dim", None) or getattr(config, "head_dim", None)
    return int(named or width)


def _state(text: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the elements of a layer's (convolution, recurrent) state; the latter is float32."""
    formula = _STATES.get(text.model_type)
    if formula is None:
        raise unsupported(f"the state of {text.model_type!r} has no formula")
    return formula(text)


def _gated_delta(text: Any) -> tuple[int, int]:  # noqa: ANN401
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    return (2 * keys + values) * text.linear_conv_kernel_dim, values * text.linear_key_head_dim


def _kimi_delta(text: Any) -> tuple[int, int]:  # noqa: ANN401
    width = text.linear_num_heads * text.linear_head_dim
    return 3 * width * text.linear_conv_kernel_dim, width * text.linear_head_dim


def _short_convolution(text: Any) -> tuple[int, int]:  # noqa: ANN401
    return text.hidden_size * text.conv_L_cache, 0


def _mamba1(text: Any) -> tuple[int, int]:  # noqa: ANN401
    width = text.mamba_expand * text.hidden_size
    return width * text.mamba_d_conv, width * text.mamba_d_state


def _mamba2(text: Any) -> tuple[int, int]:  # noqa: ANN401
    width = text.mamba_n_heads * text.mamba_d_head
    mixed = width + 2 * text.mamba_n_groups * text.mamba_d_state
    return mixed * text.mamba_d_conv, width * text.mamba_d_state


def _zamba2(text: Any) -> tuple[int, int]:  # noqa: ANN401
    width = text.mamba_expand * text.hidden_size
    mixed = width + 2 * text.mamba_ngroups * text.mamba_d_state
    return mixed * text.mamba_d_conv, width * text.mamba_d_state


def _nemotron_h(text: Any) -> tuple[int, int]:  # noqa: ANN401
    width = text.mamba_num_heads * text.mamba_head_dim
    mixed = width + 2 * text.n_groups * text.ssm_state_size
    return mixed * text.conv_kernel, width * text.ssm_state_size


_STATES: dict[str, Callable[[Any], tuple[int, int]]] = {
    "bamba": _mamba2,
    "falcon_h1": _mamba2,
    "granitemoehybrid": _mamba2,
    "jamba": _mamba1,
    "kimi_linear": _kimi_delta,
    "lfm2": _short_convolution,
    "nemotron_h": _nemotron_h,
    "qwen3_5_text": _gated_delta,
    "qwen3_next": _gated_delta,
    "zamba2": _zamba2,
}


def _positive(config: Any, *names: str) -> int:  # noqa: ANN401
    """Return the first of the fields that the config has; it must be a positive whole number."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            if not isinstance(value, int) or value < 1:
                raise unsupported(f"{name} is {value!r}, expected a positive whole number")
            return value
    raise unsupported(f"its config has no {names[0]}")
