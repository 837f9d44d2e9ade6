"""What a calibration's records show: the effective length, each task by itself, and depths."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

from eval.effective_length import Scores, estimate_length, mean_interval
from eval.synthetic import LOOKUPS, NUM_OPTIONS, SUITE_VERSION, Task
from rag.errors import ModelError
from rag.store.calibrations import DepthCell, EffectiveLength, LengthPoint

NUM_DEPTHS = 5


def judge(
    records: Sequence[Mapping[str, Any]],
    *,
    model: str,
    model_id: str,
    seed: int,
    filler: str,
    dtype: str,
    device: str,
) -> EffectiveLength:
    """Return what the records show: the effective length, each task by itself, and depths.

    Replies are what counts; where they are too poor even at the shortest length, the likeliest
    option does, which a model that cannot write the form may still find.

    Args:
        records: of one model and one suite.
        model: its name.
        model_id: what tells its weights from others.
        seed: of the run and of the bootstrap.
        filler: what the facts were hidden in.
        dtype: of the weights.
        device: that measured.

    Raises:
        ModelError: if they hold fewer than two lengths.
    """
    if len({record["tokens"] for record in records}) < 2:
        raise ModelError(
            "fewer than two lengths were measured, so none can be compared with another",
            hint="call fathom calibrate again: it goes on where it was",
        )
    scored_by, key = "replies", "score"
    estimate = estimate_length(_scores(records, LOOKUPS, key), seed=seed)
    if not estimate.is_measurable:
        options = _scores(records, LOOKUPS, "likeliest")
        if options:
            chosen = estimate_length(options, chance=1 / NUM_OPTIONS, seed=seed)
            if chosen.is_measurable:
                scored_by, key, estimate = "options", "likeliest", chosen
    lookups = _scores(records, LOOKUPS, key)
    return EffectiveLength(
        model=model,
        model_id=model_id,
        tokens=estimate.low_tokens,
        median_tokens=estimate.median_tokens,
        high_tokens=estimate.high_tokens,
        longest_tokens=estimate.longest_tokens,
        base=round(estimate.base, 4),
        floor=estimate.floor,
        scored_by=scored_by,
        points=tuple(_point(tokens, lookups[tokens], records, seed) for tokens in sorted(lookups)),
        tasks=dict(_tasks(records, key, seed)),
        attention="own",
        suite=SUITE_VERSION,
        seed=seed,
        filler=filler,
        dtype=dtype,
        device=device,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cells=tuple(_cells(records, key)),
    )


def _scores(
    records: Iterable[Mapping[str, Any]], tasks: Iterable[Task], key: str
) -> dict[int, list[list[float]]]:
    """Return for each length the scores of each haystack; without those that were not scored."""
    found: dict[int, list[list[float]]] = defaultdict(list)
    for record in records:
        rows = [row for row in record["rows"] if row["task"] in tasks and row[key] is not None]
        if rows:
            found[record["tokens"]].append([float(row[key]) for row in rows])
    return dict(found)


def _tasks(
    records: Sequence[Mapping[str, Any]], key: str, seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each task with its own base and effective length, scored as the whole is.

    A task without options, where these decide, is scored by its replies.
    """
    for task in Task:
        scores: Scores = _scores(records, {task}, key) or _scores(records, {task}, "score")
        if len(scores) < 2:
            continue
        chance = 1 / NUM_OPTIONS if key == "likeliest" else 0.0
        estimate = estimate_length(scores, chance=chance, seed=seed)
        yield task, {"base": round(estimate.base, 4), "tokens": estimate.low_tokens}


def _point(
    tokens: int, scores: Sequence[Sequence[float]], records: Sequence[Mapping[str, Any]], seed: int
) -> LengthPoint:
    mean, low, high = mean_interval(scores, seed=seed)
    here = [record for record in records if record["tokens"] == tokens]

    def middle(key: str) -> float | None:
        known = [record[key] for record in here if record[key] is not None]
        return round(median(known), 3) if known else None

    return LengthPoint(
        tokens=tokens,
        correct=round(mean, 4),
        low=round(low, 4),
        high=round(high, 4),
        num_haystacks=len(scores),
        num_questions=sum(map(len, scores)),
        prefill_seconds=middle("prefill_seconds"),
        predicted_seconds=middle("predicted_seconds"),
    )


def _cells(records: Iterable[Mapping[str, Any]], key: str) -> Iterator[DepthCell]:
    """Yield the lookups by length and depth."""
    scores: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in records:
        for row in record["rows"]:
            if row["task"] in LOOKUPS and row["depth"] is not None and row[key] is not None:
                part = min(NUM_DEPTHS - 1, int(row["depth"] * NUM_DEPTHS))
                scores[record["tokens"], part].append(float(row[key]))
    for (tokens, part), values in sorted(scores.items()):
        begin, end = part / NUM_DEPTHS, (part + 1) / NUM_DEPTHS
        yield DepthCell(tokens, begin, end, round(fmean(values), 4), len(values))
