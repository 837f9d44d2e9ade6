"""What is kept of a batch on the server: a folder with its table, its record and its journal."""

import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from eval.batch import Question, read_questions
from eval.batch_output import check_columns
from eval.tables import Table, read_table
from rag.errors import BatchNotFoundError, FathomError, TableError
from rag.types import Route

_RECORD, _NEW = "batch.json", ".new-"


class State(StrEnum):
    """How far a batch is."""

    READY = "ready"  # read and checked; nobody has started it
    WAITING = "waiting"  # for another batch of the same owner
    RUNNING = "running"  # a server that ended meanwhile goes on when it starts again
    STOPPED = "stopped"
    DONE = "done"  # every row has an answer or a fault
    FAILED = "failed"  # the run ended before every row was asked: `problem` says why


UNFINISHED = (State.WAITING, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a row, or with a run, and what to do."""

    message: str
    hint: str

    @classmethod
    def of(cls, error: FathomError) -> Self:
        """Return what an error says."""
        return cls(error.message, error.hint)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as its record tells of it.

    Args:
        id: 32 hexadecimal digits.
        owner: whose it is.
        name: of the file with the questions.
        created_at: ISO 8601, UTC.
        document_ids: the documents of rows that name none; fixed when the batch was made.
        route: of rows that name none; None lets Fathom choose.
        num_rows: in the table.
        state: how far it is.
        num_answered: rows with an answer.
        faults: by the number of the row, from 0.
        problem: what ended the run, None if nothing did.
    """

    id: str
    owner: str
    name: str
    created_at: str
    document_ids: tuple[int, ...]
    route: Route | None
    num_rows: int
    state: State = State.READY
    num_answered: int = 0
    faults: Mapping[int, Fault] = field(default_factory=dict)
    problem: Fault | None = None


class BatchFolders:
    """The batches of all owners in a folder of the library."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, owner: str, name: str, content: bytes) -> tuple[Batch, list[Question]]:
        """Keep a table as a batch, and return both; no document is looked for yet.

        Raises:
            TableError: if it is no table of questions; then nothing is kept.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=self._folder, prefix=_NEW))
        file = made / f"table{Path(name).suffix.lower()[:10]}"
        try:
            file.write_bytes(content)
            table = read_table(file)
            check_columns(table)
            questions = read_questions(table)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            batch = Batch(uuid.uuid4().hex, owner, name, now, (), None, len(questions))
            _write(made, batch)
            made.rename(self._folder / batch.id)
        except TableError as error:
            shutil.rmtree(made)
            raise TableError(error.message.replace(file.name, name), hint=error.hint) from error
        except BaseException:
            shutil.rmtree(made)
            raise
        return batch, questions

    def clear(self) -> None:
        """Remove what a server left that was killed while it took a table."""
        for path in self._folder.glob(f"{_NEW}*"):
            shutil.rmtree(path)

    def all(self, owner: str | None) -> list[Batch]:
        """Return the batches of an owner, None for all owners, the latest first."""
        found = [_read(path.parent) for path in self._folder.glob(f"*/{_RECORD}")]
        mine = [batch for batch in found if batch and owner in (None, batch.owner)]
        return sorted(mine, key=lambda batch: batch.created_at, reverse=True)

    def find(self, owner: str, batch_id: str) -> Batch:
        """Return a batch of an owner.

        Raises:
            BatchNotFoundError: if he has none of this id.
        """
        is_id = len(batch_id) == 32 and batch_id.isalnum() and batch_id.isascii()
        batch = _read(self._folder / batch_id) if is_id else None
        if batch is None or batch.owner != owner:
            raise BatchNotFoundError(
                f"there is no batch {batch_id[:40]!r}", hint="GET /v1/batches lists them"
            )
        return batch

    def save(self, batch: Batch) -> None:
        """Write a batch's record; one that was deleted meanwhile stays deleted."""
        folder = self._folder / batch.id
        if folder.is_dir():
            _write(folder, batch)

    def change(self, batch: Batch, **changes: Any) -> Batch:  # noqa: ANN401 - of `replace`
        """Write a batch's record with other values, and return it."""
        changed = replace(batch, **changes)
        self.save(changed)
        return changed

    @contextmanager
    def claimed(self, batch: Batch) -> Iterator[bool]:
        """Have a batch for this process alone inside the block, unless another has it: say whether.

        The claim is a lock on the folder: that of a process that is killed ends with it.
        """
        try:
            folder = os.open(self._folder / batch.id, os.O_RDONLY)
        except FileNotFoundError:  # deleted in this moment
            yield False
            return
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = True
            except BlockingIOError:
                is_ours = False
            yield is_ours
        finally:
            os.close(folder)

    def reread(self, batch: Batch) -> Batch | None:
        """Return a batch as its record tells of it now, None if it was deleted."""
        return _read(self._folder / batch.id)

    def delete(self, batch: Batch) -> None:
        """Delete a batch: table, journal, record."""
        shutil.rmtree(self._folder / batch.id)

    def table(self, batch: Batch) -> Table:
        """Return the table of the questions."""
        (path,) = (self._folder / batch.id).glob("table.*")
        return read_table(path)

    def journal_path(self, batch: Batch) -> Path:
        """Return where the journal of the answers lies, if it was begun."""
        return self._folder / batch.id / "answers.journal"


def _write(folder: Path, batch: Batch) -> None:
    temporary = folder / f".{_RECORD}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(batch), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _RECORD)


def _read(folder: Path) -> Batch | None:
    """Return the batch in a folder, None if there is none, or it is being deleted."""
    try:
        told = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    told["document_ids"] = tuple(told["document_ids"])
    told["route"] = Route(told["route"]) if told["route"] else None
    told["state"] = State(told["state"])
    told["faults"] = {int(number): Fault(**fault) for number, fault in told["faults"].items()}
    told["problem"] = Fault(**told["problem"]) if told["problem"] else None
    return Batch(**told)


def unfinished(batches: list[Batch]) -> Iterator[Batch]:
    """Yield those that wait or run, the earliest first."""
    yield from (batch for batch in reversed(batches) if batch.state in UNFINISHED)
