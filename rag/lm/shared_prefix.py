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

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from rag.lm.agreement import difference, tolerance
from rag.lm.forward import allocated, forward, stoppable
from rag.lm.native_cache import native_cache
from rag.lm.partial_attention import Part, attend, join
from rag.lm.spec import ModelSpec
from rag.lm.windowed_attention import attention_named, probe_ids, refusal

_ATTENTION = "fathom_shared_prefix"
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
    before = attend_prefix(query, layer.prefix_keys, layer.prefix_values, scale=scale)
    mask = fathom_shared.visible.repeat(1, groups, 1)[:, None]  # [B, 1, groups * T, own]
    after = attend(query.reshape(B, G, groups * T, D), key, value, mask, scale=scale)
    return join(before, after).reshape(B, H, T, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)


def attend_prefix(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Part:
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
    out, sums = attend(folded, key, value, scale=scale)
    return (
        out.view(G, B, H // G * T, -1).transpose(0, 1),
        sums.view(G, B, H // G * T).transpose(0, 1),
    )


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
