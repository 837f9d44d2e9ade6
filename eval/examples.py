"""Questions with known answers, one a line."""

import codecs
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import ReadError

_GZIP_MAGIC = b"\x1f\x8b"
_KEYS = {"id": str, "question": str, "document": str, "answers": list, "answerable": bool}


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One question about one document (its number, title or source).

    `answers` are the accepted wordings, empty where the document does not hold the answer.
    """

    id: str
    question: str
    document: str
    answers: tuple[str, ...]
    answerable: bool


def load_examples(path: Path) -> list[EvalExample]:
    """Return the examples of a JSON Lines file, gzipped or not.

    Each line has `id`, `question`, `document` (title, path or number), `answers` (list) and
    `answerable` (true or false); other keys and empty lines are skipped. No two ids are equal,
    since the routes are paired by id.

    Raises:
        ReadError: naming the line and the fault, at the first one.
    """
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ReadError(
            f"{path} cannot be read: {error}", hint="expected JSON Lines in UTF-8, or gzipped"
        ) from error
    examples: list[EvalExample] = []
    line_of: dict[str, int] = {}
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        example = _example(path, number, line)
        if example.id in line_of:
            raise _bad_line(path, number, f"id {example.id!r} is on line {line_of[example.id]} too")
        line_of[example.id] = number
        examples.append(example)
    if not examples:
        raise ReadError(f"{path} holds no example", hint="give one JSON object a line")
    return examples


def _example(path: Path, number: int, line: bytes) -> EvalExample:
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad_line(path, number, f"byte {error.start + 1} is not UTF-8") from error
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise _bad_line(path, number, "is not a JSON object")
    if type(row.get("document")) is int:  # not true or false, which are ints too
        row["document"] = str(row["document"])
    fault = _fault(row)
    if fault:
        raise _bad_line(path, number, fault)
    return EvalExample(
        id=row["id"],
        question=row["question"],
        document=row["document"],
        answers=tuple(row["answers"]),
        answerable=row["answerable"],
    )


def _fault(row: dict[str, Any]) -> str:
    for key, kind in _KEYS.items():
        if key not in row:
            return f"{key} is missing"
        if not isinstance(row[key], kind):
            return f"{key} is {row[key]!r}; expected {kind.__name__}"
        if kind is str and not row[key].strip():
            return f"{key} is empty"
    if not all(isinstance(answer, str) and answer.strip() for answer in row["answers"]):
        return "answers holds something that is not a word"
    if row["answerable"] != bool(row["answers"]):
        return f"answerable is {row['answerable']} with {len(row['answers'])} answers"
    return ""


def _bad_line(path: Path, number: int, fault: str) -> ReadError:
    return ReadError(
        f"{path.name}, line {number}: {fault}",
        hint="each line needs id, question, document, answers (list), answerable (true or false)",
    )
