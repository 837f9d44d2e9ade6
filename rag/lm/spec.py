"""The shape and limits of a language model, read from its config without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Families whose predicted cache was compared, byte for byte, with the tensors of the real modelling
# code (tests/test_lm.py does it again for each). Every other family is refused.
VERIFIED_FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)

# Families whose modelling code knows no grouped heads, whatever else their config may hold.
_UNGROUPED = frozenset({"gpt2", "gpt_neox", "opt"})

# Families with a table of position embeddings: nothing exists beyond its last row.
_LEARNED_POSITIONS = {"gpt2": "n_positions", "opt": "max_position_embeddings"}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer: what it caches per token, and how wide its queries are, in elements.

    A sliding layer lets a token attend to itself and to the `window - 1` tokens before it.
    """

    kind: Literal["full", "sliding"]
    window: int | None
    key_elements_per_token: int
    value_elements_per_token: int
    query_elements_per_token: int


@dataclass(frozen=True, slots=True)
class PositionRange:
    """How one group of layers encodes positions, and how far that was trained.

    `kind` is a RoPE type of transformers, "learned" or "none". Up to `native` tokens apart is what
    was trained without scaling; up to `declared` is what the checkpoint's own scaling promises;
    None is no limit. Layers with a `window` never see two tokens further apart than that.
    """

    layers: str
    kind: str
    native: int | None
    declared: int | None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the gates need to know of a model; plain numbers, no torch.

    `linear_parameters` counts the weights that multiply every token (active experts only, no
    embeddings, no output head); `dtype_bytes` is the size of one cached element; `max_positions` is
    the longest context that the checkpoint declares, None if it declares none.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    positions: tuple[PositionRange, ...]
    dtype_bytes: int
    vocab_size: int
    max_positions: int | None
    num_parameters: int
    linear_parameters: int

    @property
    def num_layers(self) -> int:
        """The number of layers that keep keys and values."""
        return len(self.layers)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, *, dtype_bytes: int | None = None) -> ModelSpec:
        """Return the spec of a transformers config; the config alone is read, no weights.

        The kind and window of each layer are those of `DynamicCache(config=config)`, so they are
        the ones that the model will really run with. Parameters are counted on the meta device.

        Args:
            config: what `AutoConfig.from_pretrained` gave.
            dtype_bytes: bytes of one element of the weights; by default those of `config.dtype`,
                and 4 where the config names none.

        Raises:
            UnsupportedModelError: if the bytes of the cache or the meaning of positions are not
                known exactly for this family.
        """
        text = config.get_text_config(decoder=True)
        if text.model_type not in VERIFIED_FAMILIES:
            raise _unsupported(f"model type {text.model_type!r} is not among the verified families")
        layers = _layers(text)
        positions = _positions(text, layers)
        declared = [reach.declared for reach in positions if reach.declared is not None]
        num_parameters, linear_parameters = _count_parameters(config, text)
        if dtype_bytes is None:
            dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
            dtype_bytes = int(getattr(dtype, "itemsize", 4))
        return cls(
            model_type=text.model_type,
            layers=layers,
            positions=positions,
            dtype_bytes=dtype_bytes,
            vocab_size=int(text.vocab_size),
            max_positions=max(declared) if declared else None,
            num_parameters=num_parameters,
            linear_parameters=linear_parameters,
        )


def _unsupported(problem: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model's cache and positions cannot be predicted exactly: {problem}",
        hint="choose a model of one of these families: " + ", ".join(sorted(VERIFIED_FAMILIES)),
    )


def _layers(text: Any) -> tuple[LayerSpec, ...]:  # noqa: ANN401 - a config of any family
    """Return one LayerSpec per layer of the cache that transformers builds for `text`."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if getattr(text, "kv_lora_rank", None):
        raise _unsupported("it caches a compressed latent (MLA)")
    cache_layers = DynamicCache(config=text).layers
    if len(cache_layers) != text.num_hidden_layers:
        raise _unsupported(
            f"found {len(cache_layers)} cache layers, expected {text.num_hidden_layers}"
        )
    head_count = int(text.num_attention_heads)
    head_width = int(text.hidden_size) // head_count
    if text.model_type not in _UNGROUPED:
        head_width = int(getattr(text, "head_dim", None) or head_width)
    kv_heads = head_count
    if text.model_type not in _UNGROUPED:
        kv_heads = int(getattr(text, "num_key_value_heads", None) or head_count)
    kv_width = kv_heads * head_width
    layers: list[LayerSpec] = []
    for layer in cache_layers:
        kind: Literal["full", "sliding"]
        window: int | None
        # Exact classes: a subclass may keep more than keys and values.
        if type(layer) is DynamicSlidingWindowLayer:
            kind, window = "sliding", int(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            kind, window = "full", None
        else:
            raise _unsupported(f"a layer keeps a {type(layer).__name__}")
        if window is not None and window < 2:
            raise _unsupported(f"a sliding window of {window} tokens")
        layers.append(LayerSpec(kind, window, kv_width, kv_width, head_count * head_width))
    return tuple(layers)


def _positions(text: Any, layers: tuple[LayerSpec, ...]) -> tuple[PositionRange, ...]:  # noqa: ANN401
    """Return the position ranges of `text`, one per group of layers that shares an encoding."""
    if text.model_type in _LEARNED_POSITIONS:
        rows = int(getattr(text, _LEARNED_POSITIONS[text.model_type]))
        return (PositionRange("all", "learned", rows, rows),)
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        raise _unsupported("its config has no rope_parameters")
    widest = max((layer.window or 0 for layer in layers), default=0)
    if any(isinstance(value, dict) for value in rope.values()):
        kinds = set(getattr(text, "layer_types", None) or rope)
        return tuple(
            _rope_range(
                text,
                parameters or {},
                group,
                window=widest if group == "sliding_attention" and widest else None,
            )
            for group, parameters in rope.items()
            if group in kinds
        )
    all_sliding = all(layer.kind == "sliding" for layer in layers)
    return (_rope_range(text, rope, "all", window=widest if all_sliding else None),)


def _rope_range(
    text: Any,  # noqa: ANN401
    rope: dict[str, Any],
    group: str,
    *,
    window: int | None,
) -> PositionRange:
    """Return the range of one RoPE: what each scaling type makes of `max_position_embeddings`."""
    longest = int(text.max_position_embeddings)
    kind = str(rope.get("rope_type") or "default")
    factor = float(rope.get("factor") or 1.0)
    original = int(
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or longest
    )
    match kind:
        case "default":
            native, declared = longest, longest
        case "linear":
            native, declared = int(longest / factor), longest
        case "llama3":
            native, declared = original, max(longest, original)
        case "yarn":
            native, declared = original, max(longest, int(original * factor))
        case "longrope":
            # Beyond this length its frequencies change, and cached keys would no longer fit them.
            native, declared = original, original
        case "dynamic":
            native, declared = longest, longest
        case _:
            raise _unsupported(f"RoPE type {kind!r} is not known")
    return PositionRange(group, kind, native, declared, window)


def _count_parameters(config: PreTrainedConfig, text: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return (all parameters, those that multiply every token), from a model on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    outside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    head = model.get_output_embeddings()
    if head is not None:
        outside |= {id(parameter) for parameter in head.parameters()}
    num_experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    active = getattr(text, "num_experts_per_tok", None)
    total = linear = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        total += count
        if id(parameter) in outside:
            continue
        if num_experts and active and ".experts." in name:
            count = count * int(active) // int(num_experts)
        linear += count
    return total, linear
