"""An answer while it is written: its events as HTML, as often as a person can follow."""

import time
from collections.abc import Iterator
from datetime import timedelta

from rag.answering.service import AnswerEvent, AnswerReady, QuestionRewritten, RouteChosen
from rag.lm.engine import PrefillProgress, TextPiece
from ui.answer_html import ROUTE_NAMES, asked_as_html
from ui.fair_queue import Waiting
from ui.formatting import plain_html

_SECONDS_BETWEEN = 0.05  # of two pictures
_SECONDS_UNTOLD = 5.0  # of reading, until it is known how long the rest takes


def paced(events: Iterator[Waiting | AnswerEvent]) -> Iterator[str | AnswerReady]:
    """Yield the card of an answer as it grows, then the event that ends it."""
    written: list[str] = []
    asked_as, status, last = "", "", 0.0
    reading = _Reading()
    for event in events:
        if isinstance(event, AnswerReady):
            yield event
            return
        if isinstance(event, Waiting):
            status = status_html(f"Waiting for the model, place {event.place}")
        elif isinstance(event, QuestionRewritten):
            asked_as = asked_as_html(event.question)
        elif isinstance(event, RouteChosen):
            written.clear()
            reading = _Reading()
            status = status_html(f"{ROUTE_NAMES[event.decision.route]}: reading {event.read}")
        elif isinstance(event, PrefillProgress):
            status = status_html(reading.words(event, time.monotonic()))
        elif isinstance(event, TextPiece):
            written.append(event.text)
        now = time.monotonic()
        if isinstance(event, RouteChosen) or now - last >= _SECONDS_BETWEEN:
            last = now
            text = "".join(written)
            shown = f'<div class="answer">{plain_html(text)}</div>' if text.strip() else status
            yield asked_as + shown
    yield '<p class="none">Stopped before it was its turn.</p>'


class _Reading:
    """How far the model has read, and how long it goes on reading at the pace that it has had."""

    def __init__(self) -> None:
        """Begin with the first thing that is read."""
        self._first: tuple[float, int] | None = None

    def words(self, event: PrefillProgress, now: float) -> str:
        """Return the state in words; the time left only once some seconds were measured."""
        begun, before = self._first = self._first or (now, event.done)
        words = f"Reading: {event.done:,} of {event.total:,} tokens"
        if now - begun < _SECONDS_UNTOLD or event.done == before:
            return words
        left = (now - begun) * (event.total - event.done) / (event.done - before)
        return f"{words}, about {timedelta(seconds=round(left))} left"


def status_html(words: str) -> str:
    """Return what is being done, as a line in the place of the answer."""
    return f'<p class="status">{plain_html(words)} …</p>'
