"""Many sequences that go on from one document: its keys and values stand once, for all of them.

Each row of a batch keeps the tokens of its own, question and answer. Attention is computed in two
parts: the document with the queries of all rows folded together, and each row's own tokens. A
softmax over both is a mean of the two, weighted by the sums of their exponentials, so the parts are
joined by the logarithms of those. The document is read once a step, however many rows there are,
and nothing of it is copied.

Source: the cascade of prefix and suffix in Hydragen, arXiv:2402.05099, and FlashInfer,
arXiv:2501.01005; docs/decisions/0037.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Event
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from rag.lm.forward import allocated, forward, stoppable
from rag.lm.native_cache import native_cache
from rag.lm.spec import ModelSpec
from rag.lm.windowed_attention import attention_named, difference, probe_ids, refusal, tolerance

logger = logging.getLogger(__name__)

_ATTENTION = "fathom_shared_prefix"
# What rounding to 16 bits makes of the same attention, at most.
_FLASH_TOLERANCE = 0.02
# Queries whose scores with the document the plain attention writes out at once.
_PLAIN_QUERIES = 256
# What of the self-test's tokens is the document, and how long the two tails are.
_TEST_PREFIX = 20
_TEST_TAILS = (20, 13)

_IS_EXACT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class SharedPrefixCache(Cache):
    """The cache of several sequences that begin alike."""

    def __init__(self, prefix: Cache) -> None:
        """Begin with no token of any row's own; the tensors of `prefix` are shared, not copied.

        Args:
            prefix: one sequence, in plain layers; it may not change meanwhile.
        """
        super().__init__(layers=[_SharedPrefixLayer(layer) for layer in prefix.layers])

    @property
    def prefix_tokens(self) -> int:
        """Tokens that all rows begin with."""
        layer: Any = self.layers[0]
        return int(layer.prefix_keys.shape[-2])


class _SharedPrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Each row's own keys and values; those of the prefix, [1, G, P, D], stand beside them."""

    def __init__(self, prefix: Any) -> None:  # noqa: ANN401 - a plain layer
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix_keys: Tensor = prefix.keys
        self.prefix_values: Tensor = prefix.values

    def get_seq_length(self) -> int:
        own = super().get_seq_length()
        return int(own) + self.prefix_keys.shape[-2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]


def can_share(model: Any, spec: ModelSpec) -> bool:  # noqa: ANN401 - a causal model of transformers
    """Say whether rows can share a prefix: attention in two parts is proven on the model itself.

    The families are those of `windowed_attention`: plain softmax attention over plain layers. Two
    short tails after a prefix must then give the logits that they have alone.
    """
    if spec.kv_dtype is not None or refusal(model.config.get_text_config(decoder=True)):
        return False
    if model not in _IS_EXACT:
        _IS_EXACT[model] = _is_exact(model)
    return _IS_EXACT[model]


def forward_shared(
    model: Any,  # noqa: ANN401
    rows: Sequence[Sequence[int]],
    cache: SharedPrefixCache,
    *,
    front_padding: Sequence[int],
    stop: Event | None = None,
) -> Tensor:
    """Put rows of one length behind the shared prefix; return the logits of each, [rows, 1, V].

    Args:
        model: for which `can_share` holds.
        rows: token ids, as many in each row.
        cache: holds as many sequences as there are rows, or none but the prefix.
        front_padding: how many of the first own tokens of each sequence, those in the cache
            included, stand for nothing.
        stop: looked at before each layer.

    Raises:
        PassStoppedError: if it was stopped; what the rows hold of their own is of no use then.
        OutOfMemoryError: if the pass needs more memory than there is; the cache is of no use then.
    """
    held, new = cache.get_seq_length(), len(rows[0])
    own = held - cache.prefix_tokens

    def logits() -> Tensor:
        device = model.device
        padding = torch.tensor(front_padding, device=device)[:, None, None]
        keys = torch.arange(own + new, device=device)[None, None]
        queries = keys[:, :, own:].mT
        # Padding sees itself, so that no row of scores is empty.
        visible = (keys <= queries) & ((keys >= padding) | (keys == queries))
        positions = cache.prefix_tokens + (keys[0, :, own:] - padding[:, 0]).clamp(min=0)
        with (
            torch.inference_mode(),
            attention_named(model, _ATTENTION),
            stoppable(model, stop),
        ):
            found: Tensor = model(
                input_ids=torch.tensor(rows, device=device),
                position_ids=positions,
                attention_mask=visible[:, None],  # 4D: transformers hands it on as it is
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                fathom_shared=_Step(cache, visible),
            ).logits
        return found

    return allocated(
        logits,
        f"with {held:,} tokens in the cache of {len(rows)} sequence(s), at the next {new:,}",
    )


def forward_in_step(
    model: Any,  # noqa: ANN401
    rows: Sequence[Sequence[int]],
    cache: Cache,
    *,
    front_padding: Sequence[int],
) -> Tensor:
    """Return the logits of `forward`, or of `forward_shared` where the rows share a prefix."""
    if isinstance(cache, SharedPrefixCache):
        return forward_shared(model, rows, cache, front_padding=front_padding)
    return forward(model, rows, cache, front_padding=front_padding)


@dataclass(frozen=True, slots=True)
class _Step:
    """One forward pass: the cache, and which own tokens each query sees, bool [B, T, own]."""

    cache: SharedPrefixCache
    visible: Tensor


def _attention(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    fathom_shared: _Step | None = None,
    **kwargs: Any,  # noqa: ANN401 - what other attention functions use
) -> tuple[Tensor, None]:
    """The attention of a pass over a `SharedPrefixCache`, as transformers calls it.

    `query` is [B, H, T, D]; `key` and `value` are the rows' own, [B, G, own, D].
    """
    if fathom_shared is None:
        raise RuntimeError("the model is reading a batch; wait until it has")
    layer: Any = fathom_shared.cache.layers[module.layer_idx]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    B, H, T, D = query.shape
    G = key.shape[1]
    groups = H // G
    before, before_sum = attend_prefix(query, layer.prefix_keys, layer.prefix_values, scale=scale)
    mask = fathom_shared.visible.repeat(1, groups, 1)[:, None]  # [B, 1, groups * T, own]
    after, after_sum = attend(query.reshape(B, G, groups * T, D), key, value, mask, scale)
    # exp(a) / (exp(a) + exp(b)) of the two sums.
    share = torch.sigmoid(before_sum - after_sum)[..., None]
    out = torch.lerp(after.float(), before.float(), share).to(query.dtype)
    return out.reshape(B, H, T, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)


def attend_prefix(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to what all rows begin with, which is read once for all of them.

    Args:
        query: [B, H, T, D].
        key: [1, G, P, D] with H a multiple of G; so is `value`.
        value: [1, G, P, D].
        scale: the factor of the scores.

    Returns:
        [B, G, H / G * T, D] and the logarithms of the sums, [B, G, H / G * T], as `attend`.
    """
    B, H, T, D = query.shape
    G = key.shape[1]
    # The queries that share a key head become rows of it, and so do those of all sequences.
    folded = query.reshape(B, G, H // G * T, D).transpose(0, 1).reshape(1, G, B * H // G * T, D)
    out, sums = attend(folded, key, value, None, scale)
    return (
        out.view(G, B, H // G * T, -1).transpose(0, 1),
        sums.view(G, B, H // G * T).transpose(0, 1),
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend, and say how much there was to attend to: the only place that chooses how.

    Args:
        query: [B, G, T, D].
        key: [B, G, K, D]; so is `value`.
        value: [B, G, K, D].
        mask: who sees whom, bool [B, 1, T, K], at least one key each; None if all see all.
        scale: the factor of the scores.

    Returns:
        [B, G, T, D], and the logarithms of the sums of the exponentials of the scores, float32
        [B, G, T].
    """
    if query.device.type == "cpu":
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        # What scaled_dot_product_attention calls on a CPU; it alone gives the sums too.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = kernel(query, key, value, attn_mask=bias, scale=scale)
        return out, sums.float()
    if mask is None and _has_flash(query.device, query.dtype, query.shape[-1], value.shape[-1]):
        return _attend_flash(query, key, value, scale)
    return attend_plain(query, key, value, mask, scale)


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend in float32 by two products, some queries at a time; any device; as `attend`."""
    outs, sums = [], []
    for begin in range(0, query.shape[2], _PLAIN_QUERIES):
        part = slice(begin, begin + _PLAIN_QUERIES)
        scores = query[:, :, part].float() @ key.float().mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, part], -torch.inf)
        sums.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) @ value.float()).to(query.dtype))
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _attend_flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by the kernel that `scaled_dot_product_attention` calls on a GPU, as `attend`."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    out, sums, *_ = kernel(query, key, value, scale=scale)
    return out, sums


@lru_cache
def _has_flash(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Say whether a device has flash attention for such heads: tried, and compared, once."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if width % 8 or width != value_width:
        return False
    with torch.inference_mode():
        some = torch.Generator(device).manual_seed(1)
        shape = (3, 1, 2, 160, width)
        query, key, value = torch.randn(shape, generator=some, device=device, dtype=dtype)
        plain = attend_plain(query[:, :, :9], key, value, None, width**-0.5)
        try:
            found = _attend_flash(query[:, :, :9], key, value, width**-0.5)
            return all(
                difference(ours, theirs) <= _FLASH_TOLERANCE
                for ours, theirs in zip(found, plain, strict=True)
            )
        except RuntimeError as error:
            logger.info("no flash attention with its sums on this device: %s", error)
            return False


def _is_exact(model: Any) -> bool:  # noqa: ANN401
    """Compare the logits of two tails that share a prefix with those that each has alone."""
    ids = probe_ids(model)
    shared, longest = ids[:_TEST_PREFIX], max(_TEST_TAILS)
    tails = [ids[len(ids) - length :] for length in _TEST_TAILS]
    prefix = native_cache(model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([shared], device=model.device), past_key_values=prefix)
        alone = [
            model(
                input_ids=torch.tensor([[*shared, *tail]], device=model.device), logits_to_keep=1
            ).logits[0]
            for tail in tails
        ]
    padding = [longest - len(tail) for tail in tails]
    rows = [[0] * pad + tail for pad, tail in zip(padding, tails, strict=True)]
    try:
        found = forward_shared(model, rows, SharedPrefixCache(prefix), front_padding=padding)
    except RuntimeError:
        return False  # its layers do not hand the step on to the attention
    return all(
        difference(row, expected) <= tolerance(model)
        for row, expected in zip(found, alone, strict=True)
    )
