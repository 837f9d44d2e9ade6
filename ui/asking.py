"""Questions over HTTP: the events of an answer, computed in a thread while the server goes on."""

from collections.abc import AsyncIterator, Sequence
from threading import Event
from typing import Annotated

from anyio import CancelScope, CapacityLimiter
from anyio.to_thread import run_sync
from pydantic import Field
from starlette.requests import Request

from rag.answering.conversation import Turn
from rag.answering.service import AnswerEvent, AnswerReady
from rag.errors import ModelError
from rag.types import Answer, AnswerMode, Route
from ui.fair_queue import MAX_WAITING, Waiting
from ui.library import Library

# What a request may say of thrift; without, the settings do.
Thrift = Annotated[
    float | None,
    Field(
        ge=0,
        le=1,
        description="Probability of being right that 1,000 prompt tokens are worth.",
    ),
]
_THREADS = CapacityLimiter(MAX_WAITING + 8)  # those who wait must not keep others from asking


def document_ids(
    own: Library, references: list[int | str] | None, collection: str | None
) -> list[int] | None:
    """Return the numbers of the documents named and of the collection's; None if neither is.

    A list that names nothing asks nothing: who left all documents out does not mean all of them.
    """
    if references is None and not collection:
        return None
    references = references or []
    numbers = [reference for reference in references if isinstance(reference, int)]
    ids = [document.id for document in own.store.with_ids(numbers)]
    ids += [own.store.find(reference).id for reference in references if isinstance(reference, str)]
    if collection:
        ids += [document.id for document in own.documents(collection)]
    return ids


def turn_before(own: Library, receipt_id: str) -> Turn:
    """Return the question and answer of a receipt, for a question that follows it.

    Raises:
        DocumentNotFoundError: if there is no such receipt.
    """
    before = own.receipts.load(receipt_id)
    asked = before.receipt.standalone_question or own.receipts.asked(receipt_id)[0]
    return Turn(asked, before.answer)


async def ask_events(
    own: Library,
    stop: Event,
    question: str,
    *,
    ids: list[int] | None,
    route: Route | None = None,
    mode: AnswerMode | None = None,
    history: Sequence[Turn] = (),
    thrift: float | None = None,
) -> AsyncIterator[Waiting | AnswerEvent]:
    """Yield the events of an answer, computed in a thread; leaving early stops the model."""
    events = own.stream(
        question,
        document_ids=ids,
        route=route,
        mode=mode,
        history=history,
        thrift=thrift,
        stop=stop,
    )
    try:
        while (event := await run_sync(next, events, None, limiter=_THREADS)) is not None:
            yield event
    finally:
        stop.set()
        with CancelScope(shield=True):
            await run_sync(events.close, limiter=_THREADS)  # type: ignore[attr-defined]


async def whole_answer(events: AsyncIterator[Waiting | AnswerEvent], request: Request) -> Answer:
    """Return the answer that the events end with; a caller who hangs up ends them."""
    try:
        async for event in events:
            if isinstance(event, AnswerReady):
                return event.answer
            if await request.is_disconnected():
                break
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    raise ModelError("the question was called off", hint="ask again")
