"""Tokens a second of decoding at several contexts, beside what the memory's bandwidth allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from eval.bench.decode_ways import INTEGERS, STORED, passes, weights_of
from eval.bench.machine import CLOCKS, Machine, copy_bytes_per_second, this_machine
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.native_cache import branch, native_cache
from rag.lm.prefill_rate import synthetic_cache, time_chunk
from rag.lm.spec import ModelSpec

COPIED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Decoding with `context_tokens` in the cache, by `weights` of `eval.bench.decode_ways`.

    The limit reads every weight and the cache once a token at the speed of a copy in memory.
    """

    context_tokens: int
    weights: str
    bytes_per_token: int
    tokens_per_second: float
    limit_tokens_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """What `fathom bench decode` shows, a row a context and kind of weights."""

    model: str
    dtype: str
    clock: str
    rounds: int
    machine: Machine
    copy_bytes_per_second: float
    rows: tuple[DecodeRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench decode` prints last."""
        return {"bench": "decode", **asdict(self)}


def bench_decode(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    contexts: Sequence[int],
    *,
    name: str,
    integers_bytes: int = 0,
    num_tokens: int = 8,
    rounds: int = 3,
    clock: str = "wall",
    copied_bytes: int = COPIED_BYTES,
    on_progress: Callable[[str], None] = lambda _: None,
) -> DecodeBench:
    """Decode a few tokens at each context, and measure the limit, in turn.

    The context is a synthetic cache where one can be made up, for what it holds does not matter.

    Args:
        model: ready to run.
        spec: of the model.
        contexts: tokens in the cache before decoding begins, each 1 or more.
        name: of the model.
        integers_bytes: of the whole numbers that it writes with by default, 0 for none.
        num_tokens: decoded at each context after one that warms up.
        rounds: how often all is run; medians are shown.
        clock: `wall`, or `cpu` where others have the machine for most of the time.
        copied_bytes: of the copy whose speed is the limit.
        on_progress: called with what is run next.
    """
    read_clock = CLOCKS[clock]
    caches = {context: _context(model, spec, context) for context in contexts}
    speeds: list[float] = []
    here = weights_of(model) if integers_bytes else (STORED,)
    arms = [
        (context, weights)
        for context in contexts
        for weights in here
        if weights in (STORED, INTEGERS)
    ]
    taken: dict[tuple[int, str], list[float]] = {arm: [] for arm in arms}
    for number in range(1, rounds + 1):
        on_progress(f"round {number} of {rounds}")
        speeds.append(copy_bytes_per_second(copied_bytes, model.device, clock=read_clock))
        for context, weights in arms:
            next_id = 1
            with passes(model, weights, branch(caches[context], 1)) as found:
                for step in range(1 + num_tokens):
                    begun = read_clock()
                    (next_id,) = found.read([next_id])
                    if step:
                        taken[context, weights].append(read_clock() - begun)
    bytes_per_second = median(speeds)
    return DecodeBench(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        clock=clock,
        rounds=rounds,
        machine=this_machine(model.device),
        copy_bytes_per_second=bytes_per_second,
        rows=tuple(
            _row(
                context,
                weights,
                tokens_per_second=1 / median(taken[context, weights]),
                bytes_per_token=kv_cache_bytes(spec, context)
                + (integers_bytes if weights == INTEGERS else _weight_bytes(model, spec)),
                bytes_per_second=bytes_per_second,
            )
            for context, weights in arms
        ),
    )


def card(bench: DecodeBench) -> str:
    """Return the figures for people."""
    lines = [
        f"{bench.model}, {bench.dtype}; {bench.machine.describe()}",
        f"{bench.clock} seconds, medians of {bench.rounds} rounds; a copy moves"
        f" {bench.copy_bytes_per_second / 1e9:,.1f} GB/s",
        f"{'context':>8} {'weights':>9} {'MB a token':>11} {'tokens/s':>9} {'limit':>8}"
        f" {'share':>6}",
    ]
    lines += [
        f"{row.context_tokens:>8,} {row.weights:>9} {row.bytes_per_token / 1e6:>11,.0f}"
        f" {row.tokens_per_second:>9,.1f} {row.limit_tokens_per_second:>8,.1f} {row.share:>6.0%}"
        for row in bench.rows
    ]
    return "\n".join(lines)


def _context(model: Any, spec: ModelSpec, context: int) -> Any:  # noqa: ANN401
    """Return a cache of `context` tokens, prefilled where it cannot be made up."""
    first = min(context, spec.chunk_tokens)
    cache = time_chunk(model, spec, first)[1]
    made_up = synthetic_cache(cache, spec, context, device_type=model.device.type)
    if made_up is not None:
        return made_up
    cache = native_cache(model.config)
    for start in range(0, context, spec.chunk_tokens):
        _, cache = time_chunk(model, spec, min(spec.chunk_tokens, context - start), cache)
    return cache


def _weight_bytes(model: Any, spec: ModelSpec) -> int:  # noqa: ANN401
    """Return the bytes of the stored weights that one token reads: those that multiply it."""
    head_module = model.get_output_embeddings()
    head = int(head_module.in_features * head_module.out_features)
    return (spec.linear_parameters + head) * spec.dtype_bytes


def _row(
    context: int,
    weights: str,
    *,
    tokens_per_second: float,
    bytes_per_token: int,
    bytes_per_second: float,
) -> DecodeRow:
    limit = bytes_per_second / bytes_per_token
    return DecodeRow(
        context, weights, bytes_per_token, tokens_per_second, limit, tokens_per_second / limit
    )
