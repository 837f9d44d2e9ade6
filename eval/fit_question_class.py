"""Fit the weights of the question classifier: python -m eval.fit_question_class --data DIR.

Labels are those of public sets: SQuAD 2.0, Natural Questions and LaRA's `location` are lookups,
LaRA's `comp` comparisons and `reasoning` multi-hop, QMSum's `general` summaries; its `specific`
ones are lookups unless they say "summarize". No set asks for counts, so those are made from the
patterns below, in both splits (no sentence stands in both). Fitted on `dev`, reported on `test`;
questions that a rule decides are reported but not fitted.
"""

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import logsumexp

from rag.routing.question_class import (
    FEATURES,
    classify_by_rule,
    classify_question,
    present_features,
)
from rag.types import QuestionClass

FloatArray = npt.NDArray[np.float64]
Labelled = tuple[str, QuestionClass]

_RIDGE = 3e-3
_LARA = {
    "location": QuestionClass.LOOKUP,
    "comp": QuestionClass.COMPARISON,
    "reasoning": QuestionClass.MULTI_HOP,
}
_COUNTED = (
    "dates deadlines obligations parties penalties ships tests warnings invoices errors contracts"
    " customers suppliers complaints requirements risks studies patients decisions exceptions"
).split()
_COUNTS = (
    "How many {} are mentioned here?",
    "How many different {} are named?",
    "What is the total number of {} described in the text?",
    "Give every one of the {} with its place.",
    "Which {} are there in all?",
    "What are the {} in this document, all of them?",
    "Find each of the {} that the text describes.",
    "How many {} can be found across these documents?",
)


def labelled_questions(data: Path, split: str) -> Iterator[Labelled]:
    """Yield the questions of one split with their class."""
    for name in ("squad2_articles", "nq_longdocs"):
        for row in _rows(data / name):
            if row["split"] == split:
                yield row["question"], QuestionClass.LOOKUP
    for row in _rows(data / "lara"):
        if row["split"] == split and row["task"] in _LARA:
            yield row["question"], _LARA[row["task"]]
    for row in _rows(data / "qmsum"):
        if row["split"] != split:
            continue
        if row["kind"] == "general":
            yield row["question"], QuestionClass.SUMMARY
        elif not row["question"].lower().startswith(("summari", "please summari")):
            yield row["question"], QuestionClass.LOOKUP
    for n, noun in enumerate(_COUNTED):
        for k, pattern in enumerate(_COUNTS):
            if (n + k) % 2 == (split == "test"):
                yield pattern.format(noun), QuestionClass.AGGREGATE


def fit(questions: list[Labelled]) -> dict[str, Any]:
    """Return the weights by feature and class; every class weighs the same, whatever its number."""
    classes = list(dict.fromkeys(label for _, label in questions))
    counts = Counter(label for _, label in questions)
    X = np.array([_row(question) for question, _ in questions])  # [n, features + 1]
    y = np.array([classes.index(label) for _, label in questions])
    weight = np.array([1.0 / counts[label] for _, label in questions]) / len(classes)

    def loss(flat: FloatArray) -> tuple[float, FloatArray]:
        W = flat.reshape(X.shape[1], len(classes))
        scores = X @ W
        log_shares = scores - logsumexp(scores, axis=1, keepdims=True)
        error = np.exp(log_shares)
        error[np.arange(len(y)), y] -= 1.0
        value = -(weight * log_shares[np.arange(len(y)), y]).sum() + _RIDGE * (W[:-1] ** 2).sum()
        gradient = X.T @ (error * weight[:, None])
        gradient[:-1] += 2 * _RIDGE * W[:-1]
        return float(value), gradient.ravel()

    start = np.zeros(X.shape[1] * len(classes))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    W = found.x.reshape(X.shape[1], len(classes))
    named = [
        {label.value: round(float(w), 3) for label, w in zip(classes, row, strict=True)}
        for row in W
    ]
    return {
        "fitted_by": "python -m eval.fit_question_class, on the dev splits",
        "bias": named[-1],
        "features": dict(zip(FEATURES, named[:-1], strict=True)),
    }


def confusion(questions: list[Labelled]) -> dict[str, dict[str, int]]:
    """Return, for each true class, how often each class was given."""
    table: dict[str, dict[str, int]] = {label.value: {} for label in QuestionClass}
    for question, label in questions:
        given = classify_question(question).question_class.value
        table[label][given] = table[label].get(given, 0) + 1
    return table


def main() -> None:
    """Fit, write the weights, and print both confusion tables as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the question sets")
    parser.add_argument("--out", type=Path, help="where to write the weights; default: nowhere")
    args = parser.parse_args()
    if args.out:
        unsure = [q for q in labelled_questions(args.data, "dev") if classify_by_rule(q[0]) is None]
        weights = json.dumps(fit(unsure), indent=1)
        args.out.write_text(weights + "\n", encoding="utf-8")
    for split in ("dev", "test"):
        table = confusion(list(labelled_questions(args.data, split)))
        sys.stdout.write(json.dumps({"split": split, "confusion": table}) + "\n")


def _row(question: str) -> list[float]:
    present = set(present_features(question))
    return [float(name in present) for name in FEATURES] + [1.0]


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(folder / "questions.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


if __name__ == "__main__":
    main()
