"""How far a model has read, and how long it goes on, for people who wait."""

from datetime import timedelta

from rag.lm.engine import PrefillProgress

_SECONDS_UNTOLD = 5.0  # of reading, until it is known how long the rest takes


class Reading:
    """One reading, at the pace that it has had."""

    def __init__(self) -> None:
        """Begin with the first thing that is read."""
        self._first: tuple[float, int] | None = None

    def seconds_left(self, event: PrefillProgress, now: float) -> float | None:
        """Return how long it goes on; None until some seconds were measured."""
        begun, before = self._first = self._first or (now, event.done)
        if now - begun < _SECONDS_UNTOLD or event.done == before:
            return None
        return (now - begun) * (event.total - event.done) / (event.done - before)

    def words(self, event: PrefillProgress, now: float) -> str:
        """Return the state in words."""
        words = f"Reading: {event.done:,} of {event.total:,} tokens"
        left = self.seconds_left(event, now)
        return words if left is None else f"{words}, about {timedelta(seconds=round(left))} left"
