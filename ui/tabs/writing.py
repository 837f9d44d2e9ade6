"""An answer while it is written: its events as HTML, as often as a person can follow."""

import time
from collections.abc import Iterator

from rag.answering.service import AnswerEvent, AnswerReady, QuestionRewritten, RouteChosen
from rag.lm.engine import PrefillProgress, TextPiece
from ui.answer_html import ROUTE_NAMES, asked_as_html
from ui.fair_queue import Waiting
from ui.formatting import plain_html
from ui.reading import Reading

_SECONDS_BETWEEN = 0.05  # of two pictures


def paced(events: Iterator[Waiting | AnswerEvent]) -> Iterator[str | AnswerReady]:
    """Yield the card of an answer as it grows, then the event that ends it."""
    written: list[str] = []
    asked_as, status, last = "", "", 0.0
    reading = Reading()
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
            reading = Reading()
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


def status_html(words: str) -> str:
    """Return what is being done, as a line in the place of the answer."""
    return f'<p class="status">{plain_html(words)} …</p>'
