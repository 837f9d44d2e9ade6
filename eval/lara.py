"""LaRA's stored predictions: two answers of each of eleven models, read whole and retrieved.

They let routing be judged without running a model. LaRA itself was scored by a language model as
the judge; here the score is a rule that anyone can recompute. Source: Li et al., LaRA,
arXiv:2502.09977.
"""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.metrics import normalised, says_not_there
from rag.errors import ReadError

# Half a percent: "8.8 million" stands for 8,829,000.
_ROUNDING = 0.005
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9}
_NUMBER = re.compile(
    r"(?<![\w.])\$?\(?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\)?\s*(thousand|million|billion)?", re.I
)
_YEARS = range(1900, 2100)
_SMALL_WORDS = frozenset(
    "of to in and for on by with from as at or is was were are be been it its this that which"
    " their his her they he she had has have not".split()
)


@dataclass(frozen=True, slots=True)
class PairedPrediction:
    """One model's two answers to one question, scored 0 to 1."""

    question_id: str
    document_id: str
    split: str
    task: str
    length_class: str
    question: str
    model: str
    full: float
    retrieval: float


@dataclass(frozen=True, slots=True)
class LaraDocument:
    """A document that the questions are about; its tokens are SmolLM2's."""

    id: str
    split: str
    num_tokens: int
    text: str


def load_lara(data: Path) -> tuple[list[LaraDocument], list[PairedPrediction]]:
    """Return the documents and the scored pairs of the folder `lara` in `data`.

    Raises:
        ReadError: if a file is missing or damaged.
    """
    folder = data / "lara"
    documents = [
        LaraDocument(row["doc_id"], row["split"], row["n_tokens_smollm2"], row["text"])
        for row in _rows(folder / "documents.jsonl.gz")
    ]
    questions = {row["qid"]: row for row in _rows(folder / "questions.jsonl.gz")}
    pairs = []
    for row in _rows(folder / "predictions_rag_vs_full.jsonl.gz"):
        question = questions[row["qid"]]
        for model, answers in row["predictions"].items():
            if not {"full", "rag"} <= answers.keys():
                continue  # the arm was not run: nothing to compare
            full, retrieval = (
                score_prediction(
                    str(answers[arm]), question["answer"], answerable=question["answerable"]
                )
                for arm in ("full", "rag")
            )
            pairs.append(
                PairedPrediction(
                    question_id=row["qid"],
                    document_id=question["doc_id"],
                    split=question["split"],
                    task=question["task"],
                    length_class=question["length_class"],
                    question=question["question"],
                    model=model,
                    full=full,
                    retrieval=retrieval,
                )
            )
    return documents, pairs


def score_prediction(prediction: str, reference: str, *, answerable: bool) -> float:
    """Return 0 to 1: how much of the reference a prediction says.

    Where the document does not hold the answer, 1 for saying so. Else, where the reference names
    numbers other than years, the share of them that the prediction names too, rounded or scaled;
    and where it names none, the share of the reference's words. A rule, not a judge: a rephrased
    answer gets less than it deserves, in both arms alike.
    """
    declines = says_not_there(prediction)
    if not answerable:
        return float(declines)
    wanted = numbers(reference)
    if wanted:
        named = numbers(prediction)
        return sum(_is_among(number, named) for number in wanted) / len(wanted)
    words = {word for word in normalised(reference) if word not in _SMALL_WORDS}
    said = set(normalised(prediction))
    return len(words & said) / len(words) if words else 0.0


def numbers(text: str) -> list[float]:
    """Return the distinct numbers of a text, scaled by a word behind them, years left out."""
    found: dict[float, None] = {}
    for whole, fraction, scale in _NUMBER.findall(text):
        value = float(whole.replace(",", "") + fraction)
        value *= _SCALES.get(scale.lower(), 1.0)
        if not (value in _YEARS and "," not in whole):
            found[value] = None
    return list(found)


def _is_among(number: float, named: Sequence[float]) -> bool:
    return any(abs(other - number) <= _ROUNDING * abs(number) for other in named)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ReadError(
            f"{path.name} cannot be read: {error}",
            hint="give the folder that holds lara/ with its three .jsonl.gz files",
        ) from error
