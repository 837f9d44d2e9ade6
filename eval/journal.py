"""The rows of a comparison on disk: appended, fsynced, and read again after any end of a process.

A journal is JSON Lines: `{"run": ...}` tells what the rows after it were made with, each other line
is a row. Several journals of one comparison (its shards) lie in one folder and are read as one.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.metrics import Span
from rag.errors import ReadError, SettingsError
from rag.types import Answer, answer_from_json

ROWS = "rows*.jsonl"
# What two runs must have in common for their rows to be compared.
_SAME = (
    "examples_sha256", "documents", "model", "model_sha256", "effective_tokens", "embedder",
    "settings", "seed"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """What rows were made with.

    `documents` gives the SHA-256 of each document asked about, `model_sha256` that of the weights,
    "" where a server holds them; `settings` are those that can change an answer. `effective_tokens`
    is how long a prompt the model was measured to use well, None where it was not. `held_out_looks`
    counts the comparisons on these held-out questions on this machine, this one included; 0 where
    they are not held out.
    """

    command: str
    data: str
    examples_sha256: str
    documents: Mapping[str, str]
    model: str
    model_sha256: str
    context_tokens: int | None
    embedder: str
    settings: Mapping[str, Any]
    seed: int
    commit: str | None
    device: str
    num_threads: int
    versions: Mapping[str, str]
    started: str
    effective_tokens: int | None = None
    held_out_looks: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk that retrieval ranked for a question, nearest first.

    `tokens` are the language model's; `lexical` and `score` are the retriever's (see its `Hit`).
    """

    start: int
    end: int
    tokens: int
    ordinal: int
    lexical: float
    score: float


@dataclass(frozen=True, slots=True)
class Row:
    """One question by one arm, as raw as it came: scores are made from it, without a model.

    `outcome` is answered, does not fit, not applicable, or failed; `reason` says why there is no
    answer. `gold` is the evidence in characters of the document, pages made stretches. `shown` are
    the stretches in the prompt, None where that is not known (a quotation compares sentences of
    many chunks). `prompt` are its words, left out where it is the whole document. `verbatim` says
    that every quotation was found in the store, word for word at its place. `seconds` is the
    wall-clock time of the document's questions by this arm, divided among them. `run` counts the
    runs of the journal, from 0.
    """

    example_id: str
    arm: str
    outcome: str
    reason: str
    document: str
    document_tokens: int
    num_chars: int
    num_chunks: int
    gold: tuple[Span, ...]
    shown: tuple[Span, ...] | None
    ranked: tuple[Found, ...]
    prompt: str
    answer: Answer | None
    verbatim: bool
    seconds: float
    run: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the object of its line."""
        return asdict(self) | {"answer": self.answer.to_json() if self.answer else None}


ANSWERED, DOES_NOT_FIT, NOT_APPLICABLE, FAILED = (
    "answered", "does not fit", "not applicable", "failed"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Journal:
    """What stands in the journals of a folder: the runs, and the rows by example and arm."""

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]

    @property
    def done(self) -> set[tuple[str, str]]:
        """The pairs of example and arm that have a row."""
        return {(row.example_id, row.arm) for row in self.rows}


def read_journals(folder: Path) -> Journal:
    """Return the runs and rows of all journals in a folder; a line cut short at the end is not one.

    A question that stands twice by the same arm counts once, as it was answered first.

    Raises:
        ReadError: if a line is damaged.
        SettingsError: if two runs were not made with the same.
    """
    runs: list[Run] = []
    rows: dict[tuple[str, str], Row] = {}
    for path in sorted(folder.glob(ROWS)):
        lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                if "run" in value and len(value) == 1:
                    runs.append(Run(**value["run"]))
                else:
                    row = _row(value, max(len(runs) - 1, 0))
                    rows.setdefault((row.example_id, row.arm), row)
            except (ValueError, TypeError, KeyError) as error:
                raise ReadError(
                    f"{path.name}, line {number} is no row of a comparison: {error!r}",
                    hint="remove the line; its question is then asked again",
                ) from error
    for run in runs[1:]:
        check_same(runs[0], run)
    return Journal(tuple(runs), tuple(rows.values()))


def check_same(first: Run, second: Run) -> None:
    """Refuse to mix rows that were made with different things.

    Raises:
        SettingsError: naming what differs.
    """
    differing = [key for key in _SAME if getattr(first, key) != getattr(second, key)]
    if differing:
        key = differing[0]
        raise SettingsError(
            f"the rows there were made with another {', '.join(differing)}:"
            f" {_short(getattr(first, key))}, now {_short(getattr(second, key))}",
            hint="give another folder with -o, or the same examples, model and settings",
        )


@contextmanager
def appending(path: Path, run: Run) -> Iterator["Appender"]:
    """Open a journal to go on with it; what a killed process left half written is cut off.

    Raises:
        SettingsError: if another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"another process is writing {path}",
                hint="wait for it, or give it and this one a --shard each",
            ) from None
        file.seek(0)
        written = file.read()
        file.truncate(written.rfind(b"\n") + 1)
        appender = Appender(file.fileno())
        appender.append([{"run": asdict(run)}])
        yield appender


@dataclass(frozen=True, slots=True)
class Appender:
    """Writes lines that are on the disk once `append` returns."""

    descriptor: int

    def append(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines in one write, and wait for the disk."""
        data = b"".join(json.dumps(v, ensure_ascii=False).encode() + b"\n" for v in values)
        while data:
            data = data[os.write(self.descriptor, data) :]
        os.fsync(self.descriptor)


def _row(value: dict[str, Any], run: int) -> Row:
    value["answer"] = answer_from_json(value["answer"]) if value["answer"] else None
    value["shown"] = None if value["shown"] is None else tuple(map(tuple, value["shown"]))
    value["gold"] = tuple(map(tuple, value["gold"]))
    value["ranked"] = tuple(Found(**found) for found in value["ranked"])
    return Row(**value | {"run": run})


def _short(value: object) -> str:
    words = str(value)
    return words if len(words) <= 60 else f"{words[:60]}..."
