"""Greedy decoding: one answer, or several in step, each ending in its own time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from rag.lm.chat_tokenizer import TextStream
from rag.lm.engine import GenerationDone, GenerationStep, TextPiece
from rag.lm.integer_decoder import AnswerPasses
from rag.lm.kv_bytes import measured_row_bytes
from rag.lm.native_cache import select
from rag.lm.prefill import Prefilled
from rag.lm.prompt_lookup import NO_DRAFTS, PromptLookup
from rag.lm.shared_prefix import forward_in_step
from rag.lm.static_decode import StaticDecoder
from rag.types import Decoding, DecodingWay

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(slots=True, eq=False)
class Row:
    """One answer being written: its prompt's state, and what was written so far.

    `padding` is how many tokens of the batch's cache before its own stand for nothing;
    `decode_seconds` are those of every pass it took part in, in company or alone.
    """

    number: int
    prompt_ids: Sequence[int]
    state: Prefilled
    text: TextStream
    new_tokens: int = 0
    decode_seconds: float = 0.0
    padding: int = field(default=0, init=False)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.prompt_ids)

    def stopped_early(self) -> GenerationDone:
        """Return the last step of an answer whose prompt was not read to its end."""
        held = measured_row_bytes(self.state.cache, self.padding)
        return self.done(kv_tokens=self.state.num_tokens, kv_bytes=held, stopped=True)

    def done(
        self,
        *,
        kv_tokens: int,
        kv_bytes: int,
        stopped: bool = False,
        is_cut_off: bool = False,
        decoding: Decoding | None = None,
    ) -> GenerationDone:
        """Return the last step of this answer."""
        return GenerationDone(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.state.reused_tokens,
            new_tokens=self.new_tokens,
            kv_tokens=kv_tokens,
            kv_bytes=kv_bytes,
            prefill_seconds=self.state.load_seconds + self.state.seconds,
            decode_seconds=self.decode_seconds,
            stopped=stopped,
            is_cut_off=is_cut_off,
            decoding=decoding,
        )


def decode(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    rows: Sequence[Row],
    cache: Cache | StaticDecoder | AnswerPasses,
    *,
    end_ids: frozenset[int],
    max_new_tokens: int,
    stop: Event,
    refused: str = "",
) -> Iterator[tuple[int, GenerationStep]]:
    """Write on from prefilled prompts, all rows in step, until each has ended.

    Shorter rows are padded at their front, where a mask hides it: each keeps its own positions, and
    its windows hold its own tokens. A row writes what it would alone, as far as rounding goes: a
    batch adds up in another order, which in 16 bits can tip a close choice. The bytes of a row are
    those of its own tokens, a prefix that it shares included, its padding not.

    One row alone is written several tokens a pass where it copies, see `rag.lm.prompt_lookup`.

    Args:
        model: ready to run.
        rows: their prompts are read, and their padding is known.
        cache: of all of them, in their order; a `SharedPrefixCache` where they share one, or what
            writes on from its own; of one row the passes that read it.
        end_ids: the tokens that end an answer.
        max_new_tokens: the longest answer.
        stop: looked at before each token that is shown.
        refused: which faster way was wanted and not taken, for the receipt.

    Yields:
        Each row's number with its text pieces and, last, its GenerationDone.

    Raises:
        OutOfMemoryError: if memory runs out; every row not yet done is lost.
    """
    active = list(rows)
    lookup = None
    if isinstance(cache, AnswerPasses):
        lookup = PromptLookup(cache, rows[0].prompt_ids)
    while True:
        ended: set[int] = set()
        for row in active:
            row.new_tokens += 1
            is_end = row.state.next_id in end_ids
            assert row.state.next_id is not None  # a prompt has a token, and it was computed
            if not is_end and (piece := row.text.push(row.state.next_id)):
                yield row.number, TextPiece(piece)
            is_full = not is_end and row.new_tokens == max_new_tokens
            if is_end or is_full or stop.is_set():
                if piece := row.text.flush():
                    yield row.number, TextPiece(piece)
                if lookup is not None:
                    lookup.take_back()
                kv_tokens, kv_bytes = _held(cache, row)
                yield (
                    row.number,
                    row.done(
                        kv_tokens=kv_tokens,
                        kv_bytes=kv_bytes,
                        stopped=not is_end and not is_full,
                        is_cut_off=is_full,
                        decoding=_decoding(cache, lookup, len(rows), refused),
                    ),
                )
                ended.add(row.number)
        if ended:
            left = [index for index, row in enumerate(active) if row.number not in ended]
            active = [active[index] for index in left]
            if not active:
                return
            if isinstance(cache, StaticDecoder):
                cache.select(left)
            elif not isinstance(cache, AnswerPasses):
                select(cache, left)
        begun = time.perf_counter()
        if lookup is not None:
            newest, most = active[0].state.next_id or 0, max_new_tokens - active[0].new_tokens
            next_ids = [lookup.next_id(newest, most=most)]
        elif isinstance(cache, StaticDecoder):
            next_ids = cache.next_ids()
        else:
            next_ids = _next_ids(model, active, cache)
        seconds = time.perf_counter() - begun
        for row, next_id in zip(active, next_ids, strict=True):
            row.state.next_id = next_id
            row.decode_seconds += seconds


def _next_ids(model: Any, rows: Sequence[Row], cache: Any) -> list[int]:  # noqa: ANN401
    """Return the likeliest next token of each row; waits for the GPU."""
    newest = [[row.state.next_id or 0] for row in rows]
    padding = [row.padding for row in rows]
    logits = forward_in_step(model, newest, cache, front_padding=padding)
    found: list[int] = logits[:, -1].argmax(-1).tolist()
    return found


def _decoding(
    cache: Cache | StaticDecoder | AnswerPasses,
    lookup: PromptLookup | None,
    num_rows: int,
    refused: str,
) -> Decoding:
    """Return how rows were written so far."""
    if isinstance(cache, StaticDecoder):
        way = DecodingWay.RECORDED if cache.is_recorded else DecodingWay.STATIC
        return Decoding(way, num_rows)
    if lookup is None:
        return Decoding(DecodingWay.PLAIN, num_rows, refused=refused)
    way = DecodingWay.DRAFTS if lookup.drafted else DecodingWay.PLAIN
    if isinstance(cache, AnswerPasses):
        way = DecodingWay.INTEGERS if cache.has_integers else way
        refused = refused or cache.refused
    return Decoding(
        way,
        num_rows,
        drafted=lookup.drafted,
        accepted=lookup.accepted,
        refused=NO_DRAFTS if lookup.refused else refused,
    )


def _held(cache: Cache | StaticDecoder | AnswerPasses, row: Row) -> tuple[int, int]:
    """Return the tokens and the logical bytes that the cache holds of a row."""
    if isinstance(cache, StaticDecoder):
        return cache.num_tokens - row.padding, cache.kv_bytes(row.padding)
    if isinstance(cache, AnswerPasses):
        return cache.held()
    return cache.get_seq_length() - row.padding, measured_row_bytes(cache, row.padding)
