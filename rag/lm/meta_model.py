"""The real modelling code without weights: on torch's meta device, where tensors have only shapes.

It takes no memory and, for a model of any size, a few seconds.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rag.lm.layers import LayerSpec, cache_kind, query_elements, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHORT_TOKENS = 5
# More than one step of every chunked scan, and enough to leave any window behind.
_LONG_TOKENS = 70


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
        return replace(layer, kind="none", query_elements_per_token=0)

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
    queries = query_elements(config) if any(per_token) else 0
    keys, values, index = per_token
    return LayerSpec(kind, window, keys, values, queries, index, state, float32_state)
