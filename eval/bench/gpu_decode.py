"""Decoding one answer on a GPU: transformers, the plain way, and the recorded step, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.bench.gpu_run import Run, read, some_ids
from rag.lm.kv_bytes import kv_cache_bytes

if TYPE_CHECKING:
    from rag.lm.spec import ModelSpec

# The goal is one in which the step is recorded; `called` is its plain twin. They are the lean step
# where a model has one, and then its own code is recorded beside it.
OWN_CODE = "own code recorded"
STATIC_WAYS = ("called", OWN_CODE, "recorded", "compiled and recorded")


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Greedy decoding at one context; the limit reads all weights and the cache once a token.

    `way` is `transformers` with a cache of its own, `plain` as it was before the step was recorded,
    or one of `STATIC_WAYS`. `ratio` is the seconds of transformers to its own; `same_tokens` how
    many of the first tokens are those of transformers, before rounding tips the first close choice.
    """

    model: str
    way: str
    context_tokens: int
    tokens_per_second: float
    limit_tokens_per_second: float
    share: float
    ratio: float
    same_tokens: int


def bench_decode(
    run: Run,
    name: str,
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    *,
    context_tokens: int,
    num_tokens: int,
    compiler: str,
) -> list[DecodeRow]:
    """Decode after one prompt in every way.

    Args:
        run: of the bench.
        name: of the model.
        model: random weights, ready to run.
        spec: its shape.
        context_tokens: the prompt.
        num_tokens: how many are timed.
        compiler: torch's backend for the compiled step.
    """
    import torch
    from transformers import DynamicCache

    from rag.lm.lean_step import STEP_FAMILIES, lean_step
    from rag.lm.native_cache import native_cache
    from rag.lm.static_decode import can_decode_statically, in_place

    what = f"{name}: decode at {context_tokens:,} tokens"
    if run.too_late(what):
        return []
    limit = run.copy_bytes_per_second / step_bytes(model, spec, context_tokens)
    ids = some_ids(context_tokens, spec.vocab_size)
    new_caches: dict[str, Callable[[], Any]] = {
        "transformers": lambda: DynamicCache(config=model.config),
        "plain": lambda: native_cache(model.config),
    }
    rows: list[DecodeRow] = []
    expected: list[int] = []

    def add(way: str, seconds: float, found: list[int]) -> None:
        expected[:] = expected or found
        same = next(
            (n for n, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1),
            len(found),
        )
        rate = num_tokens / seconds
        ratio = rate / rows[0].tokens_per_second if rows else 1.0
        rows.append(DecodeRow(name, way, context_tokens, rate, limit, rate / limit, ratio, same))

    for way, new_cache in new_caches.items():
        with run.section(f"{what}, {way}"):
            add(way, *_plain(run, model, new_cache(), ids, num_tokens))
    if len(rows) < len(new_caches):
        return rows  # without the first there is nothing to compare with
    with run.section(f"{name}: the static step's self-test"):
        if not can_decode_statically(model, spec):
            run.left_out.append(f"{what}, {', '.join(STATIC_WAYS)}: the self-test refused them")
            return rows
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=compiler)
        options: Sequence[dict[str, Any]] = (
            {"records": False},
            {"is_lean": False},
            {},
            {"wrap": compiled},
        )
        if lean_step(model) is None and spec.model_type in STEP_FAMILIES:
            run.left_out.append(
                f"{what}, lean: refused, the log says why; the rest is its own code"
            )
        for way, of_way in zip(STATIC_WAYS, options, strict=True):
            if way == OWN_CODE and lean_step(model) is None:
                continue  # it is what `recorded` is
            if run.too_late(f"{what}, {way}"):
                continue
            with run.section(f"{what}, {way}"):
                cache = native_cache(model.config)
                first_id = read(model, cache, ids)
                started = in_place(model, spec, cache)
                add(way, *_static(run, model, started, first_id, num_tokens, **of_way))
    return rows


def step_bytes(model: Any, spec: ModelSpec, context_tokens: int) -> int:  # noqa: ANN401
    """Return what one token has to read: the weights that multiply it, and the cache."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    table = model.get_input_embeddings().weight
    if table is not model.get_output_embeddings().weight:  # a lookup reads one row of it
        held -= table.numel() * table.element_size()
    return int(held) + kv_cache_bytes(spec, context_tokens)


def _plain(
    run: Run,
    model: Any,  # noqa: ANN401
    cache: Any,  # noqa: ANN401
    ids: Sequence[int],
    num_tokens: int,
) -> tuple[float, list[int]]:
    """Return the seconds of so many tokens, and the tokens; the first few are not timed."""
    from rag.lm.static_decode import PLAIN_STEPS

    newest = read(model, cache, ids)
    found: list[int] = []

    def decode(times: int) -> None:
        nonlocal newest
        for _ in range(times):
            newest = read(model, cache, [newest])
            found.append(newest)

    decode(PLAIN_STEPS + 1)
    return run.timed(lambda: decode(num_tokens)), found


def _static(
    run: Run,
    model: Any,  # noqa: ANN401
    cache: Any,  # noqa: ANN401
    first_id: int,
    num_tokens: int,
    **options: Any,  # noqa: ANN401
) -> tuple[float, list[int]]:
    """As `_plain`; in the steps that are not timed the step is compiled and recorded."""
    from rag.lm.static_decode import PLAIN_STEPS, StaticDecoder

    decoder = StaticDecoder(
        model, cache, [first_id], max_new_tokens=PLAIN_STEPS + 2 + num_tokens, **options
    )
    with closing(decoder):
        found = [decoder.next_ids()[0] for _ in range(PLAIN_STEPS + 1)]
        seconds = run.timed(lambda: found.extend(decoder.next_ids()[0] for _ in range(num_tokens)))
        is_to_be_recorded = options.get("records", True) and run.device.type == "cuda"
        if is_to_be_recorded and not decoder.is_recorded:
            raise RuntimeError("the step was not recorded; the log says why")
    return seconds, found


def lines(rows: Sequence[DecodeRow]) -> list[str]:
    """Return the figures for people."""
    if not rows:
        return []
    return [
        "",
        f"{'decode':<16} {'way':<22} {'context':>8} {'tokens/s':>9} {'limit':>9} {'share':>6}"
        f" {'ratio':>6} {'same':>5}",
        *(
            f"{row.model:<16} {row.way:<22} {row.context_tokens:>8,}"
            f" {row.tokens_per_second:>9,.1f} {row.limit_tokens_per_second:>9,.1f}"
            f" {row.share:>6.0%} {row.ratio:>6.2f} {row.same_tokens:>5}"
            for row in rows
        ),
    ]
