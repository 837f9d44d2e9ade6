"""The real modelling code without weights: on torch's meta device, where tensors have only shapes.

It takes no memory and, for a model of any size, a few seconds.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rag.lm.layers import LayerSpec, cache_kind, head_width, query_elements, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHORT_TOKENS = 5
# More than one step of every chunked scan, and enough to leave any window behind.
_LONG_TOKENS = 70

_DELTA_BLOCK_TOKENS = 64

# Families whose one head of keys is broadcast, which no fused kernel takes.
_UNFUSED = frozenset({"falcon"})

# Where configs keep the heads, and the widths of dense and of routed feed-forward layers.
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_FEED_FORWARD = (
    "intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
)
_ROUTED_FEED_FORWARD = ("moe_intermediate_size", "expert_ffn_hidden_size")


@dataclass(frozen=True, slots=True)
class Activations:
    """The widths of what a forward pass computes, in elements of one token.

    `feed_forward_elements` is what the widest feed-forward layer holds at once, `scan_elements`
    what the update of a recurrent state does.
    `has_fused_attention` says that scores are never held; `repeats_heads` that keys and values of
    grouped heads are copied to all of them; `needs_no_mask` that a chunk may go to a kernel which
    makes neither mask nor such copies.
    """

    hidden_size: int = 0
    num_heads: int = 0
    feed_forward_elements: int = 0
    scan_elements: int = 0
    has_fused_attention: bool = True
    repeats_heads: bool = False
    needs_no_mask: bool = False


def build_meta_model(config: PreTrainedConfig) -> Any:  # noqa: ANN401
    """Return the causal language model of `config` on the meta device, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            deepcopy(config),  # it would note the dtype in the config
            dtype=torch.bfloat16,
        )
    return model.eval()


def count_parameters(model: Any, text: PreTrainedConfig) -> tuple[int, int]:  # noqa: ANN401
    """Return (all parameters, those that multiply every token) of a model.

    The latter leave out embeddings and the output head, and count active experts only.
    """
    import torch

    outside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    head = model.get_output_embeddings()
    if head is not None:
        outside |= {id(parameter) for parameter in head.parameters()}
    num_experts = next(
        (
            count
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (count := getattr(text, name, None))
        ),
        None,
    )
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


def read_activations(model: Any, text: PreTrainedConfig) -> Activations:  # noqa: ANN401
    """Return the widths of a model's forward pass, from its config and the built model."""
    from rag.lm.grouped_attention import needs_no_mask

    hidden = int(model.get_input_embeddings().embedding_dim)
    heads = max(_first(layer, _HEADS) for layer in text.per_layer_config)
    kv_heads = {
        _first(layer, ("num_key_value_heads", "num_kv_heads")) or heads
        for layer in text.per_layer_config
    }
    experts = _first(text, ("num_experts_per_tok", "moe_topk", "top_k_experts"))
    width = _first(text, _FEED_FORWARD) or 4 * hidden
    routed = _first(text, _ROUTED_FEED_FORWARD) or width
    dense = 3 * width
    return Activations(
        hidden_size=hidden,
        num_heads=heads,
        feed_forward_elements=max(dense, experts * (3 * routed + 2 * hidden)),
        scan_elements=_scan_elements(text),
        has_fused_attention=model.config._attn_implementation == "sdpa"
        and text.model_type not in _UNFUSED
        and not getattr(text, "kv_lora_rank", None),
        repeats_heads=any(1 < count < heads for count in kv_heads),
        needs_no_mask=needs_no_mask(model),
    )


def measured_layers(model: Any, text: PreTrainedConfig) -> tuple[LayerSpec, ...] | None:  # noqa: ANN401
    """Return what each layer caches, read from the tensors of two runs of different length.

    Each run prefills all tokens but one and decodes the last. The longer one leaves every window
    behind.

    Args:
        model: on the meta device, in bfloat16.
        text: its decoder's config.

    Returns:
        One LayerSpec per layer; None where the modelling code does not run without real values.

    Raises:
        UnsupportedModelError: if a layer keeps what the cache classes do not explain, or the two
            lengths contradict each other.
    """
    from transformers import DynamicCache

    windows = [
        int(layer.sliding_window)
        for layer in DynamicCache(config=text).layers
        if hasattr(layer, "sliding_window")
    ]
    runs = []
    for num_tokens in (_SHORT_TOKENS, max([_LONG_TOKENS, *(window + 5 for window in windows)])):
        cache = _run(model, text, num_tokens)
        if cache is None:
            return None
        pairs = zip(cache.layers, text.per_layer_config, strict=True)
        runs.append(tuple(_read(layer, config, num_tokens) for layer, config in pairs))
    if runs[0] != runs[1]:
        raise unsupported("what it caches does not grow in proportion to its tokens")
    return runs[0]


def same_cache(left: tuple[LayerSpec, ...], right: tuple[LayerSpec, ...]) -> bool:
    """Return whether two descriptions of a cache hold the same elements, whatever their names."""

    def held(layer: LayerSpec) -> LayerSpec:
        return replace(layer, kind="none", query_elements_per_token=0, head_width=0)

    return list(map(held, left)) == list(map(held, right))


def _run(model: Any, text: PreTrainedConfig, num_tokens: int) -> Any:  # noqa: ANN401
    """Return the cache of a run over `num_tokens` tokens, or None if the code needs real values."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=text)
    try:
        with torch.device("meta"), torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start, stop in ((0, num_tokens - 1), (num_tokens - 1, num_tokens)):
                model(
                    input_ids=torch.zeros((1, stop - start), dtype=torch.long),
                    position_ids=torch.arange(start, stop)[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
    except Exception:  # whatever the code of some family does without real values
        return None
    return cache


def _read(cache: Any, config: Any, num_tokens: int) -> LayerSpec:  # noqa: ANN401
    """Return the spec that explains the tensors of one cache layer after `num_tokens` tokens."""
    kind, window = cache_kind(cache, None)
    kept = num_tokens if window is None else min(num_tokens, window - 1)
    per_token = [0, 0, 0]
    for index, name in enumerate(("keys", "values", "indexer_keys")):
        tensor = getattr(cache, name, None)
        if tensor is not None:
            per_token[index], rest = divmod(int(tensor.numel()), kept)
            if rest or (tensor.numel() and tensor.element_size() != 2):
                raise unsupported(f"{name} of {tuple(tensor.shape)} after {num_tokens} tokens")
    state = float32_state = 0
    for name in ("conv_states", "recurrent_states"):
        for tensor in (getattr(cache, name, None) or {}).values():
            if tensor is None:
                continue
            if tensor.element_size() == 2:
                state += int(tensor.numel())
            else:
                float32_state += int(tensor.numel())
    queries, width = (query_elements(config), head_width(config)) if any(per_token) else (0, 0)
    keys, values, index = per_token
    return LayerSpec(kind, window, keys, values, queries, index, state, float32_state, width)


def _first(config: Any, names: tuple[str, ...]) -> int:  # noqa: ANN401
    """Return the largest value under these names; a config may keep one per layer."""
    found = [0]
    for name in names:
        value = getattr(config, name, None)
        values = value if isinstance(value, list) else [value]
        found += [item for item in values if isinstance(item, int)]
    return max(found)


def _scan_elements(text: Any) -> int:  # noqa: ANN401
    """Return what the plain code of a recurrent layer holds of one token, in elements of float32.

    A gated delta rule works in blocks of 64 tokens, with one decay a head or, in Kimi's, one a
    channel; a scan of Mamba-2 multiplies each token of a block with each other, for every head and
    state; one of Mamba-1 keeps every state of a token.
    """
    if heads := _first(text, ("linear_num_value_heads",)):
        return 8 * heads * max(_DELTA_BLOCK_TOKENS, _first(text, ("linear_value_head_dim",)))
    if heads := _first(text, ("linear_num_heads",)):
        return 4 * heads * _DELTA_BLOCK_TOKENS * _first(text, ("linear_head_dim",))
    states = _first(text, ("mamba_d_state", "ssm_state_size"))
    if heads := _first(text, ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")):
        return heads * states * _first(text, ("mamba_chunk_size", "chunk_size"))
    return 4 * states * _first(text, ("mamba_expand",)) * _first(text, ("hidden_size",))
