"""Fathom as a model of lm-evaluation-harness, so that other people's tasks run against its routes.

A task's row holds a document and a question in two fields. The document is ingested, as a person
would have done, and the question is asked of it alone, by a route or as the router decides; the
task judges the answer by its own metric. The task's prompt, its instructions and its examples are
not shown to the model: Fathom has a prompt of its own, and the routes share it. So scores compare
routes, models and settings of Fathom with each other, and with published ones only as far as the
metric forgives another wording.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from eval.scoring import answer_words, quoted_stretch
from ingest.pipeline import IngestResult
from rag.answering.service import AnsweringService
from rag.errors import FathomError, InstallError, ReadError
from rag.types import Answer, Route

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise InstallError(
        f"lm-evaluation-harness is not installed: {error}",
        hint="pip install 'fathom-qa[harness]'",
    ) from error

logger = logging.getLogger(__name__)


class Library(Protocol):
    """What is asked: documents go in, a service answers."""

    def ingest(self, path: Path) -> IngestResult:
        """Take one file in."""

    def service(self) -> AnsweringService:
        """Return what answers."""


class FathomLM(LM):  # type: ignore[misc]  # the harness has no types
    """Answers a task's requests by one route; `taken` and `failures` say what came of them."""

    def __init__(
        self,
        library: Library,
        folder: Path,
        *,
        route: Route | None = None,
        document_field: str = "context",
        question_field: str = "question",
        abstains_with: str = "unanswerable",
    ) -> None:
        """Take documents into a library and ask about them.

        Args:
            library: a temporary one: the tasks' documents go into it.
            folder: for the documents as files.
            route: the route to ask for; None lets the router choose.
            document_field: of a task's row.
            question_field: of a task's row.
            abstains_with: what the task is told where Fathom finds no answer.
        """
        super().__init__()
        self.taken: Counter[str] = Counter()
        self.failures: list[FathomError] = []
        self._library = library
        self._folder = folder
        self._route = route
        self._fields = (document_field, question_field)
        self._abstains_with = abstains_with
        self._ids: dict[str, int] = {}

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:  # noqa: ANN401
        """Return the answer to each request, "" where there is none; documents are read once.

        An answer ends before the first of the request's stop strings that it holds.

        Raises:
            ReadError: if a row lacks one of the two fields.
        """
        groups: dict[str, list[int]] = {}
        questions = []
        for number, request in enumerate(requests):
            document, question = (self._field(request, name) for name in self._fields)
            groups.setdefault(document, []).append(number)
            questions.append(question)
        told = [""] * len(requests)
        for document, numbers in groups.items():
            outcomes = self._library.service().answer_many(
                [questions[number] for number in numbers],
                document_ids=[self._document_id(document)],
                route=self._route,
            )
            for index, outcome in outcomes:
                number = numbers[index]
                if isinstance(outcome, FathomError):
                    logger.warning("no answer to %r: %s", questions[number], outcome.message)
                    self.failures.append(outcome)
                    continue
                self.taken[str(outcome.receipt.route)] += 1
                told[number] = _until(self._words(outcome), requests[number].args[1])
        return told

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> Any:  # noqa: ANN401
        """Raise: an answer that stands on quotations has no likelihood of another one."""
        raise ReadError(
            "the task wants likelihoods of given answers; Fathom answers questions",
            hint="choose a task whose output_type is generate_until",
        )

    loglikelihood_rolling = loglikelihood

    def _field(self, request: Instance, name: str) -> str:
        value = request.doc.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ReadError(
                f"a row of the task has no text in the field {name!r}; its fields are:"
                f" {', '.join(map(str, request.doc))}",
                hint="name them with --document-field and --question-field",
            )
        return value

    def _document_id(self, text: str) -> int:
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        if sha256 not in self._ids:
            path = self._folder / f"{sha256[:16]}.txt"
            path.write_text(text, encoding="utf-8")
            self._ids[sha256] = self._library.ingest(path).document.id
        return self._ids[sha256]

    def _words(self, answer: Answer) -> str:
        """Return what the task is told: the stretch quoted, or what was written, without marks."""
        if answer.abstained:
            return self._abstains_with
        return quoted_stretch(answer) or answer_words(answer)


def run_tasks(
    tasks: Sequence[str],
    model: FathomLM,
    *,
    include: Path | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return a record for each task: its name, the questions asked and the harness's metrics.

    Args:
        tasks: names that the harness knows, or that are defined in `include`.
        model: answers them; ask a new one for each route, or its counts add up.
        include: a folder of task definitions (YAML).
        limit: questions of each task; None asks all.

    Raises:
        ReadError: if a task is unknown, its data is not here, or it wants likelihoods.
    """
    manager = _task_manager(tasks, include)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ReadError(
                f"lm-evaluation-harness knows no task {task!r}",
                hint="lm_eval ls tasks lists them; --include names a folder of your own",
            )
    started = time.perf_counter()
    try:
        found = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    except (OSError, ValueError) as error:  # what its loader of data raises
        raise ReadError(
            f"the task could not be prepared: {error}",
            hint="its data must be on this machine; HF_HUB_OFFLINE=0 lets the harness fetch it",
        ) from error
    seconds = time.perf_counter() - started
    return [
        {
            "task": task,
            "questions": found["n-samples"][task]["effective"],
            "metrics": {
                name.removesuffix(",none"): value
                for name, value in metrics.items()
                if isinstance(value, float) and "stderr" not in name
            },
            "routes": dict(model.taken),
            "failures": len(model.failures),
            "seconds": round(seconds, 1),
        }
        for task, metrics in found["results"].items()
    ]


def _task_manager(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """Return what finds the tasks; the harness's own thousands are read only if they are needed."""
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=str(include) if include else None)


def _until(text: str, generation: dict[str, Any]) -> str:
    stops = generation.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
