"""Batches over HTTP: a table of questions in, how far it is, a table of cited answers out."""

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field

from rag.answering.asked import MAX_QUESTION_CHARS
from rag.types import Route
from ui.asking import document_ids
from ui.http_errors import ERRORS
from ui.library import Library
from ui.uploads import upload_name

_TYPES = {
    ".jsonl": "application/x-ndjson",
    ".csv": "text/csv",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ".parquet": "application/vnd.apache.parquet",
}

BatchId = Annotated[str, InPath(max_length=64)]


class Format(StrEnum):
    """The files that answers are given out as."""

    JSONL = "jsonl"
    CSV = "csv"
    XLSX = "xlsx"
    PARQUET = "parquet"


class BatchRow(BaseModel):
    """A question; what else stands in the row is carried through."""

    model_config = ConfigDict(extra="allow")

    question: str = Field(max_length=MAX_QUESTION_CHARS)
    id: str | int | None = None
    document: int | str | list[int | str] | None = Field(
        default=None, description="Numbers or titles; without any, those of the batch."
    )
    route: Route | None = None


class BatchAsked(BaseModel):
    """A batch as rows of JSON."""

    model_config = ConfigDict(extra="forbid")

    rows: list[BatchRow] = Field(min_length=1, max_length=10_000)
    name: str = Field(default="batch", min_length=1, max_length=200)
    documents: list[int | str] | None = Field(
        default=None, max_length=10_000, description="Of rows that name none; without any, all."
    )
    collection: str | None = Field(default=None, max_length=1_000)
    route: Route | None = Field(default=None, description="Of rows that name none.")
    start: bool = Field(default=True, description="Whether the rows are asked at once.")


class BatchState(BaseModel):
    """How far a batch is."""

    id: str
    name: str
    created_at: str
    state: str = Field(description="ready, waiting, running, stopped, done or failed.")
    rows: int
    answered: int
    documents: list[int]
    route: Route | None
    now: str | None = Field(description="What is being read or written.")
    seconds_left: float | None
    problem: dict[str, str] | None = Field(description="Why the run ended before its last row.")
    faults: list[dict[str, Any]] = Field(description="What is wrong with which row, from 1.")


def batches_router(library: Callable[[Request], Library]) -> APIRouter:
    """Return the routes; `library` says whose a request is."""
    Own = Annotated[Library, Depends(library)]
    router = APIRouter(responses=ERRORS, tags=["batches"])

    def told(own: Library, batch_id: str) -> dict[str, Any]:
        return own.batches.told(own.batches.find(batch_id))

    @router.get("/v1/batches")
    def batches(own: Own) -> list[BatchState]:
        """List the batches, the latest first."""
        return [BatchState(**own.batches.told(batch)) for batch in own.batches.all()]

    @router.post("/v1/batches", status_code=201)
    def ask(own: Own, asked: BatchAsked) -> BatchState:
        """Answer rows of JSON, one after the other; ask for its state and its result later."""
        rows = [row.model_dump(mode="json", exclude_unset=True) for row in asked.rows]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        ids = document_ids(own, asked.documents, asked.collection)
        batch = own.batches.create(
            f"{asked.name}.jsonl", lines.encode(), document_ids=ids, route=asked.route
        )
        if asked.start:
            own.batches.start(batch.id)
        return BatchState(**told(own, batch.id))

    @router.post("/v1/batches/file", status_code=201)
    def ask_file(
        own: Own,
        file: UploadFile,
        documents: Annotated[list[str] | None, Form()] = None,
        collection: Annotated[str | None, Form(max_length=1_000)] = None,
        route: Annotated[Route | None, Form()] = None,
        start: Annotated[bool, Form()] = True,
    ) -> BatchState:
        """Answer a table (CSV, TSV, XLSX, JSON Lines, Parquet) with a column `question`.

        Beside it there may be id, document (number or title; several with ; between) and route.
        """
        ids = document_ids(own, list(documents) if documents else None, collection)
        name = Path(upload_name(file.filename)).name
        batch = own.batches.create(name, file.file.read(), document_ids=ids, route=route)
        if start:
            own.batches.start(batch.id)
        return BatchState(**told(own, batch.id))

    @router.get("/v1/batches/{batch_id}")
    def state(own: Own, batch_id: BatchId) -> BatchState:
        """Say how far a batch is, and what is wrong with which row."""
        return BatchState(**told(own, batch_id))

    @router.post("/v1/batches/{batch_id}/start")
    def start(own: Own, batch_id: BatchId) -> BatchState:
        """Go on with a batch that was stopped, or ask the rows with a fault once more."""
        own.batches.start(batch_id)
        return BatchState(**told(own, batch_id))

    @router.post("/v1/batches/{batch_id}/stop")
    def stop(own: Own, batch_id: BatchId) -> BatchState:
        """Stop a batch; what is answered stays."""
        own.batches.stop(batch_id)
        return BatchState(**told(own, batch_id))

    @router.get(
        "/v1/batches/{batch_id}/result",
        responses={200: {"content": {kind: {} for kind in _TYPES.values()}}},
        response_class=Response,
    )
    def result(
        own: Own, batch_id: BatchId, format: Annotated[Format, Query()] = Format.JSONL
    ) -> Response:
        """Return the answers so far as a table: a row for each question, in their order."""
        batch = own.batches.find(batch_id)
        suffix = f".{format}"
        name = quote(f"{Path(batch.name).stem}-answers{suffix}", safe="")
        headers = {
            "content-disposition": f"attachment; filename*=UTF-8''{name}",
            "cache-control": "private, no-store",
        }
        content = own.batches.result(batch, suffix)
        return Response(content, media_type=_TYPES[suffix], headers=headers)

    @router.delete("/v1/batches/{batch_id}", status_code=204)
    def delete(own: Own, batch_id: BatchId) -> None:
        """Delete a batch: the table, the answers and their receipts."""
        own.batches.delete(batch_id)

    return router
