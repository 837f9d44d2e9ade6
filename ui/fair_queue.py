"""Whose turn it is at the model: one request at a time, its seconds shared out among the owners.

Requests of one owner are answered in the order they came. Between owners, the next ticket is of the
one who has had the model for the fewest seconds since the queue was last empty: thirty requests of
one, or long ones, keep another waiting for no more than the one that is running. Who comes anew
starts level with the one that is running, so that nobody saves up turns.

Source: Goyal, Vin and Cheng, "Start-time Fair Queueing", 1996; here the cost of a request is known
when it ends, and until then is taken to be the usual one.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Condition, Event
from types import TracebackType

from rag.errors import QuotaError

MAX_WAITING = 128
MAX_WAITING_EACH = 32
_POLL_SECONDS = 0.25  # between two looks at whether a request was called off
_USUAL_WEIGHT = 0.2  # of the newest request in the usual cost of one


@dataclass(frozen=True, slots=True)
class Waiting:
    """The place of a request in the queue: 1 is next, once the one that is running has ended."""

    place: int


class FairQueue:
    """The requests that wait for the model, and the one that has it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: list[Ticket] = []  # in the order they came
        self._running: Ticket | None = None
        self._seconds: dict[str, float] = {}  # that each owner has had, since nobody was here
        self._usual_seconds = 1.0

    def join(self, owner: str) -> "Ticket":
        """Return a place in the queue; it is given up by leaving its `with` block.

        Raises:
            QuotaError: if too many wait already.
        """
        with self._changed:
            own = sum(ticket.owner == owner for ticket in self._waiting)
            if own >= MAX_WAITING_EACH or len(self._waiting) >= MAX_WAITING:
                whose = "of yours" if own >= MAX_WAITING_EACH else "in all"
                raise QuotaError(
                    f"{own if whose == 'of yours' else len(self._waiting)} questions {whose} wait"
                    " for the model already",
                    hint="try again when some of them are answered",
                )
            if not any(ticket.owner == owner for ticket in self._present()):
                self._seconds[owner] = max(self._level(), self._seconds.get(owner, 0.0))
            ticket = Ticket(self, owner)
            self._waiting.append(ticket)
            self._call_next()
            return ticket

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        with self._changed:
            return len(self._waiting)

    @property
    def is_running(self) -> bool:
        """Whether a request has the model."""
        with self._changed:
            return self._running is not None

    def _present(self) -> "list[Ticket]":
        """Return the requests that are here, running or waiting."""
        return self._waiting if self._running is None else [self._running, *self._waiting]

    def _level(self) -> float:
        """Return the seconds that a newcomer is taken to have had: no turns are saved up."""
        if self._running is not None:
            return self._seconds[self._running.owner] - self._running.charged_seconds
        return min((self._seconds[ticket.owner] for ticket in self._waiting), default=0.0)

    def _order(self) -> "list[Ticket]":
        """Return the waiting requests in the order they will be called, as far as is known now."""
        seconds = dict(self._seconds)
        rest, order = list(self._waiting), []
        while rest:
            ticket = min(
                rest, key=lambda ticket: seconds[ticket.owner]
            )  # the first to come among equals
            seconds[ticket.owner] += self._usual_seconds
            rest.remove(ticket)
            order.append(ticket)
        return order

    def _call_next(self) -> None:
        if self._running is None and self._waiting:
            ticket = self._order()[0]
            self._waiting.remove(ticket)
            self._running = ticket
            ticket.begun = time.monotonic()
            ticket.charged_seconds = self._usual_seconds
            self._seconds[ticket.owner] += self._usual_seconds
        self._changed.notify_all()

    def _leave(self, ticket: "Ticket") -> None:
        with self._changed:
            if ticket is self._running:
                seconds = time.monotonic() - ticket.begun
                self._running = None
                self._seconds[ticket.owner] += seconds - ticket.charged_seconds
                self._usual_seconds += _USUAL_WEIGHT * (seconds - self._usual_seconds)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            if not self._present():
                self._seconds.clear()
            self._call_next()

    def _place(self, ticket: "Ticket", seconds: float) -> int:
        """Return the request's place, 0 if it has the model, after a change or some seconds."""
        with self._changed:
            if ticket is not self._running:
                self._changed.wait(seconds)
            return 0 if ticket is self._running else self._order().index(ticket) + 1


class Ticket:
    """A request's place in the queue."""

    def __init__(self, queue: FairQueue, owner: str) -> None:
        self._queue = queue
        self.owner = owner
        self.begun = 0.0
        self.charged_seconds = 0.0

    def wait(self, stop: Event) -> Iterator[Waiting]:
        """Yield the place whenever it changes, until the request has the model or `stop` is set."""
        shown = 0
        while not stop.is_set():
            place = self._queue._place(self, _POLL_SECONDS if shown else 0.0)
            if place == 0:
                return
            if place != shown:
                shown = place
                yield Waiting(place)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue._leave(self)
