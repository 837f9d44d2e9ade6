"""Public question sets over whole documents, as examples, and those with evidence as spans."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from eval.examples import EvalExample
from eval.metrics import Span as Span
from eval.metrics import contains_answer
from ingest.pipeline import IngestFailure, IngestResult
from ingest.sources import SourceToRead
from rag.errors import ReadError
from rag.types import Document


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


# ---- a whole folder as examples ---------------------------------------------------------------

SPLITS = ("dev", "test")
# Where the references are sentences, clauses or summaries, no answer holds them word for word.
_METRICS = dict.fromkeys(("covidqa", "cuad_contracts", "lara", "qasper_papers", "qmsum"), "f1")
# A haystack of the set of passages: so many passages, of which so many are asked about.
_HAYSTACK = 60
_NEEDLES = 10
_HAYSTACKS = 24


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """The documents of one split of a set, and every question on them."""

    documents: tuple[EvidenceDocument, ...]
    examples: tuple[EvalExample, ...]


def ingest_set(
    documents: Sequence[EvidenceDocument],
    ingest: Callable[[Sequence[SourceToRead]], Iterable[IngestResult | IngestFailure]],
    folder: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Document]:
    """Take a set's documents into a library the way every document goes; return them by their ids.

    Args:
        documents: of the set.
        ingest: takes files into the library, in their order.
        folder: where the files are written first.
        on_progress: called with the documents done, and all of them.

    Raises:
        ReadError: if a text does not survive as it is, so that evidence would point elsewhere.
    """
    sources = []
    for number, document in enumerate(documents):
        file = folder / f"document-{number}.txt"
        file.write_text(document.text, encoding="utf-8")
        sources.append(
            SourceToRead(file, document.id, f"{document.title.removesuffix('.txt')}.txt")
        )
    found: dict[str, Document] = {}
    for document, outcome in zip(documents, ingest(sources), strict=True):
        if isinstance(outcome, IngestFailure):
            raise outcome.error
        if outcome.document.num_chars != len(document.text):
            raise ReadError(
                f"{document.title}: the ingested text is not as long as the set's",
                hint="its evidence spans would point elsewhere; the set needs plain Unix text",
            )
        found[document.id] = outcome.document
        on_progress(len(found), len(documents))
    return found


def is_example_set(folder: Path) -> bool:
    """Say whether a folder holds a set: questions with their documents, or single passages."""
    names = ("questions.jsonl.gz", "passages.jsonl.gz")
    return any((folder / name).is_file() for name in names)


def load_example_set(folder: Path, split: str) -> ExampleSet:
    """Return every question of one split with its document, as examples.

    Unlike `load_evidence_set` it takes questions without evidence, too. One that the document does
    not answer is left out if the same words are asked with an answer. Single passages are built
    into haystacks: see `_haystacks`.

    Args:
        folder: of one set, whose own fields are known here.
        split: dev or test.

    Raises:
        ReadError: if a file is missing or damaged, or nothing is left.
    """
    if split not in SPLITS:
        raise ReadError(f"there is no split {split!r}", hint="give dev or test")
    if (folder / "passages.jsonl.gz").is_file():
        return _haystacks(load_passages(folder, split))
    rows = _read(folder / "questions.jsonl.gz")
    answered = {(row["doc_id"], row["question"]) for row in rows if row.get("answerable", True)}
    examples = tuple(
        _as_example(row, _METRICS.get(folder.name, "contains"))
        for row in rows
        if row["split"] == split
        and (row.get("answerable", True) or (row["doc_id"], row["question"]) not in answered)
    )
    asked = {example.document for example in examples}
    documents = tuple(
        EvidenceDocument(
            row["doc_id"], row.get("title") or row.get("file") or row["doc_id"], row["text"]
        )
        for row in _read(folder / "documents.jsonl.gz")
        if row["doc_id"] in asked
    )
    missing = asked - {document.id for document in documents}
    if missing or not examples:
        raise ReadError(
            f"{folder} has {len(examples)} questions in split {split!r}, and lacks"
            f" {len(missing)} documents that they ask about",
            hint="fetch documents.jsonl.gz and questions.jsonl.gz of one version",
        )
    return ExampleSet(documents, examples)


def _as_example(row: dict[str, Any], metric: str) -> EvalExample:
    """Return one question of any set; what tells the sets apart are the fields they have."""
    answerable = row.get("answerable", True)
    spans = _spans(row)
    answers = tuple(row.get("answers") or [row[key] for key in ("answer",) if row.get(key)])
    if "options" in row:  # quality_mc
        answers, metric = (row["gold"],), "option"
    elif row.get("numeric_key"):  # lara, where the answer is a number of a filing
        answers, metric = (_number_asked_for(row),), "number"
    if not answerable and "paragraph_span" in row:  # squad2: the paragraph it was asked of
        spans = (tuple(row["paragraph_span"]),)
    return EvalExample(
        id=row["qid"],
        question=row["question"],
        document=row["doc_id"],
        answers=answers if answerable else (),
        answerable=answerable,
        evidence=spans,
        options=row.get("options", {}),
        metric=metric,
    )


def _number_asked_for(row: dict[str, Any]) -> str:
    """Return the number that answers, with its unit and scale; the answer may name others, too."""
    found = [re.search(rf"\$?{re.escape(k)}{_SCALE}", row["answer"]) for k in row["numeric_key"]]
    return ", ".join(match.group() for match in found if match) or ", ".join(row["numeric_key"])


_SCALE = r"(?:\s?%|\s?(?:thousand|million|billion|percent)\b)?"


def load_passages(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of a set of single passages; the even ones are dev, the odd ones test.

    Raises:
        ReadError: if the file is missing or damaged.
    """
    return _read(folder / "passages.jsonl.gz")[SPLITS.index(split) :: 2]


def _haystacks(own: list[dict[str, Any]]) -> ExampleSet:
    """Return documents of single passages, each with ten that are asked about, one a tenth.

    So the depth of the evidence says nothing of the question. The order and the fillers are seeded;
    a filler that holds one of the answers is left out.
    """
    documents, examples = [], []
    for number in range(min(_HAYSTACKS, len(own) // _NEEDLES)):
        needles = own[number * _NEEDLES : (number + 1) * _NEEDLES]
        random = Random(number)
        answers = [answer for row in needles for answer in row["answers"]]
        fillers: list[dict[str, Any]] = []
        for row in random.sample(own, 3 * _HAYSTACK):
            if len(fillers) < _HAYSTACK - _NEEDLES and not (
                row in needles or contains_answer(row["passage"], answers)
            ):
                fillers.append(row)
        random.shuffle(needles)
        part = len(fillers) // _NEEDLES
        text, name = "", f"haystack-{number}"
        for tenth, needle in enumerate(needles):
            around = fillers[tenth * part : (tenth + 1) * part]
            around.insert(random.randint(0, len(around)), needle)
            for row in around:
                text += f"{row['title']}\n"
                if row is needle:
                    span = (len(text), len(text) + len(row["passage"]))
                    examples.append(
                        EvalExample(
                            f"{name}-{row['qid']}",
                            row["question"],
                            name,
                            tuple(row["answers"]),
                            True,
                            (span,),
                        )
                    )
                text += f"{row['passage']}\n\n"
        documents.append(EvidenceDocument(name, name, text))
    return ExampleSet(tuple(documents), tuple(examples))


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
