"""Public question sets whose answers are known as character spans of whole documents."""

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import ReadError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EvidenceQuestion:
    """A question with the stretches `[start, end)` of its document's text that answer it.

    `answers` are the accepted wordings. A question that its document does not answer has neither.
    """

    id: str
    question: str
    document: str
    spans: tuple[Span, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EvidenceDocument:
    """A whole document, as plain text."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class EvidenceSet:
    """One set of one split. `long_spans`: its spans are longer than a passage, e.g. many turns."""

    name: str
    documents: tuple[EvidenceDocument, ...]
    questions: tuple[EvidenceQuestion, ...]
    long_spans: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a set lies, which of its questions it takes, and whether its spans are long."""

    folder: str
    takes: Callable[[dict[str, Any]], bool] = lambda row: True
    long_spans: bool = False


SETS = {
    "squad2_articles": _Source("squad2_articles"),
    "covidqa": _Source("covidqa"),
    "lara_32k": _Source("lara", lambda row: row["length_class"] == "32k"),
    "lara_128k": _Source("lara", lambda row: row["length_class"] == "128k"),
    "nq_longdocs": _Source("nq_longdocs"),
    "cuad_contracts": _Source("cuad_contracts"),
    "qasper_papers": _Source("qasper_papers"),
    "qmsum": _Source("qmsum", long_spans=True),
}


def load_evidence_set(
    data: Path, name: str, split: str, *, limit: int | None = None, answerable: bool = True
) -> EvidenceSet:
    """Return one set's questions that have evidence, and the documents they are about.

    Of an answer that occurs in several places, an occurrence outside the part of the document that
    the question was made from (`in_region` is false) is chance, and left out.

    Args:
        data: the folder that holds a folder for each set.
        name: a key of SETS.
        split: dev or test.
        limit: take the first so many questions; None takes all.
        answerable: take those that have evidence; else those that have none, without the ones that
            are asked with evidence too, word for word.

    Raises:
        ReadError: if the name is unknown, a file is missing or damaged, or nothing is left.
    """
    if name not in SETS:
        raise ReadError(f"there is no set {name!r}", hint=f"known are: {', '.join(SETS)}")
    source = SETS[name]
    rows = _read(data / source.folder / "questions.jsonl.gz")
    answered = {row["question"] for row in rows if _spans(row)}
    questions = [
        EvidenceQuestion(
            row["qid"], row["question"], row["doc_id"], _spans(row), tuple(row.get("answers") or ())
        )
        for row in rows
        if row["split"] == split
        and source.takes(row)
        and (bool(_spans(row)) if answerable else row["question"] not in answered)
    ]
    if limit is not None:
        questions = questions[:limit]
    if not questions:
        raise ReadError(
            f"{name} has no question with evidence in split {split!r}", hint="give dev or test"
        )
    asked = {question.document for question in questions}
    documents = tuple(
        EvidenceDocument(row["doc_id"], row.get("title") or row.get("file") or row["doc_id"], text)
        for row in _read(data / source.folder / "documents.jsonl.gz")
        if row["doc_id"] in asked and (text := row["text"])
    )
    missing = asked - {document.id for document in documents}
    if missing:
        raise ReadError(
            f"{name} asks about {len(missing)} documents that it lacks, e.g. {min(missing)}",
            hint="fetch documents.jsonl.gz and questions.jsonl.gz of one version",
        )
    return EvidenceSet(name, documents, tuple(questions), source.long_spans)


def _spans(row: dict[str, Any]) -> tuple[Span, ...]:
    evidence = row.get("evidence") or []
    return tuple((e["start"], e["end"]) for e in evidence if e.get("in_region", True))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError as error:
        raise ReadError(
            f"there is no file {path}", hint="give the folder of the sets with --data"
        ) from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ReadError(
            f"{path} cannot be read: {error}", hint="expected gzipped JSON Lines in UTF-8"
        ) from error
