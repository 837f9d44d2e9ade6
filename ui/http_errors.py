"""How HTTP answers tell an error: `{"error": {"message", "hint", "type", "code"}}`."""

import logging
import uuid
from typing import Any

from starlette.responses import JSONResponse

from rag.errors import (
    AccountError,
    DocumentNotFoundError,
    EmptyLibraryError,
    FathomError,
    ModelError,
    QuotaError,
    ReadError,
    StorageFullError,
    StoreError,
)

logger = logging.getLogger(__name__)

# The most specific first.
_STATUS: tuple[tuple[type[FathomError], int], ...] = (
    (DocumentNotFoundError, 404),
    (EmptyLibraryError, 409),
    (QuotaError, 429),
    (AccountError, 400),
    (ReadError, 422),
    (StorageFullError, 507),
    (StoreError, 409),
    (ModelError, 503),
)


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
