"""A cache whose tensors never move: what a CUDA graph of one decoded token reads and writes.

A graph is a recording of kernels and of the addresses they work on. So keys and values have room
for prompt and answer from the start, the position stands in a tensor, and a step writes the new
token where that says. A layer with a window is a ring: the new token takes the place of the one
that leaves, and as a softmax does not ask for the order of its keys, nothing is moved.

Whatever the step is given, it reads all slots, so the capacity is that of this prompt and this
answer and no more: for an 8B model the slots that stay empty are 0.2% of what a step reads.

Several sequences in step are rows of the same tensors, the shorter ones padded at their front as in
the plain way. What all of them begin with stands beside their own slots, once, and is not copied:
see `rag.lm.shared_prefix`. The last of the slots stands for it then, and holds nothing.

Source: gpt-fast, and StaticCache of transformers 5.23; docs/decisions/0040.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from rag.lm.kv_bytes import STATIC_PARTS, static_capacity
from rag.lm.native_cache import GrowingLayer, OwningWindowLayer, native_cache
from rag.lm.shared_prefix import SharedPrefixCache, attend_prefix
from rag.lm.windowed_attention import EXACT_ROPES, WINDOWED_FAMILIES

ATTENTION = "fathom_static"

# Up to so many slots one product is sooner done than several and their sum.
_SLOTS_OF_ONE_PART = 1_024

# Families for which tests compare the step with the plain way. Experts are chosen by reading which
# on the host, which no graph can; the families with windows of their own are added.
STATIC_FAMILIES = (WINDOWED_FAMILIES - {"mixtral", "qwen3_moe"}) | {
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "ministral",
    "olmo3",
}


def static_refusal(config: PreTrainedConfig) -> str | None:
    """Return why the config rules a static cache out, or None.

    Args:
        config: the decoder's.
    """
    layers = native_cache(config).layers
    if any(type(layer) not in (GrowingLayer, OwningWindowLayer) for layer in layers):
        return "some of its layers keep more, or less, than keys and values of their own"
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    kinds = {parameters.get("rope_type", "default") for parameters in nested or [rope]}
    if not rope or not kinds <= EXACT_ROPES:
        return "its positions are not rotary, or turn by other angles once a text grows"
    if config.model_type not in STATIC_FAMILIES:
        return f"model type {config.model_type!r} is not among the verified families"
    return None


class StaticCache(Cache):
    """The cache of sequences in step; layers of one size share a place, which the position moves.

    The position counts what a row has of its own, padding included.
    """

    def __init__(
        self,
        layers: Sequence[StaticLayer],
        num_tokens: int,
        *,
        front_padding: Sequence[int],
        prefix_tokens: int,
    ) -> None:
        """Take layers that hold `num_tokens` tokens of each row's own; see `static_copy`."""
        super().__init__(layers=list(layers))
        self.static_layers = tuple(layers)
        self.prefix_tokens = prefix_tokens
        device = layers[0].states.device
        self.position = torch.tensor([num_tokens], device=device)
        self._shift = torch.tensor([[prefix_tokens - pad] for pad in front_padding], device=device)
        self._places = list({id(layer.place): layer.place for layer in layers}.values())

    @property
    def position_ids(self) -> Tensor:
        """Where each row's next token stands in its text, [rows, 1]; on the device."""
        return self.position + self._shift

    def point(self) -> None:
        """Let every layer write at the position, and see what is there up to it; in place."""
        for place in self._places:
            place.point(self.position)

    def used_bytes(self, num_tokens: int) -> int:
        """Return the logical bytes of the first `num_tokens` tokens of a row, as it has them alone.

        What all rows share counts as this one's too, padding does not.
        """
        return sum(
            layer.used_bytes(num_tokens - self.prefix_tokens) for layer in self.static_layers
        )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all keys and values, room included; `static_kv_bytes` of the spec."""
        return sum(
            _num_bytes(states)
            for layer in self.static_layers
            for states in (layer.states, *layer.prefix)
        )


class _Place:
    """Where the layers of one size write a token, and which of their slots hide from each row."""

    def __init__(self, num_slots: int, padding: Tensor) -> None:
        rows, device = len(padding), padding.device
        self.num_slots = num_slots
        self.parts = num_parts(num_slots, rows)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.bias = torch.zeros(rows, num_slots, device=device)  # float32, as scores are
        self._slots = torch.arange(num_slots, device=device)
        self._padding = padding

    def point(self, position: Tensor) -> None:
        self.slot.copy_(position % self.num_slots)
        # What a slot holds is the last position that came to it; before 0 there was none.
        held = position - (position - self._slots) % self.num_slots
        self.bias.zero_().masked_fill_(held < self._padding, -torch.inf)


def num_parts(num_slots: int, num_rows: int) -> int:
    """Return into how many parts `attend_one` divides the slots of so many rows."""
    if num_slots <= _SLOTS_OF_ONE_PART:
        return 1
    # Many rows occupy a GPU by themselves.
    return math.gcd(num_slots, max(1, STATIC_PARTS >> (num_rows - 1).bit_length()))


class StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, [2, rows, heads, slots, width], where they stay."""

    is_compileable = True

    def __init__(
        self,
        states: Tensor,
        window: int | None,
        place: _Place,
        prefix: tuple[Tensor, ...],
    ) -> None:
        """Take the tensors.

        Args:
            states: each row's own keys and values.
            window: the keys that a token sees, itself included.
            place: where they are written.
            prefix: keys and values that all rows begin with, [1, heads, tokens, width], if any.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.states = states
        self.keys, self.values = states
        self.prefix = prefix
        self.place = place
        self.is_sliding = window is not None
        self._kept = place.num_slots if window is None else window - 1
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the tensors are there."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Write one token a row at the place; return all slots, those that hold nothing too."""
        keys, values = self.states
        keys.index_copy_(2, self.place.slot, key_states)
        values.index_copy_(2, self.place.slot, value_states)
        return keys, values

    def write(self, heads: Tensor) -> None:
        """Write one token a row at the place, [rows, key heads and value heads, width], at once."""
        B, _, D = heads.shape
        new = heads.view(B, 2, -1, 1, D).transpose(0, 1)
        self.states.index_copy_(3, self.place.slot, new)

    def attended(self, query: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
        """Return what one query a row, [B, H, 1, D], finds in the slots and in the prefix."""
        return attend_one(
            query,
            self.states[0],
            self.states[1],
            self.place.bias,
            parts=self.place.parts,
            scale=scale,
            softcap=softcap,
            before=attend_prefix(query, *self.prefix, scale=scale) if self.prefix else None,
        )

    def used_bytes(self, num_tokens: int) -> int:
        """Return the bytes that the layer keeps of a row with `num_tokens` tokens of its own."""
        own = _num_bytes(self.states) // self.place.bias.numel()
        return own * min(num_tokens, self._kept) + sum(map(_num_bytes, self.prefix))

    def get_seq_length(self) -> int:
        """Refuse: how far it is stands in a tensor, which nobody may wait for."""
        raise RuntimeError("a static cache does not know its length on the host")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots, the first of which is slot 0."""
        return self.place.num_slots, 0

    def get_max_length(self) -> int:
        """Return the number of slots."""
        return self.place.num_slots


def static_copy(
    cache: Cache, num_new: int, *, front_padding: Sequence[int] | None = None
) -> StaticCache:
    """Return a static cache that goes on from a prefilled one, whose layers are dropped.

    Each layer is dropped once it is copied: beside the static cache, one layer is in memory twice.
    A prefix that the rows share is not copied.

    Args:
        cache: sequences in the layers of `native_cache`, or a `SharedPrefixCache`.
        num_new: tokens that there is to be room for beside those of the cache.
        front_padding: how many of the first own tokens of each row stand for nothing; by default
            there is one row, without any.
    """
    front_padding = front_padding or [0]
    prefix_tokens = cache.prefix_tokens if isinstance(cache, SharedPrefixCache) else 0
    num_tokens = cache.get_seq_length() - prefix_tokens
    capacity = static_capacity(num_tokens + num_new, has_prefix=prefix_tokens > 0)
    first: Any = cache.layers[0]
    device = (first.prefix_keys if prefix_tokens else first.keys).device
    padding = torch.tensor(front_padding, device=device)[:, None]
    places: dict[int, _Place] = {}
    layers = []
    while cache.layers:
        layer: Any = cache.layers.pop(0)
        window = int(layer.sliding_window) if isinstance(layer, OwningWindowLayer) else None
        num_slots = capacity if window is None else min(window, capacity)
        place = places.setdefault(num_slots, _Place(num_slots, padding))
        prefix = (layer.prefix_keys, layer.prefix_values) if prefix_tokens else ()
        own = (layer.keys, layer.values) if layer.is_initialized else [s[:, :, :0] for s in prefix]
        held = own[0].shape[-2]
        at = torch.arange(num_tokens - held, num_tokens, device=device) % num_slots
        layers.append(StaticLayer(_in_slots(own, at, num_slots), window, place, prefix))
    return StaticCache(layers, num_tokens, front_padding=front_padding, prefix_tokens=prefix_tokens)


def _in_slots(own: Sequence[Tensor], at: Tensor, num_slots: int) -> Tensor:
    """Return [2, rows, heads, num_slots, width], keys and values at their slots, zeros elsewhere.

    Slots that hold nothing are given no weight, and nothing times what is not a number is none.
    """
    rows, heads, _, width = own[0].shape
    found = own[0].new_zeros((2, rows, heads, num_slots, width))
    for slots, states in zip(found, own, strict=True):
        slots.index_copy_(2, at, states)
    return found


def _num_bytes(states: Tensor) -> int:
    return states.numel() * states.element_size()


# ---- attention of one token a row --------------------------------------------------------------


def _static_attention(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    fathom_static: StaticCache | None = None,
    **kwargs: Any,  # noqa: ANN401 - what other attention functions use
) -> tuple[Tensor, None]:
    """The attention of a step, as transformers calls it; `query` is [B, H, 1, D]."""
    if fathom_static is None:
        raise RuntimeError("the model is writing an answer; wait until it has")
    layer = fathom_static.static_layers[module.layer_idx]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attended(query, scale=scale, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _static_attention)


def attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    parts: int,
    scale: float,
    softcap: float | None = None,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend with one query a row to the slots it sees; every shape is known beforehand.

    Two batched products with a softmax in float32 between. The second sums over the slots, and of
    many slots a product with few rows and columns would occupy few of a GPU's processors: it is
    computed in parts, whose sums are added. What was attended to before counts as one more key: its
    score is the logarithm of the sum of the exponentials of theirs, its value what they gave
    together.

    Args:
        query: [B, H, 1, D].
        key: [B, G, S, D] with H a multiple of G; so is `value`.
        value: [B, G, S, D]; zeros in the last slot where something was attended to before.
        bias: 0 for the slots that a row sees, minus infinity for the others, float32 [B, S].
        parts: a divisor of S.
        scale: the factor of the scores.
        softcap: what the scores are bent to stay below, if anything.
        before: of `attend_prefix` with the same queries, if the rows share a prefix; the last slot
            stands for it.

    Returns:
        [B, H, 1, D].
    """
    B, H, _, D = query.shape
    _, G, S, _ = key.shape
    scores = _product(query.reshape(B * G, H // G, D), key.flatten(0, 1).mT).view(B, G, H // G, S)
    if softcap is not None:
        scores, scale = torch.tanh(scores * (scale / softcap)), softcap
    scores = torch.add(bias[:, None, None], scores, alpha=scale)
    if before is not None:
        scores[..., -1] = before[1]
    weights = scores.softmax(-1).to(value.dtype)
    each = weights.view(B * G, H // G, parts, S // parts).transpose(1, 2).flatten(0, 1)
    out = torch.bmm(each, value.view(B * G * parts, S // parts, -1))
    if parts > 1:
        out = out.view(B * G, parts, H // G, -1).sum(1)
    out = out.view(B, G, H // G, -1)
    if before is not None:
        out = torch.addcmul(out, weights[..., -1:], before[0])
    return out.view(B, H, 1, -1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched product in float32; a CPU cannot without a copy of the operands."""
    if left.dtype == torch.float32 or left.device.type == "cpu":
        return torch.bmm(left.float(), right.float())
    return torch.bmm(left, right, out_dtype=torch.float32)
