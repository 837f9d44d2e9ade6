"""Predicted beside measured prefill seconds, and what of the machine's ceiling they reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from eval.bench.decode_quality import DecodeQuality, describe_quality
from eval.bench.machine import CLOCKS, Clock, Machine, matmul_flops_per_second, this_machine
from rag.lm.prefill_cost import PrefillRate, prefill_seconds, prefill_work
from rag.lm.prefill_rate import measure_rate, time_chunk
from rag.lm.spec import ModelSpec

# A question on a document whose cache is kept.
QUESTION_TOKENS = 32
_CEILING_SIDE = 2048


@dataclass(frozen=True, slots=True)
class Seconds:
    """Medians over the rounds; `error` is predicted to measured, less one."""

    predicted: float
    measured: float
    error: float


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prefill of `num_tokens`, and `question`: 32 tokens more, when those are cached.

    `ceiling_share` is the share of the matrix-product ceiling that the prefill's operations reach.
    """

    num_tokens: int
    prefill: Seconds
    question: Seconds
    tokens_per_second: float
    ceiling_share: float


@dataclass(frozen=True, slots=True)
class PrefillBench:
    """What `fathom bench prefill` shows, a row a length.

    `quality` is what reading so does to answers, where that was asked for.
    """

    model: str
    dtype: str
    clock: str
    rounds: int
    machine: Machine
    calibration_seconds: float
    matmul_flops_per_second: float
    rows: tuple[PrefillRow, ...]
    quality: DecodeQuality | None = None

    @property
    def largest_error(self) -> float:
        """The largest error of a prefill's prediction, whichever its sign."""
        return max(abs(row.prefill.error) for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench prefill` prints last."""
        return {"bench": "prefill", **asdict(self), "largest_error": self.largest_error}


@dataclass(frozen=True, slots=True)
class _Round:
    rate: PrefillRate
    calibration_seconds: float
    ceiling: float
    prefill: dict[int, float]
    question: dict[int, float]


def bench_prefill(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    lengths: Sequence[int],
    *,
    name: str,
    rounds: int = 3,
    clock: str = "wall",
    on_progress: Callable[[str], None] = lambda _: None,
) -> PrefillBench:
    """Calibrate, then prefill the longest length in chunks; each round predicts before it runs.

    A shorter length is the beginning of the longest: its seconds are those until then.

    Args:
        model: ready to run.
        spec: of the model.
        lengths: in tokens, multiples of the prefill chunk.
        name: of the model.
        rounds: how often all is run; medians are shown.
        clock: `wall`, or `cpu` where others have the machine for most of the time.
        on_progress: called with what is run next.

    Raises:
        ValueError: if a length is no multiple of the chunk.
    """
    lengths = sorted(set(lengths))
    if not lengths or any(n < 1 or n % spec.chunk_tokens for n in lengths):
        raise ValueError(f"lengths are {lengths}; expected multiples of {spec.chunk_tokens}")
    done = []
    for number in range(1, rounds + 1):
        on_progress(f"round {number} of {rounds}")
        done.append(_run_round(model, spec, lengths, CLOCKS[clock]))
    return PrefillBench(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        clock=clock,
        rounds=rounds,
        machine=this_machine(model.device),
        calibration_seconds=median(r.calibration_seconds for r in done),
        matmul_flops_per_second=median(r.ceiling for r in done),
        rows=tuple(_row(spec, num_tokens, done) for num_tokens in lengths),
    )


def card(bench: PrefillBench) -> str:
    """Return the figures for people."""
    lines = [
        f"{bench.model}, {bench.dtype}; {bench.machine.describe()}",
        f"{bench.clock} seconds, medians of {bench.rounds} rounds; calibration"
        f" {bench.calibration_seconds:.1f} s; matrix products reach"
        f" {bench.matmul_flops_per_second / 1e9:,.0f} GFLOP/s",
        f"{'tokens':>7} {'predicted':>10} {'measured':>9} {'error':>7} {'tokens/s':>9}"
        f" {'of ceiling':>10}   {QUESTION_TOKENS} more on these: predicted, measured, error",
    ]
    for row in bench.rows:
        prefill, question = row.prefill, row.question
        lines.append(
            f"{row.num_tokens:>7,} {prefill.predicted:>10.2f} {prefill.measured:>9.2f}"
            f" {prefill.error:>+7.1%} {row.tokens_per_second:>9,.0f} {row.ceiling_share:>10.0%}"
            f"   {question.predicted:>33.3f} {question.measured:>9.3f} {question.error:>+6.1%}"
        )
    lines.append(f"largest error of a prefill: {bench.largest_error:.1%}")
    if bench.quality is not None:
        lines += describe_quality(bench.quality)
    return "\n".join(lines)


def _run_round(
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    lengths: Sequence[int],
    clock: Clock,
) -> _Round:
    begun = clock()
    rate = measure_rate(model, spec, clock=clock)
    calibration_seconds = clock() - begun
    ceiling = matmul_flops_per_second(_CEILING_SIDE, model.dtype, model.device, clock=clock)
    cache = None
    so_far = 0.0
    prefill, question = {}, {}
    for start in range(0, lengths[-1], spec.chunk_tokens):
        seconds, cache = time_chunk(model, spec, spec.chunk_tokens, cache, clock=clock)
        so_far += seconds
        end = start + spec.chunk_tokens
        if end in lengths:
            prefill[end] = so_far
            question[end] = median(
                time_chunk(model, spec, QUESTION_TOKENS, cache, clock=clock)[0] for _ in range(3)
            )
    return _Round(rate, calibration_seconds, ceiling, prefill, question)


def _row(spec: ModelSpec, num_tokens: int, rounds: Sequence[_Round]) -> PrefillRow:
    flops = prefill_work(spec, num_tokens).flops
    asked = num_tokens + QUESTION_TOKENS
    prefill = [(prefill_seconds(spec, r.rate, num_tokens), r.prefill[num_tokens]) for r in rounds]
    question = [
        (
            prefill_seconds(spec, r.rate, asked, cached_tokens=num_tokens),
            r.question[num_tokens],
        )
        for r in rounds
    ]
    return PrefillRow(
        num_tokens=num_tokens,
        prefill=_medians(prefill),
        question=_medians(question),
        tokens_per_second=num_tokens / median(measured for _, measured in prefill),
        ceiling_share=median(flops / r.prefill[num_tokens] / r.ceiling for r in rounds),
    )


def _medians(pairs: Sequence[tuple[float, float]]) -> Seconds:
    predicted, measured = (median(pair[side] for pair in pairs) for side in (0, 1))
    return Seconds(predicted, measured, predicted / measured - 1)
