"""Several prompts answered in step: how many at once, read how, and each one's steps.

Prompts that begin with one document share its keys and values where the model allows it
(`rag.lm.shared_prefix`); others have a cache each, joined for the answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from threading import Event
from typing import Any

from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.engine import DocumentPrefix, GenerationDone, GenerationStep, PrefillProgress, Prompt
from rag.lm.forward import PassStoppedError, allocated
from rag.lm.generation import Row, decode
from rag.lm.integer_decoder import AnswerPasses
from rag.lm.kv_bytes import kv_cache_bytes, room_bytes, static_capacity, static_kv_bytes
from rag.lm.native_cache import merge
from rag.lm.partial_attention import PLAIN_QUERIES
from rag.lm.peak_bytes import peak_bytes
from rag.lm.prefill import Prefill, Prefilled
from rag.lm.prefill_rate import PrefillClock
from rag.lm.shared_prefix import SharedPrefixCache, can_share, forward_shared
from rag.lm.spec import LayerSpec, ModelSpec
from rag.lm.static_decode import PLAIN_STEPS, Rows, StaticDecoder, can_decode_statically, in_place

# Most answers written in step: beyond, a row more costs a CPU nearly what it costs alone.
MOST_ROWS = 32
_FLOAT32_BYTES = 4
_NO_STATIC_STEP = "no recorded step: this model has none that was found to give the same"


def joined_batch_bytes(spec: ModelSpec, num_rows: int, num_tokens: int) -> int:
    """Return the most bytes, beside the weights, of rows with a cache each of `num_tokens` tokens.

    While the caches are joined each stands in memory twice, and then has room for the next tokens.
    After that a step takes for each row what a prefill of one token does.
    """
    one_step = peak_bytes(spec, num_tokens, chunk_tokens=1)
    passes = max(peak_bytes(spec, num_tokens), num_rows * one_step)
    caches = min(num_rows, 2) * kv_cache_bytes(spec, num_tokens) + room_bytes(spec, num_tokens)
    return num_rows * caches + passes


def shared_batch_bytes(
    spec: ModelSpec, num_rows: int, num_tokens: int, *, shared_tokens: int
) -> int:
    """Return the most bytes, beside the weights, of rows that share their first tokens' cache.

    That stands once, and each row's own tokens, padded to the longest and with the room of a static
    cache, beside it. A pass computes as many tokens as a prefill's chunk; to that comes for each
    row its logits, its own keys or values while they grow or are copied, and its own part of the
    attention in float32.
    """
    caches = static_kv_bytes(spec, num_tokens, num_rows=num_rows, shared_tokens=shared_tokens)
    num_own = static_capacity(num_tokens - shared_tokens, has_prefix=True)
    chunk = max(num_rows, spec.chunk_tokens)
    layers = [
        num_rows * num_own * layer.elements_per_token * spec.dtype_bytes
        + _own_attention_bytes(spec, layer, num_rows, num_own, chunk)
        + 4 * chunk * layer.query_elements_per_token * _FLOAT32_BYTES
        for layer in spec.layers
    ]
    logits = num_rows * spec.vocab_size * (spec.dtype_bytes + _FLOAT32_BYTES)
    return caches + peak_bytes(spec, num_tokens) + max(layers) + logits


def _own_attention_bytes(
    spec: ModelSpec, layer: LayerSpec, num_rows: int, num_own: int, chunk: int
) -> int:
    """Return what the rows' attention to their own tokens takes, beside what it gives.

    The queries that share a key head are rows of it, and each has its mask: as booleans, those that
    are hidden, and in numbers. A GPU has no kernel for it that gives the sums, so that there are
    two products in float32: keys or values, and three times the scores, of some queries at a time.
    """
    if not layer.key_elements_per_token:
        return 0
    groups = layer.query_elements_per_token // layer.key_elements_per_token
    taken = chunk * groups * num_own * (spec.dtype_bytes + 2)
    if spec.device_type == "cuda":
        num_queries = min(PLAIN_QUERIES, max(1, chunk // num_rows) * groups)
        scores = 3 * layer.key_elements_per_token // layer.head_width * num_queries
        taken += num_rows * num_own * (scores + layer.key_elements_per_token) * _FLOAT32_BYTES
    return taken


def batches(
    prompts: Sequence[Sequence[int]], batch_bytes: Callable[[int, int], int], *, usable_bytes: int
) -> list[list[int]]:
    """Return the numbers of the prompts that are answered in step, the longest first.

    A batch has the memory for all its rows, as long as the longest of them may become; a single
    prompt is a batch whatever it takes.

    Args:
        prompts: their token ids.
        batch_bytes: returns what so many rows take, the longest prompt of which has so many tokens.
        usable_bytes: what there is.
    """
    by_length = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    found: list[list[int]] = []
    for number in by_length:
        if found:
            rows, longest = len(found[-1]) + 1, len(prompts[found[-1][0]])
            if rows <= MOST_ROWS and batch_bytes(rows, longest) <= usable_bytes:
                found[-1].append(number)
                continue
        found.append([number])
    return found


class BatchGeneration:
    """Answers prompts with one loaded model, one batch after the other."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a causal model of transformers
        prefill: Prefill,
        tokenizer: ChatTokenizer,
        clock: PrefillClock,
        *,
        max_new_tokens: int,
        stop: Event,
        decodes_statically: bool = False,
    ) -> None:
        """Take what all batches have in common.

        Args:
            model: ready to run.
            prefill: reads prompts into caches; knows the model's spec and the memory.
            tokenizer: turns tokens into text, and knows which end an answer.
            clock: learns from prompts that are read alone.
            max_new_tokens: the longest answer.
            stop: looked at between the layers of a prefill, and between tokens.
            decodes_statically: answers are written by a `StaticDecoder` where the model's can be.
        """
        self._model, self._prefill, self._tokenizer, self._clock = model, prefill, tokenizer, clock
        self._spec = prefill.spec
        self._max_new_tokens, self._stop = max_new_tokens, stop
        # The step has to be recorded before it is sooner.
        self._decodes_statically = decodes_statically and max_new_tokens > PLAIN_STEPS + 1

    def answer(
        self, prompts: Sequence[Prompt], prefix: DocumentPrefix | None
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Yield the number of a prompt and a step of it, its GenerationDone last.

        Raises:
            OutOfMemoryError: if memory runs out; every prompt not yet done is lost.
        """
        all_ids = [prompt.ids for prompt in prompts]
        is_shared = len(prompts) > 1 and prefix and _begin_alike(all_ids, prefix.num_tokens)
        if is_shared and prefix and can_share(self._model, self._spec):
            yield from self._answer_shared(all_ids, prefix)
            return

        def batch_bytes(num_rows: int, num_tokens: int) -> int:
            return joined_batch_bytes(self._spec, num_rows, num_tokens + self._max_new_tokens)

        for batch in batches(all_ids, batch_bytes, usable_bytes=self._prefill.usable_bytes()):
            yield from self._answer_joined(batch, [all_ids[n] for n in batch], prefix)

    # ---- a cache each ---------------------------------------------------------------------------

    def _answer_joined(
        self,
        numbers: Sequence[int],
        all_ids: Sequence[Sequence[int]],
        prefix: DocumentPrefix | None,
    ) -> Iterator[tuple[int, GenerationStep]]:
        longest = max(map(len, all_ids)) + self._max_new_tokens
        rows: dict[int, Row] = {}
        states = self._prefill.read(
            self._model,
            all_ids,
            most_bytes=joined_batch_bytes(self._spec, len(numbers), longest),
            stop=self._stop,
            prefix=prefix,
        )
        for index, state in states:
            number, total = numbers[index], len(all_ids[index])
            if number not in rows:
                rows[number] = Row(number, all_ids[index], state, self._tokenizer.stream())
            else:
                yield number, PrefillProgress(state.num_tokens, total)
        ready = [row for row in rows.values() if row.state.num_tokens == row.prompt_tokens]
        for row in ready:
            self._clock.observe(
                row.prompt_tokens, row.state.seconds, cached_tokens=row.state.reused_tokens
            )
        if ready:
            longest = max(row.state.num_tokens for row in ready)
            for row in ready:
                row.padding = longest - row.state.num_tokens
            cache = allocated(
                lambda: merge([row.state.cache for row in ready]),
                f"where the caches of {len(ready)} sequences were joined",
            )
            for row in ready:
                if len(ready) > 1:  # joined: what a row held alone is no longer needed
                    row.state.cache.layers.clear()
            yield from self._decoded(ready, cache, "joined" if len(ready) > 1 else "one")
        for number, ids in zip(numbers, all_ids, strict=True):
            if number not in rows:  # the stop came before it
                yield number, _not_begun(len(ids))
            elif rows[number] not in ready:
                yield number, rows[number].stopped_early()

    # ---- one document for all -------------------------------------------------------------------

    def _answer_shared(
        self, all_ids: Sequence[Sequence[int]], prefix: DocumentPrefix
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Read the document once, then the rest of the prompts, batch by batch, behind it."""
        shared = prefix.num_tokens

        def batch_bytes(num_rows: int, num_tokens: int) -> int:
            return shared_batch_bytes(
                self._spec, num_rows, num_tokens + self._max_new_tokens, shared_tokens=shared
            )

        usable_bytes = self._prefill.usable_bytes()
        numbered = batches(all_ids, batch_bytes, usable_bytes=usable_bytes)
        first = numbered[0][0]
        states = self._prefill.read(
            self._model,
            [all_ids[first][:shared]],
            most_bytes=max(batch_bytes(len(b), len(all_ids[b[0]])) for b in numbered),
            stop=self._stop,
            prefix=prefix,
        )
        document: Prefilled | None = None
        for _, document in states:
            yield first, PrefillProgress(document.num_tokens, len(all_ids[first]))
        if document and document.num_tokens == shared:
            self._clock.observe(shared, document.seconds, cached_tokens=document.reused_tokens)
        for batch in numbered:
            if document is None or document.num_tokens < shared or self._stop.is_set():
                yield from self._stopped(batch, first, document, all_ids)
                continue
            rows = []
            for number in batch:
                state = Prefilled(document.cache, shared, shared)
                if number == first:  # it alone has paid for the document
                    state = replace(document)
                rows.append(Row(number, all_ids[number], state, self._tokenizer.stream()))
            yield from self._answer_behind(rows, [all_ids[n][shared:] for n in batch])

    def _stopped(
        self,
        batch: Sequence[int],
        first: int,
        document: Prefilled | None,
        all_ids: Sequence[Sequence[int]],
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Say of prompts that nothing of their own was read."""
        for number in batch:
            total = len(all_ids[number])
            if number == first and document:
                row = Row(number, all_ids[number], document, self._tokenizer.stream())
                yield number, row.stopped_early()
            else:
                yield number, _not_begun(total)

    def _answer_behind(
        self, rows: Sequence[Row], tails: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Read what of each prompt comes after the document, all in step, and write the answers.

        Shorter ones are padded at their front. The seconds of a pass are shared among its rows.
        """
        shared, document = rows[0].state.num_tokens, rows[0].state.cache
        cache = SharedPrefixCache(document)
        longest = max(map(len, tails))
        for row, tail in zip(rows, tails, strict=True):
            row.padding, row.state.cache = longest - len(tail), cache
        padded = [[0] * row.padding + list(tail) for row, tail in zip(rows, tails, strict=True)]
        paddings = [row.padding for row in rows]
        step = max(1, self._spec.chunk_tokens // len(rows))
        for begin in range(0, longest, step):
            if self._stop.is_set():
                break
            end = min(begin + step, longest)
            begun = time.perf_counter()
            try:
                logits = forward_shared(
                    self._model,
                    [row[begin:end] for row in padded],
                    cache,
                    front_padding=paddings,
                    stop=self._stop,
                )
            except PassStoppedError:
                for row in rows:  # of the document nothing is lost
                    row.state.cache, row.state.num_tokens, row.padding = document, shared, 0
                break
            next_ids = logits[:, -1].argmax(-1).tolist()  # waits for the GPU
            seconds = (time.perf_counter() - begun) / len(rows)
            for row, next_id in zip(rows, next_ids, strict=True):
                row.state.next_id = next_id
                row.state.seconds += seconds
                row.state.num_tokens = shared + max(0, end - row.padding)
        if rows[0].state.num_tokens < rows[0].prompt_tokens:
            for row in rows:
                yield row.number, row.stopped_early()
            return
        for row in rows:
            yield row.number, PrefillProgress(row.state.num_tokens, row.prompt_tokens)
        yield from self._decoded(rows, cache, "shared")

    # ---- the answers ----------------------------------------------------------------------------

    def _decoded(
        self,
        rows: Sequence[Row],
        cache: Any,  # noqa: ANN401
        kind: Rows,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Write on from prompts that were read, by a decoder of its own where there is one."""
        is_static = self._decodes_statically and can_decode_statically(
            self._model, self._spec, kind
        )
        if not is_static:
            refused = _NO_STATIC_STEP if self._decodes_statically else ""
            if kind == "one":
                passes = AnswerPasses(
                    self._model,
                    cache,
                    max_new_tokens=self._max_new_tokens,
                    free_bytes=self._prefill.usable_bytes(),
                )
                with closing(passes):
                    yield from self._written(rows, passes, refused=refused)
            else:
                yield from self._written(rows, cache, refused=refused)
            return
        begun = time.perf_counter()
        first_ids = [row.state.next_id or 0 for row in rows]
        decoder = allocated(
            lambda: StaticDecoder(
                self._model,
                in_place(self._model, self._spec, cache) if kind == "one" else cache,
                first_ids,
                max_new_tokens=self._max_new_tokens,
                front_padding=[row.padding for row in rows],
            ),
            f"where a cache of {rows[0].prompt_tokens:,} tokens was copied",
        )
        for row in rows:
            row.decode_seconds += time.perf_counter() - begun
        with closing(decoder):
            yield from self._written(rows, decoder)

    def _written(
        self,
        rows: Sequence[Row],
        cache: Any,  # noqa: ANN401
        *,
        refused: str = "",
    ) -> Iterator[tuple[int, GenerationStep]]:
        return decode(
            self._model,
            rows,
            cache,
            end_ids=self._tokenizer.end_ids(self._model),
            max_new_tokens=self._max_new_tokens,
            stop=self._stop,
            refused=refused,
        )


def _not_begun(prompt_tokens: int) -> GenerationDone:
    return GenerationDone(prompt_tokens, 0, 0, 0, 0, 0.0, 0.0, stopped=True)


def _begin_alike(all_ids: Sequence[Sequence[int]], num_tokens: int) -> bool:
    first = tuple(all_ids[0][:num_tokens])
    return all(tuple(ids[:num_tokens]) == first for ids in all_ids)
