"""Fathom as a model of lm-evaluation-harness: a task of one's own, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from conftest import HANDBOOK
from eval.harness import FathomLM, run_tasks
from rag.errors import ReadError
from rag.types import Route
from test_batch import FERRIES
from test_cli import ROOT, needs_models
from ui.assembly import Fathom

TASK = """
task: harbour_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_text: "{{{{{document}}}}} {{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""


def write_task(
    folder: Path,
    *,
    kind: str = "generate_until",
    document: str = "context",
    rows: str = "rows.json",
) -> Path:
    """Write three questions about two documents, one of them without an answer there."""
    folder.mkdir()
    questions = [
        (HANDBOOK, "What is the harbour fee a night?", "35 crowns a night"),
        (FERRIES, "What does a ticket cost?", "12 crowns"),
        (HANDBOOK, "How many berths has the quay?", "twelve"),
    ]
    data = folder / "rows.json"
    with data.open("w") as file:
        for text, question, answer in questions:
            row = {document: text, "question": question, "answer": answer}
            file.write(json.dumps(row) + "\n")
    definition = TASK.format(
        data=folder / rows, cache=folder / "cache", kind=kind, document=document
    )
    (folder / "harbour.yaml").write_text(definition)
    return folder


def harness(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "FATHOM_HOME": str(tmp_path / "home"),
        "FATHOM_MODEL": "smollm2-135m",
        "FATHOM_MAX_NEW_TOKENS": "24",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "ui.cli", "harness", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@needs_models
@pytest.mark.model
def test_a_task_of_ones_own_is_answered_by_each_route_and_judged_by_its_metric(
    tmp_path: Path,
) -> None:
    tasks = write_task(tmp_path / "tasks")
    asked = ("--route", "retrieval", "--route", "full", "--json")
    done = harness(tmp_path, "harbour_questions", "--include", str(tasks), *asked)
    assert done.returncode == 0, done.stderr
    by_route = {row["route"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(by_route) == {"retrieval", "full"}
    for route, row in by_route.items():
        assert row["task"] == "harbour_questions"
        assert (row["questions"], row["failures"]) == (3, 0)
        # Short documents fit the retrieval budget, where asking for retrieval still retrieves.
        assert row["routes"] == {route: 3}
        assert row["model"] == "smollm2-135m"
        assert 0.0 <= row["metrics"]["exact_match"] <= 1.0
    # The temporary library is gone, and nothing went into the person's own.
    assert not (tmp_path / "home" / "fathom.sqlite").exists()


@pytest.mark.parametrize(
    ("changes", "task", "words"),
    [
        ({"kind": "loglikelihood"}, "harbour_questions", "wants likelihoods of given answers"),
        ({"document": "text"}, "harbour_questions", "no text in the field 'context'"),
        ({"rows": "gone.json"}, "harbour_questions", "the task could not be prepared"),
        ({}, "no_such_task", "knows no task 'no_such_task'"),
    ],
)
def test_what_cannot_be_asked_is_said(
    library: Fathom, tmp_path: Path, changes: dict[str, str], task: str, words: str
) -> None:
    tasks = write_task(tmp_path / "tasks", **changes)
    with pytest.raises(ReadError) as caught:
        run_tasks([task], FathomLM(library, tmp_path), include=tasks)
    assert words in caught.value.message
    assert caught.value.hint


def test_each_document_is_taken_once_and_an_answer_ends_where_the_task_says(
    library: Fathom, tmp_path: Path
) -> None:
    model = FathomLM(library, tmp_path, route=Route.FULL)
    rows = [{"context": HANDBOOK, "question": f"Number {n}?"} for n in range(3)]
    rows.append({"context": FERRIES, "question": "When?"})

    def told(until: list[str]) -> list[str]:
        requests = [
            Instance("generate_until", row, ("", {"until": until}), n) for n, row in enumerate(rows)
        ]
        return model.generate_until(requests)

    whole = told([])
    assert len(library.documents()) == 2
    assert model.taken == {"full": 4}
    stop = whole[0][3:5]
    cut = told([stop])
    assert cut == [text.split(stop)[0].strip() for text in whole]
    assert cut[0] != whole[0]
