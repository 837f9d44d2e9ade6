"""What was measured once on a machine and is remembered, e.g. a prefill rate."""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from rag.store.database import Database, upsert
from rag.store.schema import calibration


class CalibrationStore:
    """The measurements of one library, each a JSON value under a key of the caller's making."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self, key: str) -> Any:  # noqa: ANN401 - whatever JSON was saved
        """Return the value saved under `key`, or None."""
        query = select(calibration.c.value).where(calibration.c.key == key)
        with self._database.read() as connection:
            value = connection.scalar(query)
        return None if value is None else json.loads(value)

    def save(self, key: str, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """Save a JSON value under `key`, in place of an earlier one."""
        row = {
            "key": key,
            "value": json.dumps(value),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._database.write() as connection:
            upsert(connection, calibration, [row])
