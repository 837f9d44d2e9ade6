"""The HTTP API: documents, questions, receipts, batches, pictures of pages, counts.

Every route answers for whoever the door (`sign_in`) has let in, through `Fathom.for_user`.
"""

import html
import json
import shutil
from collections.abc import AsyncIterator
from threading import Event
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from ingest.pipeline import IngestFailure
from rag.answering.asked import MAX_QUESTION_CHARS, askable
from rag.answering.service import AnswerEvent, AnswerReady, QuestionRewritten, RouteChosen
from rag.errors import FathomError
from rag.lm.engine import PrefillProgress, TextPiece
from rag.types import AnswerMode, Document, Route
from ui.asking import Thrift, ask_events, document_ids, turn_before, whole_answer
from ui.assembly import Fathom
from ui.batches_api import batches_router
from ui.fair_queue import Waiting
from ui.http_errors import ERRORS, STREAMED, PlainError, error_json, status_of, unexpected
from ui.library import MAX_PAGE_SCALE, PAGE_SCALE, Library
from ui.openai_api import openai_router
from ui.uploads import keep_uploads

_LARGEST_ID = 2**63 - 1
_LARGEST_OFFSET = 2**31 - 1
_PRIVATE = {"cache-control": "private, max-age=3600"}

DocumentId = Annotated[int, InPath(ge=1, le=_LARGEST_ID)]
PageNumber = Annotated[int, InPath(ge=1, le=_LARGEST_OFFSET)]
Offset = Annotated[int, Query(ge=0, le=_LARGEST_OFFSET)]


class Question(BaseModel):
    """What is asked: of which documents, by which route, in whose words."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(min_length=1, max_length=MAX_QUESTION_CHARS)
    documents: list[int | str] | None = Field(
        default=None, max_length=10_000, description="Numbers or titles; without any, all."
    )
    collection: str | None = Field(default=None, max_length=1_000)
    route: Route | None = None
    mode: AnswerMode | None = None
    thrift: Thrift = None
    after: str | None = Field(
        default=None, max_length=64, description="Receipt of the answer that this one follows."
    )
    stream: bool = Field(default=False, description="Events as server-sent events.")


def add_api(app: FastAPI, fathom: Fathom) -> None:
    """Put the routes, and how errors are told, into the application."""

    def library(request: Request) -> Library:
        return fathom.for_user(request)

    Own = Annotated[Library, Depends(library)]
    router = APIRouter(responses=ERRORS)

    @router.get("/healthz", tags=["server"])
    def health() -> dict[str, bool]:
        """Say that the server is there."""
        return {"ok": True}

    @router.get("/metrics", tags=["server"], response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        """Counts in Prometheus' text format, for this machine or with a key."""
        text = fathom.metrics.text(fathom)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/documents", tags=["documents"])
    def documents(own: Own, collection: str | None = None) -> list[dict[str, Any]]:
        """List the documents, latest versions, of all or of a collection."""
        return [document_json(document) for document in own.documents(collection)]

    @router.post(
        "/v1/documents",
        tags=["documents"],
        status_code=201,
        responses={207: {"description": "Some files were taken; each says what became of it."}},
    )
    def upload(
        own: Own, files: list[UploadFile], collection: Annotated[str | None, Form()] = None
    ) -> Response:
        """Read files into the library; each says what became of it."""
        outcomes, status = _ingest(own, files, collection)
        return JSONResponse(outcomes, status)

    @router.get("/v1/documents/{number}", tags=["documents"])
    def document(own: Own, number: DocumentId) -> dict[str, Any]:
        """Describe a document."""
        return document_json(own.store.find(str(number)))

    @router.get("/v1/documents/{number}/text", tags=["documents"])
    def text(
        own: Own, number: DocumentId, start: Offset = 0, end: Offset = _LARGEST_OFFSET
    ) -> dict[str, Any]:
        """Return characters `[start, end)` of a document's text, to which citations refer."""
        found = own.store.find(str(number))
        if start > min(end, found.num_chars):
            raise HTTPException(
                422, f"start {start} lies beyond the end: {min(end, found.num_chars)}"
            )
        content = own.text(found.id, start, end)
        return {"document": found.id, "start": start, "end": start + len(content), "text": content}

    @router.delete("/v1/documents/{number}", tags=["documents"], status_code=204)
    def delete(own: Own, number: DocumentId) -> None:
        """Delete a document: text, vectors, file, and its words in past answers."""
        own.delete(number)

    @router.get(
        "/documents/{number}/pages/{page}.png",
        tags=["documents"],
        responses={200: {"content": {"image/png": {}}}},
        response_class=Response,
    )
    def page_image(
        own: Own,
        number: DocumentId,
        page: PageNumber,
        scale: Annotated[float, Query(ge=0.1, le=MAX_PAGE_SCALE)] = PAGE_SCALE,
    ) -> Response:
        """Draw a page of a PDF, `scale` pixels to the point."""
        picture = own.page_image(number, page, scale)
        return Response(picture, media_type="image/png", headers=_PRIVATE)

    @router.get("/documents/{number}/pages/{page}/boxes", tags=["documents"])
    def page_boxes(
        own: Own, number: DocumentId, page: PageNumber, start: Offset, end: Offset
    ) -> dict[str, list[tuple[float, float, float, float]]]:
        """Say where characters `[start, end)` of the document stand on a page's picture.

        A box for each line: left, top, right, bottom, as fractions of the picture.
        """
        return {"boxes": own.page_boxes(number, page, start, end)}

    @router.get("/comparisons/{name}/{file}", include_in_schema=False)
    def picture(own: Own, name: str, file: str) -> Response:
        """Return a picture of a report in the page."""
        return Response(
            own.comparisons.picture(name, file), media_type="image/png", headers=_PRIVATE
        )

    @router.get("/v1/collections", tags=["documents"])
    def collections(own: Own) -> list[dict[str, Any]]:
        """List the collections, those that others share included."""
        return [found.to_json() for found in own.store.collections()]

    @router.post("/v1/questions", tags=["questions"], responses=STREAMED)
    async def ask(own: Own, asked: Question, request: Request) -> Response:
        """Answer a question with citations and receipt; with `stream`, as server-sent events.

        The events are waiting, rewritten, route, reading, text (a draft), answer, or error.
        """
        askable(asked.question)  # before it waits for its turn
        ids = await run_sync(document_ids, own, asked.documents, asked.collection)
        history = [await run_sync(turn_before, own, asked.after)] if asked.after else []
        events = ask_events(
            own,
            Event(),
            asked.question,
            ids=ids,
            route=asked.route,
            mode=asked.mode,
            history=history,
            thrift=asked.thrift,
        )
        if asked.stream:
            return StreamingResponse(_server_sent(events), media_type="text/event-stream")
        return JSONResponse((await whole_answer(events, request)).to_json())

    @router.get("/v1/receipts/{receipt_id}", tags=["questions"])
    def receipt(own: Own, receipt_id: Annotated[str, InPath(max_length=64)]) -> dict[str, Any]:
        """Return a past answer with its receipt."""
        return own.receipts.load(receipt_id).to_json()

    app.include_router(router)
    app.include_router(batches_router(library))
    app.include_router(openai_router(fathom, library))
    _add_pages(app)
    _add_errors(app)


# ---- documents --------------------------------------------------------------------------------


def document_json(document: Document) -> dict[str, Any]:
    """Return what a reader of a document is told: not where it lay on its owner's machine."""
    told = document.to_json()
    del told["source"], told["content_sha256"]
    return told


def _ingest(
    own: Library, files: list[UploadFile], collection: str | None
) -> tuple[list[dict[str, Any]], int]:
    """Ingest uploads, and say what became of each."""
    outcomes: list[dict[str, Any]] = []
    failures: list[FathomError] = []
    folder, sources = keep_uploads(own.settings, files, collection)
    try:
        for outcome in own.ingest_files(sources):
            if isinstance(outcome, IngestFailure):
                failures.append(outcome.error)
                told = error_json(outcome.error)["error"]
                outcomes.append({"outcome": "failed", "title": outcome.title, "error": told})
            else:
                described = document_json(outcome.document)
                outcomes.append(
                    {"outcome": outcome.outcome, "message": outcome.message}
                    | {"title": outcome.document.title, "document": described}
                )
    finally:
        shutil.rmtree(folder)
    if failures and len(files) == 1:
        raise failures[0]
    return outcomes, 207 if failures else 201


# ---- questions --------------------------------------------------------------------------------


async def _server_sent(events: AsyncIterator[Waiting | AnswerEvent]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield sse(*_event_json(event))
    except FathomError as error:
        yield sse("error", error_json(error))
    except Exception as error:
        yield sse("error", unexpected(error))
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def _event_json(event: Waiting | AnswerEvent) -> tuple[str, dict[str, Any]]:
    match event:
        case Waiting(place):
            return "waiting", {"place": place}
        case QuestionRewritten(question):
            return "rewritten", {"question": question}
        case RouteChosen(decision, read):
            return "route", {"route": decision.route, "reason": decision.reason, "reads": read}
        case PrefillProgress(done, total):
            return "reading", {"tokens": done, "of_tokens": total}
        case TextPiece(text):
            return "text", {"text": text}
        case AnswerReady(answer):
            return "answer", answer.to_json()


def sse(name: str, value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a server-sent event; JSON has no line break of its own."""
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


# ---- errors -----------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(FathomError)
    async def known(request: Request, error: FathomError) -> JSONResponse:
        return JSONResponse(error_json(error), status_of(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        answer = PlainError(error.status_code, str(error.detail), "see /docs for what there is")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return PlainError(422, f"{where}: {first['msg']}", "see /docs for what is expected")


# ---- the description --------------------------------------------------------------------------


def _add_pages(app: FastAPI) -> None:
    """Describe the API to those who are let in, without fetching anything from elsewhere."""

    @app.get("/openapi.json", include_in_schema=False)
    def description() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        rows = []
        for path, methods in app.openapi()["paths"].items():
            for method, operation in methods.items():
                first, _, rest = operation.get("description", "").partition("\n")
                rows.append(
                    f"<tr><td><code>{method.upper()}</code></td>"
                    f"<td><code>{html.escape(path)}</code></td>"
                    f"<td>{html.escape(first)} {html.escape(rest)}</td></tr>"
                )
        return HTMLResponse(
            "<!doctype html><html lang=en><meta charset=utf-8><title>Fathom: HTTP API</title>"
            "<style>body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
            "padding:0 1rem;line-height:1.5}td{padding:.3rem .8rem .3rem 0;vertical-align:top}"
            "</style><h1>HTTP API</h1><p>Give an API key as <code>Authorization: Bearer KEY</code>"
            " (<code>fathom users key NAME</code>). All parameters:"
            " <a href='/openapi.json'>openapi.json</a>.</p><table>"
            + "".join(rows)
            + "</table></html>"
        )
