"""A plain decoder as what it multiplies by, in the order in which a token meets it.

The order is here, once, for families whose decoder is nothing but attention with rotary positions
and a gated feed-forward layer. How to norm, multiply, add and attend is for two to say: on a CPU
`rag.lm.lean_forward`, to the last bit as transformers does; in a step that a GPU records
`rag.lm.lean_step`, in as few kernels as torch has for it.

Source: modelling code of transformers 5.23.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LeanLayer:
    """What one layer multiplies by: outputs of a tuple's linear layers stand side by side.

    `head_norms` are the weights by which each query and each key is normed, if they are.
    """

    before_attention: Tensor
    before_feed_forward: Tensor
    act: Any
    qkv: tuple[Any, ...]
    out: tuple[Any, ...]
    gate_up: tuple[Any, ...]
    down: tuple[Any, ...]
    head_norms: tuple[Tensor, Tensor] | None = None


class LeanDecoder(ABC):
    """The weights of a model in the order in which a pass needs them; they are the model's own."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        """Take the parts of a causal model of transformers, of a family that is so plain."""
        decoder = model.get_decoder()
        attention = decoder.layers[0].self_attn
        self._width = int(attention.head_dim)
        self._scale = float(attention.scaling)
        self._groups = int(attention.num_key_value_groups)
        self._kv_heads = int(attention.k_proj.out_features) // self._width
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._norm, self._eps = decoder.norm.weight, decoder.norm.variance_epsilon
        self.head = model.get_output_embeddings()
        self.layers: Sequence[LeanLayer] = [_parts(layer) for layer in decoder.layers]

    def _passed(
        self,
        layers: Sequence[LeanLayer],
        states: Tensor,
        turn: Any,  # noqa: ANN401 - what `_attended` turns heads by
        cached_layers: Sequence[Any],
    ) -> Tensor:
        """Return the states that leave some layers, in the shape of those that enter them."""
        for layer, cached in zip(layers, cached_layers, strict=True):
            heads = self._products(layer.qkv, self._normed(states, layer.before_attention))
            seen = self._attended(layer, heads, turn, cached)
            states = self._added(states, layer.out, seen)
            normed = self._normed(states, layer.before_feed_forward)
            gate, up = self._products(layer.gate_up, normed).chunk(2, -1)
            states = self._added(states, layer.down, layer.act(gate) * up)
        return states

    @abstractmethod
    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        """Return each state over its root mean square, times the weight."""

    @abstractmethod
    def _attended(
        self,
        layer: LeanLayer,
        heads: Tensor,
        turn: Any,  # noqa: ANN401
        cached: Any,  # noqa: ANN401 - a cache layer
    ) -> Tensor:
        """Turn queries and keys, cache keys and values, and return what the queries find."""

    def _added(self, states: Tensor, linears: tuple[Any, ...], inputs: Tensor) -> Tensor:
        """Return the states with the product of the inputs added."""
        return states + self._products(linears, inputs)

    def _products(self, linears: tuple[Any, ...], states: Tensor) -> Tensor:
        """Return the products of the states with all linear layers side by side."""
        if len(linears) == 1:
            found: Tensor = linears[0](states)
            return found
        return torch.cat([linear(states) for linear in linears], dim=-1)


def _parts(layer: Any) -> LeanLayer:  # noqa: ANN401 - a decoder layer of transformers
    attention, feed_forward = layer.self_attn, layer.mlp
    return LeanLayer(
        before_attention=layer.input_layernorm.weight,
        before_feed_forward=layer.post_attention_layernorm.weight,
        act=feed_forward.act_fn,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        out=(attention.o_proj,),
        gate_up=(feed_forward.gate_proj, feed_forward.up_proj),
        down=(feed_forward.down_proj,),
        head_norms=(
            (attention.q_norm.weight, attention.k_norm.weight)
            if hasattr(attention, "q_norm")
            else None
        ),
    )
