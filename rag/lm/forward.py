"""One forward pass of a transformers model: rows of tokens into the cache, logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rag.lm.prefill_cost import PREFILL_CHUNK_TOKENS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache


def forward(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    rows: Sequence[Sequence[int]],
    cache: Cache,
    *,
    keep: Sequence[int] | None = None,
) -> Tensor:
    """Put rows of one length into the cache and return logits [rows, positions kept, vocabulary].

    No attention mask is given, so a row may be padded on its right alone: no token looks ahead.

    Args:
        model: ready to run.
        rows: token ids, as many in each row.
        cache: holds as many sequences as there are rows, or none.
        keep: the positions within the rows whose logits are wanted; by default the last.
    """
    import torch

    # Entered anew for each pass: a generator must not leave it on in its caller's thread.
    with torch.inference_mode():
        device = model.device
        logits: Tensor = model(
            input_ids=torch.tensor(rows, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if keep is None else torch.tensor(keep, device=device),
        ).logits
    return logits


def prefill_chunks(start: int, boundary: int, total: int) -> Iterator[tuple[int, int]]:
    """Yield the `[start, end)` of each prefill chunk; one of them ends at the boundary."""
    while start < total:
        end = min(start + PREFILL_CHUNK_TOKENS, total)
        if start < boundary < end:
            end = boundary
        yield start, end
        start = end
