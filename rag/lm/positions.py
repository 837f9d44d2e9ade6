"""Whether a context length is one that the model's position encoding was made for."""

from enum import StrEnum

from rag.lm.spec import ModelSpec, PositionRange


class PositionVerdict(StrEnum):
    """From best to worst: trained so, promised by the checkpoint, foreign, not representable."""

    NATIVE = "native"
    EXTENDED = "extended"
    OUT_OF_RANGE = "out-of-range"
    IMPOSSIBLE = "impossible"


_WORSE = tuple(PositionVerdict)


def position_verdict(spec: ModelSpec, num_tokens: int) -> PositionVerdict:
    """Return the worst verdict of any group of layers on a context of `num_tokens` tokens.

    RoPE sees distances only, so a layer with a window is judged by its window. Beyond
    `spec.max_positions` the whole model is out of range whatever its windows. `dynamic` and
    `longrope` change their frequencies with the length, which a cache filled in chunks cannot
    follow: beyond their native range they are out of range.
    """
    verdicts = [_range_verdict(reach, num_tokens) for reach in spec.positions]
    if spec.max_positions is not None and num_tokens > spec.max_positions:
        verdicts.append(PositionVerdict.OUT_OF_RANGE)
    return max(verdicts, key=_WORSE.index, default=PositionVerdict.NATIVE)


def position_limit(spec: ModelSpec) -> int | None:
    """Return the longest context, in tokens, that is native or extended; None if none is declared.

    Every shorter context is in range as well.
    """
    limits = [
        reach.declared
        for reach in spec.positions
        if reach.declared is not None and (reach.window is None or reach.window > reach.declared)
    ]
    if spec.max_positions is not None:
        limits.append(spec.max_positions)
    return min(limits, default=None)


def trained_limit(spec: ModelSpec) -> int | None:
    """Return the longest context, in tokens, that was trained without scaling; None if no end is.

    It is no longer than `position_limit`.
    """
    limits = [
        reach.native
        for reach in spec.positions
        if reach.native is not None and (reach.window is None or reach.window > reach.native)
    ]
    declared = position_limit(spec)
    return min([*limits, *([] if declared is None else [declared])], default=None)


def _range_verdict(reach: PositionRange, num_tokens: int) -> PositionVerdict:
    distance = num_tokens if reach.window is None else min(num_tokens, reach.window)
    if reach.native is None or distance <= reach.native:
        return PositionVerdict.NATIVE
    if reach.declared is not None and distance <= reach.declared:
        return PositionVerdict.EXTENDED
    if reach.hard_end:
        return PositionVerdict.IMPOSSIBLE
    return PositionVerdict.OUT_OF_RANGE
