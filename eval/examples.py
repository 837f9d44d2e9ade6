"""Questions with known answers: what a row holds, and what is wrong with the rows of a file."""

import codecs
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from eval.metrics import Span
from eval.tables import UNPACKED_BYTES, read_table
from rag.errors import ReadError
from rag.types import QuestionClass

METRICS = ("contains", "f1", "number", "option")
TABLES = (".csv", ".tsv", ".xlsx")
_GZIP_MAGIC = b"\x1f\x8b"
_KEYS = {"id": str, "question": str, "document": str, "answers": list, "answerable": bool}
_YES_OR_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_HINT = (
    "each row needs id, question, document, answers (list) and answerable (true or false); evidence"
    ' is a list of {"start": N, "end": N} in characters or {"page": N}'
)


@dataclass(frozen=True, slots=True)
class EvalExample:
    """One question about one document (its number, title or source).

    `answers` are the accepted wordings, empty where the document does not hold the answer.
    `evidence` are the stretches `[start, end)` of the document's canonical text that give it, as
    alternatives, and `pages` the pages; of a question without an answer, where one would look.
    `options` are those of a multiple-choice question, by letter, which `answers` then holds.
    `metric` is how an answer is scored: one of METRICS. `question_class` is what is asked for, ""
    where only the wording tells.
    """

    id: str
    question: str
    document: str
    answers: tuple[str, ...]
    answerable: bool
    evidence: tuple[Span, ...] = ()
    pages: tuple[int, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    metric: str = "contains"
    question_class: str = ""

    @property
    def asked(self) -> str:
        """The words that the model is asked: the question, and the options where it has any."""
        options = (f"({letter}) {words}" for letter, words in self.options.items())
        return "\n".join([self.question, *options])

    def to_json(self) -> dict[str, Any]:
        """Return the row that `load_examples` reads."""
        row = asdict(self) | {"answers": list(self.answers)}
        row["evidence"] = [{"start": start, "end": end} for start, end in self.evidence]
        row["evidence"] += [{"page": page} for page in row.pop("pages")]
        return row


def load_examples(path: Path, *, most_bytes: int = UNPACKED_BYTES) -> list[EvalExample]:
    """Return the examples of a JSON Lines file, gzipped or not, or of a CSV, TSV or XLSX table.

    Each row has `id`, `question`, `document` (title, path or number), `answers` (list),
    `answerable` (true or false), and may have `evidence`, `options` (letter to words), `metric` and
    `question_class`; other keys and empty lines are skipped. A cell of a table holds a list as
    JSON, or one answer alone; `answerable` may be left empty there. No two ids are equal, since the
    arms are paired by id. JSON Lines of more than `most_bytes`, unpacked, are refused.

    Raises:
        ReadError: naming every faulty line and its faults.
    """
    numbered = _table(path) if path.suffix.lower() in TABLES else _json_lines(path, most_bytes)
    examples: list[EvalExample] = []
    line_of: dict[str, int] = {}
    faults: list[str] = []
    for number, row in numbered:
        found = [row] if isinstance(row, str) else _faults(row)
        name = row.get("id") if isinstance(row, dict) else None
        if isinstance(name, str) and name in line_of:
            found.append(f"id {name!r} is on line {line_of[name]} too")
        elif isinstance(name, str):
            line_of[name] = number
        faults += [f"{path.name}, line {number}: {fault}" for fault in found]
        if not found and isinstance(row, dict):
            examples.append(_example(row))
    if faults:
        raise ReadError("\n".join(faults), hint=_HINT)
    if not examples:
        raise ReadError(f"{path} holds no example", hint="give one JSON object a line")
    return examples


def choose(
    examples: Sequence[EvalExample], *, documents: int | None, limit: int | None, seed: int
) -> list[EvalExample]:
    """Return at most `limit` examples of at most `documents` documents, drawn at random.

    Each document has its turn, so that all have as many as their questions allow; the order is that
    of the file. Equal seeds choose the same.
    """
    random = Random(seed)
    names = list(dict.fromkeys(example.document for example in examples))
    if documents is not None and documents < len(names):
        kept = set(random.sample(names, documents))
        names = [name for name in names if name in kept]
    by_document: dict[str, list[int]] = {name: [] for name in names}
    for place, example in enumerate(examples):
        if example.document in by_document:
            by_document[example.document].append(place)
    for places in by_document.values():
        random.shuffle(places)
    turns = max(map(len, by_document.values()), default=0)
    taken = [places[t] for t in range(turns) for places in by_document.values() if t < len(places)]
    return [examples[place] for place in sorted(taken[:limit])]


def _example(row: dict[str, Any]) -> EvalExample:
    evidence = row.get("evidence") or []
    return EvalExample(
        id=row["id"],
        question=row["question"],
        document=row["document"],
        answers=tuple(row["answers"]),
        answerable=row["answerable"],
        evidence=tuple((e["start"], e["end"]) for e in evidence if "start" in e),
        pages=tuple(e["page"] for e in evidence if "page" in e),
        options=row.get("options") or {},
        metric=row.get("metric") or "contains",
        question_class=row.get("question_class") or "",
    )


def _faults(row: dict[str, Any]) -> list[str]:
    """Return everything that is wrong with one row, in the order of its keys."""
    if type(row.get("document")) is int:  # not true or false, which are ints too
        row["document"] = str(row["document"])
    found = []
    for key, kind in _KEYS.items():
        if key not in row:
            found.append(f"{key} is missing")
        elif not isinstance(row[key], kind):
            found.append(f"{key} is {row[key]!r}; expected {kind.__name__}")
        elif kind is str and not row[key].strip():
            found.append(f"{key} is empty")
    answers, answerable = row.get("answers"), row.get("answerable")
    if isinstance(answers, list):
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            found.append("answers holds something that is not a word")
        elif isinstance(answerable, bool) and answerable != bool(answers):
            found.append(f"answerable is {answerable} with {len(answers)} answers")
    return found + _optional_faults(row)


def _optional_faults(row: dict[str, Any]) -> list[str]:
    found = []
    metric, options, evidence = (row.get(key) for key in ("metric", "options", "evidence"))
    if metric and metric not in METRICS:
        found.append(f"metric is {metric!r}; expected {', '.join(METRICS)}")
    if (kind := row.get("question_class")) and kind not in list(QuestionClass):
        found.append(f"question_class is {kind!r}; expected {', '.join(QuestionClass)}")
    if options and not (
        isinstance(options, dict)
        and all(len(k) == 1 and k.isupper() and isinstance(v, str) for k, v in options.items())
    ):
        found.append('options is no {"A": "words", ...}')
    elif metric == "option" and not (options and set(row.get("answers") or ()) <= set(options)):
        found.append("metric is option, and answers holds no letter of the options")
    if evidence and not isinstance(evidence, list):
        found.append(f"evidence is {evidence!r}; expected list")
    elif evidence:
        found += [f"evidence holds {e!r}" for e in evidence if not _is_evidence(e)]
    return found


def _is_evidence(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    if "page" in value:
        return type(value["page"]) is int and value["page"] > 0
    start, end = value.get("start"), value.get("end")
    return type(start) is int and type(end) is int and 0 <= start < end


def _json_lines(path: Path, most_bytes: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the number of each line that is not empty, with its object or what is wrong."""
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            with gzip.open(io.BytesIO(data)) as packed:
                data = packed.read(most_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ReadError(
            f"{path} cannot be read: {error}", hint="expected JSON Lines in UTF-8, or gzipped"
        ) from error
    if len(data) > most_bytes:
        raise ReadError(
            f"{path.name} unpacks to more than {most_bytes / 2**20:,.0f} MiB",
            hint="split it",
        )
    lines = io.BytesIO(data.removeprefix(codecs.BOM_UTF8))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, f"byte {error.start + 1} is not UTF-8"
            continue
        except (ValueError, RecursionError):
            row = None
        yield number, row if isinstance(row, dict) else "is not a JSON object"


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the number of each row as a spreadsheet shows it, with its cells made what they say."""
    table = read_table(path)
    if not table.rows:
        raise ReadError(
            f"{path} holds no row",
            hint="expected a table with a head: id, question, document, answers, answerable",
        )
    for number, cells in zip(table.numbers, table.rows, strict=True):
        yield number, _from_cells({key: _plain(value) for key, value in cells.items()})


def _plain(cell: object) -> str:
    """Return a cell as it reads: 7.0 is 7, TRUE is true, an empty one is empty."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


def _from_cells(cells: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {key: value for key, value in cells.items() if value}
    answers = cells.get("answers", "")
    row["answers"] = _json_cell(answers) if answers.startswith("[") else [answers] * bool(answers)
    word = cells.get("answerable", "").lower()
    row["answerable"] = _YES_OR_NO.get(word, word) if word else bool(answers)
    for key in ("evidence", "options"):
        if cells.get(key):
            row[key] = _json_cell(cells[key])
    return row


def _json_cell(cell: str) -> object:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # and is named as what it is
