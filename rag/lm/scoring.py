"""How likely given continuations are: prompts that begin alike share one prefill, tails a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Any

from rag.lm.eight_bit_cache import new_cache
from rag.lm.engine import DocumentPrefix, ScoreRequest, Scores
from rag.lm.forward import PassStoppedError, forward, prefill_chunks
from rag.lm.kv_bytes import kv_cache_bytes, measured_kv_bytes
from rag.lm.native_cache import branch
from rag.lm.prefill import Prefill
from rag.lm.spec import CHUNK_TOKENS, ModelSpec
from rag.settings import MIB

if TYPE_CHECKING:
    from transformers import Cache

# Most tokens, padding included, that the rows of one batch hold together: a wider batch is no
# faster on a CPU, and what a pass computes beside the cache grows with it.
_BATCH_TOKENS = 2048
# Of the memory that a batch may take, the share that it may plan to fill: the rest is for what a
# pass computes on its way.
_BATCH_SHARE = 0.5
_FLOAT32_BYTES = 4


# The longest prefix that is held for the next call.
_HELD_PREFIX_BYTES = 64 * MIB


class Scorer:
    """Scores the continuations of one engine's prompts, one call at a time.

    What the prompts of a call begin with is held for the next one: a quotation asks twice or three
    times about the same passages.
    """

    def __init__(self, prefill: Prefill) -> None:
        """Take what reads prompts into caches, and knows the model's spec and the memory."""
        self._prefill = prefill
        self._held: tuple[tuple[int, ...], Cache] | None = None

    @property
    def holds_prompt(self) -> bool:
        """Whether a prompt is held for the next call."""
        return self._held is not None

    def forget(self) -> None:
        """Drop it."""
        self._held = None

    def score(
        self,
        model: Any,  # noqa: ANN401 - a causal model of transformers
        requests: Sequence[ScoreRequest],
        *,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Scores | None:
        """Return the log-likelihood, in nats, of each token of each request's continuation.

        Args:
            model: ready to run.
            requests: at least one.
            stop: looked at between the layers of a forward pass; None is returned once it is set.
            prefix: what the prompts begin with; it may be kept already.

        Raises:
            OutOfMemoryError: if memory runs out.
        """
        shared = _shared_tokens(requests)
        if prefix and prefix.num_tokens > shared:
            prefix = None
        longest = max(len(r.prompt_ids) + len(r.continuation_ids) for r in requests)
        # Of the prefix, and of a row.
        most_bytes = 2 * kv_cache_bytes(self._prefill.spec, longest)
        cache = self._read(model, requests[0].prompt_ids[:shared], most_bytes, stop, prefix)
        if cache is None:
            return None
        return _score_tails(
            model,
            self._prefill.spec,
            requests,
            cache,
            shared=shared,
            usable_bytes=self._prefill.usable_bytes(),
            stop=stop,
        )

    def _read(
        self,
        model: Any,  # noqa: ANN401
        shared_ids: tuple[int, ...],
        most_bytes: int,
        stop: Event,
        prefix: DocumentPrefix | None,
    ) -> Cache | None:
        """Return a cache of what all prompts begin with, held or computed; None if stopped."""
        if self._held and self._held[0] == shared_ids:
            return branch(self._held[1], 1)
        states = self._prefill.read(
            model, [shared_ids], most_bytes=most_bytes, stop=stop, prefix=prefix
        )
        state = None
        for _, state in states:  # noqa: B007 - the last one is wanted
            pass
        self._prefill.save()
        if state is None or state.num_tokens < len(shared_ids):
            return None
        self._held = None
        if shared_ids and kv_cache_bytes(self._prefill.spec, len(shared_ids)) <= _HELD_PREFIX_BYTES:
            self._held = (shared_ids, branch(state.cache, 1))
        return state.cache


def _shared_tokens(requests: Sequence[ScoreRequest]) -> int:
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


def _score_tails(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    requests: Sequence[ScoreRequest],
    cache: Cache,
    *,
    shared: int,
    usable_bytes: int,
    stop: Event,
) -> Scores | None:
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
        stop: looked at before each layer.

    Returns:
        What was found, and the widest batch's cache; None if it was stopped.
    """
    scores: dict[int, tuple[float, ...]] = {}
    widest = Scores(())
    rows = _rows(requests, shared)
    batches = _batches(rows, requests, spec, shared, usable_bytes)
    for batch in batches:
        own: Cache = new_cache(model, spec)
        if shared:
            is_last = batch is batches[-1]
            own = cache if is_last and len(batch) == 1 else branch(cache, len(batch))
        try:
            found = _score_batch(model, batch, requests, own, shared, stop)
        except PassStoppedError:
            return None
        scores.update(found)
        held = measured_kv_bytes(own)
        if held > widest.kv_bytes:
            widest = Scores((), len(batch), shared + len(batch[0].tail), held)
    return replace(widest, values=tuple(scores[number] for number in range(len(requests))))


@dataclass(frozen=True, slots=True)
class _Row:
    """What enters the model once for all requests, by number, whose own tails it begins with."""

    tail: tuple[int, ...]
    numbers: tuple[int, ...]


def _rows(requests: Sequence[ScoreRequest], shared: int) -> list[_Row]:
    """Return as few rows as hold every request, longest first.

    A tail that another begins with needs no row of its own: the options for the next token after
    each token of a stretch of text cost no more than the stretch.
    """
    tails = {
        number: (*request.prompt_ids[shared:], *request.continuation_ids[:-1])
        for number, request in enumerate(requests)
    }
    rows: list[_Row] = []
    # In the order of their tokens, a tail is followed by those that begin with it.
    for number in sorted(tails, key=tails.__getitem__, reverse=True):
        tail = tails[number]
        if rows and rows[-1].tail[: len(tail)] == tail:
            rows[-1] = _Row(rows[-1].tail, (*rows[-1].numbers, number))
        else:
            rows.append(_Row(tail, (number,)))
    return sorted(rows, key=lambda row: len(row.tail), reverse=True)


def _batches(
    rows: Sequence[_Row],
    requests: Sequence[ScoreRequest],
    spec: ModelSpec,
    shared: int,
    usable_bytes: int,
) -> list[list[_Row]]:
    """Return the rows that run together: near in length, within the memory."""
    batches: list[list[_Row]] = []
    for row in rows:
        if batches:
            together = [*batches[-1], row]
            padded = len(together[0].tail)
            first_scored = min(
                len(requests[number].prompt_ids) - 1 - shared
                for one in together
                for number in one.numbers
            )
            row_bytes = kv_cache_bytes(spec, shared + padded)
            row_bytes += (padded - first_scored) * spec.vocab_size * spec.dtype_bytes
            if (
                len(together) * padded <= _BATCH_TOKENS
                and len(together) * row_bytes <= _BATCH_SHARE * usable_bytes
            ):
                batches[-1] = together
                continue
        batches.append([row])
    return batches


def _score_batch(
    model: Any,  # noqa: ANN401
    batch: Sequence[_Row],
    requests: Sequence[ScoreRequest],
    cache: Cache,
    shared: int,
    stop: Event,
) -> dict[int, tuple[float, ...]]:
    import torch

    padded = len(batch[0].tail)
    rows = [[*row.tail, *[0] * (padded - len(row.tail))] for row in batch]
    # Where each request's tokens are predicted.
    places = {
        number: range(
            begin := len(requests[number].prompt_ids) - 1 - shared,
            begin + len(requests[number].continuation_ids),
        )
        for row in batch
        for number in row.numbers
    }
    scores: dict[int, list[torch.Tensor]] = {number: [] for number in places}
    for start, end in prefill_chunks(0, 0, padded, CHUNK_TOKENS[model.device.type]):
        if stop.is_set():
            raise PassStoppedError
        wanted = sorted({at for place in places.values() for at in place if start <= at < end})
        logits = forward(
            model,
            [row[start:end] for row in rows],
            cache,
            keep=[at - start for at in wanted] or None,
            stop=stop,
        )
        kept = {at: index for index, at in enumerate(wanted)}
        for index, row in enumerate(batch):
            here = {n: [at for at in places[n] if start <= at < end] for n in row.numbers}
            if not any(here.values()):
                continue
            own = logits[index].float()  # one row at a time in float32
            normaliser = own.logsumexp(-1)
            for number, ats in here.items():
                positions = torch.tensor(
                    [kept[at] for at in ats], device=own.device, dtype=torch.long
                )
                first = places[number].start
                targets = [requests[number].continuation_ids[at - first] for at in ats]
                picked = own[positions, torch.tensor(targets, device=own.device, dtype=torch.long)]
                scores[number].append(picked - normaliser[positions])
    return {number: tuple(torch.cat(parts).tolist()) for number, parts in scores.items()}
