"""What a batch has answered so far: one line an answer, on disk before it counts.

The journal lies beside the output, so that the two go together. Its lines are only ever appended;
a killed process leaves at most a torn last one, which the next run cuts off. A line says which form
the journal has; when a run began, and when it was told to stop; what a row was answered; or which
receipts are no answers of this batch.
"""

import fcntl
import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rag.errors import TableError
from rag.types import Answer, answer_from_json

_FORMAT = "fathom batch 1"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND


def journal_path(output: Path) -> Path:
    """Return where the journal of an output file lies."""
    return output.with_name(output.name + ".journal")


class Journal:
    """The answers of one output file, by row id and key; one process at a time writes it."""

    def __init__(self, path: Path, *, fresh: bool = False, to_read: bool = False) -> None:
        """Open a journal, or begin it.

        Args:
            path: of `journal_path`.
            fresh: forget what it holds.
            to_read: look at what is there now, whoever writes it; nothing can be added.

        Raises:
            TableError: if another process holds it, or it is damaged or something else.
        """
        self.path = path
        self.began: str | None = None
        self.stopped: str | None = None
        self.receipts: set[str] = set()
        self._answers: dict[tuple[str, str], Answer] = {}
        self._latest: dict[str, Answer] = {}
        self._writing = threading.RLock()  # a signal's handler may write between two lines
        try:
            self._file = os.open(path, os.O_RDONLY if to_read else _FLAGS, 0o666)
        except OSError as error:
            raise TableError(
                f"the journal {path} cannot be written: {error.strerror}",
                hint="give another place with -o",
            ) from error
        try:
            if to_read:
                self._load(path.read_bytes())
                return
            self._lock()
            if fresh:
                os.ftruncate(self._file, 0)
            self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def ids(self) -> set[str]:
        """The rows that have an answer, to whatever was asked in them then."""
        return {row_id for row_id, _ in self._answers}

    def answer(self, row_id: str, key: str) -> Answer | None:
        """Return the answer of a row that asked the same of the same then, None without one."""
        return self._answers.get((row_id, key))

    @property
    def num_answered(self) -> int:
        """How many rows have an answer; another thread may be writing the next one."""
        return len(self._latest)

    def latest(self, row_id: str) -> Answer | None:
        """Return the answer that a row got last, whatever was asked in it then."""
        return self._latest.get(row_id)

    def begin(self) -> str:
        """Write down that a run begins, and return when: ISO 8601, UTC, in seconds."""
        self.began, self.stopped = _now(), None
        self._append({"began": self.began})
        return self.began

    def stop(self) -> None:
        """Write down that the run is told to stop: what is answered from now on may be half."""
        self.stopped = _now()
        self._append({"stopped": self.stopped})

    def add(self, row_id: str, key: str, answer: Answer) -> None:
        """Write an answer down; it is on disk when this returns."""
        self._append({"id": row_id, "key": key, "answer": answer.to_json()})
        self._answers[row_id, key] = self._latest[row_id] = answer
        self.receipts.add(answer.receipt.id)

    def drop(self, *receipts: str) -> None:
        """Write down receipts that are no answers of this batch, though they look like it."""
        if receipts:
            self._append({"dropped": receipts})
            self.receipts.update(receipts)

    def rewrite(self, current: Callable[[Answer], Answer]) -> None:
        """Put answers in the place of those written down, in one step: words that must go are gone.

        Args:
            current: what an answer reads now; the same one where nothing has changed.
        """
        with self._writing:
            changed = {
                key: new for key, old in self._answers.items() if (new := current(old)) != old
            }
            if not changed:
                return
            lines = []
            for line in self.path.read_bytes().splitlines():
                entry = json.loads(line)
                if (key := (entry.get("id"), entry.get("key"))) in changed:
                    entry["answer"] = changed[key].to_json()
                lines.append(json.dumps(entry).encode() + b"\n")
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            before, self._file = self._file, os.open(temporary, _FLAGS, 0o666)
            try:
                self._lock()
                self._write(b"".join(lines))
                temporary.replace(self.path)
            except BaseException:
                os.close(self._file)
                self._file = before
                temporary.unlink(missing_ok=True)
                raise
            os.close(before)
            _sync_folder(self.path.parent)
            for key, answer in changed.items():
                if self._latest.get(key[0]) is self._answers[key]:
                    self._latest[key[0]] = answer
                self._answers[key] = answer

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TableError(
                f"another process is answering into {self.path.name.removesuffix('.journal')}",
                hint="wait for it, or give another file with -o",
            ) from None

    def _recover(self) -> None:
        """Load what is there, and take off what was being written when a process was killed."""
        num_whole = self._load(self.path.read_bytes())
        os.ftruncate(self._file, num_whole)
        if not num_whole:
            self._append({"format": _FORMAT})
            _sync_folder(self.path.parent)

    def _load(self, data: bytes) -> int:
        """Remember the whole lines; return how many bytes they are."""
        whole = data[: data.rfind(b"\n") + 1]
        header = json.dumps({"format": _FORMAT})[:-1].encode()
        if not whole and header.startswith(data[: len(header)]):  # new, or killed as it began
            return 0
        if not whole.startswith(header):
            raise TableError(
                f"{self.path} is no journal of a batch",
                hint="move it away, or give another file with -o",
            )
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._remember(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise TableError(
                    f"{self.path}, line {number} is damaged: {error}",
                    hint="delete this line, and its row is asked again; or begin anew with --fresh",
                ) from error
        return len(whole)

    def _remember(self, entry: dict[str, Any]) -> None:
        if "format" in entry:
            return
        if "began" in entry:
            self.began, self.stopped = entry["began"], None
        elif "stopped" in entry:
            self.stopped = entry["stopped"]
        elif "dropped" in entry:
            self.receipts.update(entry["dropped"])
        else:
            answer = answer_from_json(entry["answer"])
            self._answers[entry["id"], entry["key"]] = self._latest[entry["id"]] = answer
            self.receipts.add(answer.receipt.id)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._writing:
            self._write(json.dumps(entry).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
