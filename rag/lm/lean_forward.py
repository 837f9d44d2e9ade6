"""A token through a plain decoder on a CPU, without what transformers does beside the arithmetic.

A small model spends a third of a decoded token in Python and in operations on a few hundred
numbers. This is the same arithmetic in the same order, on the model's own weights and cache, for
families whose decoder is nothing but attention with rotary positions and a gated feed-forward
layer; tests hold its logits equal to the model's bit for bit.

Several tokens of one answer can go through at once, and each gets the logits that it has alone: a
product is computed for all of them where that gives the same bits (`rag.lm.row_check`), else token
by token, as the attention always is.

Source: modelling code of transformers 5.23; docs/decisions/0034.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from rag.lm.grouped_attention import NAME as GROUPED
from rag.lm.lean_layers import LeanDecoder, LeanLayer
from rag.lm.native_cache import GrowingLayer

LEAN_FAMILIES = frozenset({"llama", "qwen2"})
# Those whose angles are the same for every length.
_ROPES = frozenset({"default", "linear", "llama3"})

Kind = tuple[type, int, int, bool]

_PASSES: WeakKeyDictionary[Any, LeanPass] = WeakKeyDictionary()


def use_lean_forward(model: Any) -> bool:  # noqa: ANN401 - a causal model of transformers
    """Let `lean_logits` serve this model; return whether it can.

    Args:
        model: ready to run, on a CPU with grouped attention.
    """
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if (
        text.model_type not in LEAN_FAMILIES
        or model.config._attn_implementation != GROUPED
        or rope.get("rope_type", "default") not in _ROPES
        or kinds != {"full_attention"}
    ):
        return False
    _PASSES[model] = LeanPass(model)
    return True


def lean_logits(model: Any, rows: Sequence[Sequence[int]], cache: Cache) -> Tensor | None:  # noqa: ANN401
    """Put one token a row into the cache; return logits [rows, 1, vocabulary].

    None, and nothing done, where the pass is not one that this can do.
    """
    lean = _PASSES.get(model)
    if lean is None or len(rows[0]) != 1 or not cache.get_seq_length():
        return None
    if not all(type(layer) is GrowingLayer for layer in cache.layers):
        return None
    return lean.logits(rows, cache)


def lean_pass(model: Any) -> LeanPass | None:  # noqa: ANN401
    """Return what serves a model, None if nothing does."""
    return _PASSES.get(model)


class LeanPass(LeanDecoder):
    """The pass of one token or a few of each row, to the last bit that of the model's own code.

    Up to `most_few_rows` rows are multiplied by `few_layers` and `few_head`. `alone` are the kinds
    of products whose result for a token depends on those beside it, see `kind_of`.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        """Take the parts of a model of `LEAN_FAMILIES`."""
        super().__init__(model)
        self.few_head = self.head
        self.few_layers = self.layers
        self.most_few_rows = 0
        self.alone: frozenset[Kind] = frozenset()

    def logits(self, rows: Sequence[Sequence[int]], cache: Any) -> Tensor:  # noqa: ANN401
        """Return logits [rows, tokens of a row, vocabulary]; see `lean_logits`. In inference mode.

        Each token sees what is cached and those before it, itself included.
        """
        are_few = self.most_few_rows >= len(rows)
        states = self.through(self.few_layers if are_few else self.layers, rows, cache)
        head = self.few_head if are_few else self.head
        return self._products((head,), self._normed(states, self._norm))

    def through(
        self,
        layers: Sequence[LeanLayer],
        rows: Sequence[Sequence[int]],
        cache: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return the states [rows, tokens, width] that leave some layers; in inference mode."""
        T, D = len(rows[0]), self._width
        held = cache.get_seq_length()
        states: Tensor = self._embed(torch.tensor(rows))
        cos, sin = self._rotary(states, position_ids=torch.arange(held, held + T)[None])
        # Turning takes (-second, first) times the sine; here (second, first) times (-sine, sine).
        sin = torch.cat([-sin[..., : D // 2], sin[..., D // 2 :]], dim=-1)
        return self._passed(layers, states, (cos, sin), cache.layers)

    def _attended(
        self,
        layer: LeanLayer,
        heads: Tensor,
        turn: tuple[Tensor, Tensor],
        cached: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return [B, T, H * D] of [B, T, (H + 2G) * D]; one token's queries at a time."""
        B, T, _ = heads.shape
        D = self._width
        heads = heads.view(B, T, -1, D).transpose(1, 2)
        kv_heads = self._kv_heads
        turning, (cos, sin) = heads[:, :-kv_heads], turn
        turned = turning * cos + turning.roll(D // 2, -1) * sin
        keys, values = cached.update(turned[:, -kv_heads:], heads[:, -kv_heads:])
        queries, held = turned[:, :-kv_heads], keys.shape[2] - T
        seen = [
            self._seen(queries[:, :, t], keys[:, :, :upto], values[:, :, :upto])
            for t, upto in enumerate(range(held + 1, held + T + 1))
        ]
        return _joined(seen)

    def _seen(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return [B, 1, H * D] of one token's queries [B, H, D], those of a group as rows."""
        B, kv_heads = keys.shape[:2]
        rows = queries.reshape(B, kv_heads, self._groups, self._width)
        seen = scaled_dot_product_attention(rows, keys, values, scale=self._scale)
        return seen.reshape(B, 1, -1)

    def _products(self, linears: tuple[Any, ...], states: Tensor) -> Tensor:
        if states.shape[1] == 1 or not any(kind_of(linear) in self.alone for linear in linears):
            return super()._products(linears, states)
        tokens = torch.split(states, 1, dim=1)
        return _joined([super(LeanPass, self)._products(linears, token) for token in tokens])

    def _normed(self, states: Tensor, weight: Tensor) -> Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return weight * wide.to(states.dtype)


def kind_of(linear: Any) -> Kind:  # noqa: ANN401
    """Return what decides which kernel a linear layer's product is computed by."""
    has_bias = getattr(linear, "bias", None) is not None
    return type(linear), linear.in_features, linear.out_features, has_bias


def _joined(tokens: list[Tensor]) -> Tensor:
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
