"""Decoding several answers about one document in step on a GPU: plain, recorded, and one alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.bench.gpu_decode import OWN_CODE, step_bytes
from eval.bench.gpu_run import Run, read, some_ids
from rag.lm.kv_bytes import kv_cache_bytes

if TYPE_CHECKING:
    from rag.lm.shared_prefix import SharedPrefixCache
    from rag.lm.spec import ModelSpec

# What of each prompt comes after the document.
_TAIL_TOKENS = 64


def row_ways(num_rows: int) -> list[tuple[str, int]]:
    """Return each way with its rows: one alone, so many, and four times as many."""
    return [
        *(("recorded", 1), ("plain", num_rows), (OWN_CODE, num_rows)),
        *(("recorded", num_rows), ("recorded", 4 * num_rows)),
    ]


@dataclass(frozen=True, slots=True)
class RowsRow:
    """Greedy decoding of rows behind one document, which stands in memory once.

    The limit reads all weights and the document once a step, and each row's own tokens. `ratio` is
    the tokens a second to those of one row alone; `same_tokens` how many of the first row's first
    tokens are those that it has alone, before rounding tips the first close choice.
    """

    model: str
    way: str
    num_rows: int
    context_tokens: int
    tokens_per_second: float
    limit_tokens_per_second: float
    share: float
    ratio: float
    same_tokens: int


def bench_rows(
    run: Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    *,
    num_rows: int,
    context_tokens: int,
    num_tokens: int,
) -> list[RowsRow]:
    """Decode one row, and many in step, behind one document.

    Args:
        run: of the bench.
        name: of the model.
        model: random weights, ready to run.
        spec: its shape.
        num_rows: how many are in step.
        context_tokens: the document.
        num_tokens: how many are timed, of each row.
    """
    from rag.lm.lean_step import lean_step
    from rag.lm.native_cache import native_cache
    from rag.lm.shared_prefix import SharedPrefixCache, can_share, forward_shared
    from rag.lm.static_decode import can_decode_statically

    what = f"{name}: {num_rows} rows behind {context_tokens:,} tokens"
    if run.too_late(what):
        return []
    rows: list[RowsRow] = []
    with run.section(what):
        if not can_share(model, spec):
            run.left_out.append(f"{what}: its rows share nothing, each has a cache of its own")
            return []
        if not can_decode_statically(model, spec, "shared"):
            run.left_out.append(f"{what}: the self-test refused the static step")
            return []
        document = native_cache(model.config)
        read(model, document, some_ids(context_tokens, spec.vocab_size))
        alone: list[int] = []
        for way, count in row_ways(num_rows):
            if way == OWN_CODE and lean_step(model) is None:
                continue  # it is what `recorded` is
            if run.too_late(f"{what}: {count} {way}"):
                continue
            with run.section(f"{what}: {count} {way}"):
                tails = [
                    [(7919 * at + 101 * row) % spec.vocab_size for at in range(_TAIL_TOKENS)]
                    for row in range(count)
                ]
                cache = SharedPrefixCache(document)
                logits = forward_shared(model, tails, cache, front_padding=[0] * count)
                newest = logits[:, -1].argmax(-1).tolist()
                decode = _plain if way == "plain" else partial(_static, is_lean=way != OWN_CODE)
                seconds, found = decode(run, model, cache, newest, num_tokens)
                alone = alone or found
                differ = (
                    n for n, pair in enumerate(zip(found, alone, strict=True)) if len({*pair}) > 1
                )
                same = next(differ, len(found))
                rate = count * num_tokens / seconds
                held = context_tokens + _TAIL_TOKENS
                own = kv_cache_bytes(spec, held) - kv_cache_bytes(spec, context_tokens)
                step = step_bytes(model, spec, context_tokens) + count * own
                limit = count * run.copy_bytes_per_second / step
                ratio = rate / rows[0].tokens_per_second if rows else 1.0
                rows.append(
                    RowsRow(
                        name, way, count, context_tokens, rate, limit, rate / limit, ratio, same
                    )
                )
    return rows


def _plain(
    run: Run,
    model: Any,  # noqa: ANN401
    cache: SharedPrefixCache,
    newest: list[int],
    num_tokens: int,
) -> tuple[float, list[int]]:
    """Return the seconds of so many tokens a row, and the first row's; the first are not timed."""
    from rag.lm.shared_prefix import forward_shared
    from rag.lm.static_decode import PLAIN_STEPS

    found: list[int] = []

    def decode(times: int) -> None:
        nonlocal newest
        for _ in range(times):
            ids = [[each] for each in newest]
            logits = forward_shared(model, ids, cache, front_padding=[0] * len(ids))
            newest = logits[:, -1].argmax(-1).tolist()
            found.append(newest[0])

    decode(PLAIN_STEPS + 1)
    return run.timed(lambda: decode(num_tokens)), found


def _static(
    run: Run,
    model: Any,  # noqa: ANN401
    cache: SharedPrefixCache,
    newest: list[int],
    num_tokens: int,
    *,
    is_lean: bool,
) -> tuple[float, list[int]]:
    """As `_plain`; in the steps that are not timed the step is recorded."""
    from rag.lm.static_decode import PLAIN_STEPS, StaticDecoder

    decoder = StaticDecoder(
        model,
        cache,
        newest,
        max_new_tokens=PLAIN_STEPS + 2 + num_tokens,
        front_padding=[0] * len(newest),
        is_lean=is_lean,
    )
    found: list[int] = []

    def decode(times: int) -> None:
        found.extend(decoder.next_ids()[0] for _ in range(times))

    with closing(decoder):
        decode(PLAIN_STEPS + 1)
        seconds = run.timed(lambda: decode(num_tokens))
        if run.device.type == "cuda" and not decoder.is_recorded:
            raise RuntimeError("the step was not recorded; the log says why")
    return seconds, found


def lines(rows: Sequence[RowsRow]) -> list[str]:
    """Return the figures for people."""
    if not rows:
        return []
    return [
        "",
        f"{'rows in step':<16} {'way':<18} {'rows':>5} {'document':>9} {'tokens/s':>9} {'limit':>9}"
        f" {'share':>6} {'ratio':>6} {'same':>5}",
        *(
            f"{row.model:<16} {row.way:<18} {row.num_rows:>5} {row.context_tokens:>9,}"
            f" {row.tokens_per_second:>9,.1f} {row.limit_tokens_per_second:>9,.1f}"
            f" {row.share:>6.0%} {row.ratio:>6.2f} {row.same_tokens:>5}"
            for row in rows
        ),
    ]
