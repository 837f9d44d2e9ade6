"""How HTTP answers tell an error: `{"error": {"message", "hint", "type", "code"}}`."""

import logging
import uuid
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag.errors import (
    AccountError,
    BatchNotFoundError,
    DocumentNotFoundError,
    EmptyLibraryError,
    FathomError,
    ModelError,
    QuestionError,
    QuotaError,
    ReadError,
    StorageFullError,
    StoreError,
    TableError,
)

logger = logging.getLogger(__name__)

# The most specific first.
_STATUS: tuple[tuple[type[FathomError], int], ...] = (
    (DocumentNotFoundError, 404),
    (BatchNotFoundError, 404),
    (EmptyLibraryError, 409),
    (QuotaError, 429),
    (AccountError, 400),
    (QuestionError, 422),
    (ReadError, 422),
    (TableError, 422),
    (StorageFullError, 507),
    (StoreError, 409),
    (ModelError, 503),
)


class ErrorDetail(BaseModel):
    """What went wrong, what to do, the kind of error, and the status again."""

    message: str
    hint: str
    type: str
    code: int


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


# What the description of the API says of them.
ERRORS: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorBody, "description": "The request or the file cannot be read."},
    "default": {"model": ErrorBody, "description": "What went wrong, and what to do."},
}

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


class PlainError(JSONResponse):
    """An error of the request itself."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        error = {"message": message, "hint": hint, "type": "error", "code": status}
        super().__init__({"error": error}, status)


def status_of(error: FathomError) -> int:
    """Return the HTTP status that fits an error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def error_json(error: FathomError) -> dict[str, Any]:
    """Return an error as HTTP answers tell it."""
    told = {"message": error.message, "hint": error.hint, "type": type(error).__name__}
    return {"error": {**told, "code": status_of(error)}}


def unexpected(error: BaseException) -> dict[str, Any]:
    """Log a fault of ours under an id, and return what the caller is told."""
    number = uuid.uuid4().hex[:8]
    logger.error("unexpected error %s", number, exc_info=error)
    hint = "the log of `fathom serve` has the details under this number"
    told = {"message": f"something unexpected went wrong (error {number})", "hint": hint}
    return {"error": {**told, "type": "error", "code": 500}}


class FaultsTold:
    """ASGI middleware: a fault of ours becomes an answer with its number, nothing of its inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; where it fails before it began to, answer for it."""
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if scope["type"] != "http":
                raise
            told = unexpected(error)
            if not has_begun:
                await JSONResponse(told, 500)(scope, receive, send)
