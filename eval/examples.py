"""Questions with known answers, one a line."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import ReadError

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

    Each line has `id`, `question`, `document`, `answers` (list) and `answerable` (true or false).

    Raises:
        ReadError: naming the line and the fault, at the first one.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ReadError(
            f"{path} cannot be read: {error}", hint="expected JSON Lines in UTF-8, or gzipped"
        ) from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ReadError(f"{path} holds no example", hint="give one JSON object a line")
    return [_example(path, number, line) for number, line in lines]


def _example(path: Path, number: int, line: str) -> EvalExample:
    fault = "is not a JSON object"
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict):
        fault = _fault(row)
        if not fault:
            answers = tuple(row["answers"])
            return EvalExample(
                row["id"], row["question"], row["document"], answers, row["answerable"]
            )
    raise ReadError(
        f"{path.name}, line {number}: {fault}",
        hint="each line needs id, question, document, answers (list), answerable (true or false)",
    )


def _fault(row: dict[str, Any]) -> str:
    for key, kind in _KEYS.items():
        if key not in row:
            return f"{key} is missing"
        if not isinstance(row[key], kind):
            return f"{key} is {row[key]!r}; expected {kind.__name__}"
    if not all(isinstance(answer, str) and answer.strip() for answer in row["answers"]):
        return "answers holds something that is not a word"
    if row["answerable"] != bool(row["answers"]):
        return f"answerable is {row['answerable']} with {len(row['answers'])} answers"
    return ""
