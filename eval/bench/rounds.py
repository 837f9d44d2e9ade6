"""Ours and its peers in turn, round after round in one run: CPU and wall-clock seconds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one piece of work took: on the clock, and of all this process's threads together."""

    wall: float
    cpu: float


Rounds = Mapping[str, Sequence[Seconds]]  # arm -> a measurement a round


def seconds_of(work: Callable[[], object]) -> Seconds:
    """Return what `work` takes."""
    wall, cpu = perf_counter(), process_time()
    work()
    return Seconds(perf_counter() - wall, process_time() - cpu)


def in_turn(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Rounds:
    """Run every arm once a round; whatever disturbs a machine disturbs neighbours alike."""
    found: dict[str, list[Seconds]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, work in arms.items():
            on_progress(f"round {number + 1} of {rounds}: {name}")
            found[name].append(seconds_of(work))
    return found


def middle(rounds: Rounds, arm: str) -> Seconds:
    """Return an arm's medians."""
    return Seconds(median(s.wall for s in rounds[arm]), median(s.cpu for s in rounds[arm]))


def ratio(rounds: Rounds, peer: str, ours: str) -> Seconds:
    """Return the peer's seconds to ours: the median of the ratios of each round."""
    pairs = list(zip(rounds[peer], rounds[ours], strict=True))
    return Seconds(
        median(theirs.wall / own.wall for theirs, own in pairs),
        median(theirs.cpu / own.cpu for theirs, own in pairs),
    )
