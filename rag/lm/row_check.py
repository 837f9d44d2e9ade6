"""Do several tokens in one product come out as each does alone, bit for bit? Tried on this machine.

A matrix product chooses its kernel by its shape. One row may be added up in another order than
eight, which in bfloat16 changes one result in some thousands by its last bit, and now and then a
word of an answer. Nothing promises which shapes that concerns, so each is tried before it is relied
on: on so many random sums that another order would show in dozens of them.

Source: docs/decisions/0034.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rag.lm.lean_forward import Kind, LeanPass, kind_of
from rag.lm.lean_layers import LeanLayer
from rag.lm.native_cache import native_cache

# Sums of each kind. Where another order was seen, one in 2,000 differed.
_SUMS = 40_000
_MOST_TRIES = 400
_CACHED_TOKENS = 32
# A pass that computes more than this share of its weights token by token saves too little.
_MOST_ALONE = 0.5


def check_rows(model: Any, lean: LeanPass, lengths: Sequence[int]) -> bool:  # noqa: ANN401
    """Set `lean.alone`; return whether passes of `lengths` tokens are exact, and worth it.

    Takes a few tenths of a second.

    Args:
        model: ready to run, on a CPU.
        lean: its lean pass.
        lengths: tokens in one pass.
    """
    generator = torch.Generator().manual_seed(0)
    kinds: dict[Kind, Any] = {}
    weights: dict[Kind, int] = {}
    for linear in _linears(lean):
        kind = kind_of(linear)
        kinds[kind] = linear
        weights[kind] = weights.get(kind, 0) + kind[1] * kind[2]
    with torch.inference_mode():
        lean.alone = frozenset(
            kind for kind, linear in kinds.items() if not _is_alike(linear, lengths, generator)
        )
        alone = sum(weights[kind] for kind in lean.alone)
        if alone > _MOST_ALONE * sum(weights.values()):
            return False
        return all(_is_exact(model, lean, way[:1], lengths, generator) for way in _ways(lean))


def _ways(lean: LeanPass) -> list[Sequence[LeanLayer]]:
    """Return the layers of a pass of many rows, and those of one of few if they are others."""
    same = lean.few_layers is lean.layers
    return [lean.layers] if same else [lean.layers, lean.few_layers]


def _linears(lean: LeanPass) -> list[Any]:
    """Return all that a pass multiplies by."""
    parts = (
        part
        for way in _ways(lean)
        for layer in way
        for part in (layer.qkv, layer.out, layer.gate_up, layer.down)
    )
    return [lean.head, lean.few_head, *(linear for part in parts for linear in part)]


def _is_alike(linear: Any, lengths: Sequence[int], generator: torch.Generator) -> bool:  # noqa: ANN401
    """Say whether every row of a product is what it is alone; all rows are one, to try it once."""
    dtype = next((p.dtype for p in linear.parameters()), torch.bfloat16)
    for _ in range(min(-(-_SUMS // linear.out_features), _MOST_TRIES)):
        row = torch.randn(1, 1, linear.in_features, generator=generator).to(dtype)
        expected = linear(row)
        for length in lengths:
            found = linear(row.repeat(1, length, 1))
            if not torch.equal(found, expected.expand_as(found)):
                return False
    return True


def _is_exact(
    model: Any,  # noqa: ANN401
    lean: LeanPass,
    layers: Sequence[LeanLayer],
    lengths: Sequence[int],
    generator: torch.Generator,
) -> bool:
    """Say the same of all that is between the products, on the layers given."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    cache: Any = native_cache(model.config)
    cache.layers = cache.layers[: len(layers)]
    drawn = torch.randint(vocabulary, (_CACHED_TOKENS + max(lengths),), generator=generator)
    before, after = drawn[:_CACHED_TOKENS].tolist(), drawn[_CACHED_TOKENS:].tolist()
    lean.through(layers, [before], cache)
    expected = torch.cat([lean.through(layers, [[token]], cache) for token in after], dim=1)
    for length in lengths:
        cache.crop(_CACHED_TOKENS - cache.get_seq_length())
        if not torch.equal(lean.through(layers, [after[:length]], cache), expected[:, :length]):
            return False
    return True
