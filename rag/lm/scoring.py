"""How likely given continuations are: prompts that begin alike share one prefill, tails a batch."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event
from typing import TYPE_CHECKING, Any

from rag.lm.engine import ScoreRequest
from rag.lm.forward import forward, prefill_chunks
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.native_cache import branch, native_cache
from rag.lm.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import Cache

# Most tokens, padding included, that the rows of one batch hold together: a wider batch is no
# faster on a CPU, and what a pass computes beside the cache grows with it.
_BATCH_TOKENS = 2048
# Of the memory that a batch may take, the share that it may plan to fill: the rest is for what a
# pass computes on its way.
_BATCH_SHARE = 0.5
_FLOAT32_BYTES = 4


def shared_tokens(requests: Sequence[ScoreRequest]) -> int:
    """Return how many tokens all prompts begin with, the last token of each left aside.

    That one predicts the continuation's first, so it is computed with it.
    """
    prompts = [request.prompt_ids for request in requests]
    most = min(map(len, prompts)) - 1
    first = prompts[0]
    for position in range(most):
        if any(prompt[position] != first[position] for prompt in prompts):
            return position
    return most


def score_tails(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    requests: Sequence[ScoreRequest],
    cache: Cache,
    *,
    shared: int,
    usable_bytes: int,
    stop: Event,
) -> list[tuple[float, ...]] | None:
    """Score what follows the first `shared` tokens of each request, which are in `cache`.

    Rows are padded on their right, where no token of theirs looks: positions and windows are those
    of a request alone, and every kind of cache that can be copied will do.

    Args:
        model: ready to run.
        spec: its shape.
        requests: all of them begin with the same `shared` tokens.
        cache: one sequence; it is not usable afterwards.
        shared: tokens in it.
        usable_bytes: what batches may fill.
        stop: looked at before each forward pass.

    Returns:
        For each request the log-likelihood in nats of each token of its continuation; None if it
        was stopped.
    """
    scores: dict[int, tuple[float, ...]] = {}
    for batch in _batches(requests, spec, shared, usable_bytes):
        is_last = len(scores) + len(batch) == len(requests)
        own: Cache = native_cache(model.config)
        if shared:
            own = cache if is_last and len(batch) == 1 else branch(cache, len(batch))
        found = _score_batch(model, [requests[n] for n in batch], own, shared, stop)
        if found is None:
            return None
        scores.update(zip(batch, found, strict=True))
    return [scores[number] for number in range(len(requests))]


def _batches(
    requests: Sequence[ScoreRequest], spec: ModelSpec, shared: int, usable_bytes: int
) -> list[list[int]]:
    """Return the numbers of the requests that run together: near in length, within the memory."""
    lengths = [_num_tokens(request) for request in requests]
    batches: list[list[int]] = []
    for number in sorted(range(len(requests)), key=lengths.__getitem__, reverse=True):
        if batches:
            rows = [*batches[-1], number]
            padded = lengths[rows[0]] - shared
            first_scored = min(len(requests[n].prompt_ids) - 1 for n in rows) - shared
            row_bytes = kv_cache_bytes(spec, lengths[rows[0]])
            row_bytes += (padded - first_scored) * spec.vocab_size * spec.dtype_bytes
            if (
                len(rows) * padded <= _BATCH_TOKENS
                and len(rows) * row_bytes <= _BATCH_SHARE * usable_bytes
            ):
                batches[-1] = rows
                continue
        batches.append([number])
    return batches


def _num_tokens(request: ScoreRequest) -> int:
    """Return the tokens of a request that enter the model: its last one predicts nothing."""
    return len(request.prompt_ids) + len(request.continuation_ids) - 1


def _score_batch(
    model: Any,  # noqa: ANN401
    requests: Sequence[ScoreRequest],
    cache: Cache,
    shared: int,
    stop: Event,
) -> list[tuple[float, ...]] | None:
    import torch

    tails = [[*r.prompt_ids[shared:], *r.continuation_ids[:-1]] for r in requests]
    padded = max(map(len, tails))
    rows = [tail + [0] * (padded - len(tail)) for tail in tails]
    # Where each row's scored tokens are predicted.
    places = [range(len(r.prompt_ids) - 1 - shared, _num_tokens(r) - shared) for r in requests]
    scores: list[list[torch.Tensor]] = [[] for _ in requests]
    for start, end in prefill_chunks(0, 0, padded):
        if stop.is_set():
            return None
        wanted = sorted({at for place in places for at in place if start <= at < end})
        logits = forward(
            model,
            [row[start:end] for row in rows],
            cache,
            keep=[at - start for at in wanted] or None,
        )
        kept = {at: index for index, at in enumerate(wanted)}
        for row, place in enumerate(places):
            here = [at for at in place if start <= at < end]
            if not here:
                continue
            # Consecutive positions, all of them wanted: one slice of one row at a time, in float32.
            own = logits[row, kept[here[0]] : kept[here[-1]] + 1].float()
            targets = [requests[row].continuation_ids[at - place.start] for at in here]
            picked = own.gather(-1, torch.tensor(targets, device=own.device)[:, None])[:, 0]
            scores[row].append(picked - own.logsumexp(-1))
    return [tuple(torch.cat(parts).tolist()) for parts in scores]
