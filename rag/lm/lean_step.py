"""The step that a GPU records, in as few kernels as torch has for it: 19 operations a layer.

A kernel on a few thousand numbers takes two microseconds however little it does, and a decoder
layer written plainly has forty of them. Here queries, keys and values are one product and so are
the two of the feed-forward layer; norms are torch's fused one; queries and keys are turned in two
kernels, and the values go along, turned by nothing, so that one writes both to the cache; a product
is added to the residual as it is computed.

The weights that are multiplied at once must lie one after the other. They are put so once, and the
model's own become views of them: there is no second copy.

The numbers are rounded at fewer places than by the modelling code, and so are near, not equal:
`rag.lm.static_decode` tries them on the model itself. On a CPU the same step is the plain twin.

Source: docs/decisions/0040; that the operations are one kernel each on a GPU: torch 2.13,
aten/src/ATen/native/cuda (`_fused_rms_norm`, and `addmm_` which copies nothing).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Linear, Parameter
from torch.nn.functional import rms_norm

from rag.lm.lean_layers import LeanDecoder, LeanLayer
from rag.lm.static_cache import StaticCache, StaticLayer

logger = logging.getLogger(__name__)

# Decoders with the same arithmetic. Their windows, if they have any, are the cache's.
STEP_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})

Turn = tuple[Tensor, Tensor]

_STEPS: WeakKeyDictionary[Any, LeanStep | None] = WeakKeyDictionary()


def lean_step(model: Any) -> LeanStep | None:  # noqa: ANN401 - a causal model of transformers
    """Return what computes the step of a model, None if nothing but its own code does.

    The first time, weights are put one after the other: so many bytes as the feed-forward layer's
    first product has are there twice for a moment.

    Args:
        model: ready to run, on a GPU; elsewhere for tests.
    """
    if model not in _STEPS:
        _STEPS[model] = None
        if _is_plain(model):
            try:
                _STEPS[model] = LeanStep(model)
            except (RuntimeError, MemoryError) as error:  # no memory for two; what is done may stay
                logger.warning("the step of decoding is the model's own code: %s", error)
    return _STEPS[model]


def give_up_lean_step(model: Any) -> None:  # noqa: ANN401
    """Let the model's own code compute its steps from now on."""
    _STEPS[model] = None


class LeanStep(LeanDecoder):
    """One token a row through a model and a `StaticCache`."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        """Put the weights of a model that `_is_plain` one after the other."""
        super().__init__(model)
        self.layers = [_merged_layer(layer) for layer in self.layers]
        # What turns nothing: the first half of a head is the first half of it, and so the second.
        still = torch.eye(2, dtype=model.dtype, device=model.device)[:, None, :, None]
        self._still = still.expand(2, self._kv_heads, 2, self._width // 2)

    def logits(self, token: Tensor, cache: StaticCache) -> Tensor:
        """Return logits [rows, vocabulary] of the next token.

        Args:
            token: [rows, 1], on the device.
            cache: pointed at where it goes.
        """
        states: Tensor = self._embed(token[:, 0])
        turn = self._turn(*self._rotary(states, position_ids=cache.position_ids))
        states = self._passed(self.layers, states, turn, cache.static_layers)
        found: Tensor = self.head(self._normed(states, self._norm))
        return found

    def _turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """Return what the first half of each head is multiplied by, and the second: to be added.

        Of [rows, 1, D] both [rows, heads, 2, D / 2], the parts that go into the halves of what is
        turned; those of values turn nothing.
        """
        (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, -1), sin.chunk(2, -1)
        rows, num_turned = len(cos), (self._groups + 1) * self._kv_heads
        by_first, by_second = (
            torch.cat(
                (
                    torch.stack(parts, dim=2).expand(-1, num_turned, -1, -1),
                    still.expand(rows, -1, -1, -1),
                ),
                dim=1,
            )
            for parts, still in zip(((cos_1, sin_2), (-sin_1, cos_2)), self._still, strict=True)
        )
        return by_first, by_second

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(states, weight.shape, weight, self._eps)

    def _attended(
        self,
        layer: LeanLayer,
        heads: Tensor,
        turn: Turn,
        cached: StaticLayer,
    ) -> Tensor:
        """Return what queries find, [rows, H * D], of [rows, (H + 2G) * D]."""
        rows, num_kv = len(heads), 2 * self._kv_heads
        heads = heads.view(rows, -1, self._width)
        if layer.head_norms is not None:
            heads = self._heads_normed(heads, *layer.head_norms)
        halves = heads.view(rows, -1, 2, self._width // 2)
        turned = torch.addcmul(halves[:, :, :1] * turn[0], halves[:, :, 1:], turn[1]).flatten(2)
        cached.write(turned[:, -num_kv:])
        return cached.attended(turned[:, :-num_kv, None], scale=self._scale).reshape(rows, -1)

    def _heads_normed(self, heads: Tensor, by_query: Tensor, by_key: Tensor) -> Tensor:
        sizes = [self._groups * self._kv_heads, self._kv_heads, self._kv_heads]
        query, key, value = torch.split(heads, sizes, dim=1)
        return torch.cat((self._normed(query, by_query), self._normed(key, by_key), value), dim=1)

    def _added(self, states: Tensor, linears: tuple[Any, ...], inputs: Tensor) -> Tensor:
        """Add in place: the states are the step's own."""
        for linear in linears:
            states.addmm_(inputs, linear.weight.t())
            if linear.bias is not None:
                states.add_(linear.bias)
        return states


# ---- weights one after the other ---------------------------------------------------------------


def _is_plain(model: Any) -> bool:  # noqa: ANN401
    """Say whether a model's layers are of such a family, and nothing was done to them.

    Layers that are quantised, adapted, spread over devices or shared are left alone.
    """
    if model.config.get_text_config(decoder=True).model_type not in STEP_FAMILIES:
        return False
    norms: list[Any] = [model.get_decoder().norm]
    linears: list[Any] = []
    for layer in model.get_decoder().layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [
            getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)
        ]
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj]
    tensors = [part.weight for part in (*norms, *linears)]
    return (
        all(type(linear) is Linear for linear in linears)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (*norms, *linears))
        and all(type(tensor) is Parameter for tensor in tensors)
        and {(tensor.dtype, tensor.device) for tensor in tensors} == {(model.dtype, model.device)}
        and len({id(tensor) for tensor in tensors}) == len(tensors)
    )


def _merged_layer(layer: LeanLayer) -> LeanLayer:
    merged = replace(layer, qkv=(_merged(layer.qkv),), gate_up=(_merged(layer.gate_up),))
    if layer.before_attention.is_cuda:
        torch.cuda.empty_cache()  # pieces that were freed are too small for what is merged next
    return merged


def _merged(linears: Sequence[Linear]) -> Linear:
    """Return one linear layer that gives what several do; their weights become views of its."""
    first = linears[0]
    sizes = [linear.out_features for linear in linears]
    names = ("weight",) if first.bias is None else ("weight", "bias")
    merged = Linear(first.in_features, sum(sizes), bias=first.bias is not None, device="meta")
    with torch.no_grad():
        for name in names:
            joined = torch.cat([getattr(linear, name).detach() for linear in linears])
            setattr(merged, name, Parameter(joined, requires_grad=False))
            for linear, part in zip(linears, torch.split(joined, sizes), strict=True):
                getattr(linear, name).data = part
    return merged
