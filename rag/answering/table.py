"""Many questions about the same documents, side by side where their prompts begin with the same."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event

from rag.answering.asked import Asked, askable
from rag.answering.naming import named_documents
from rag.answering.outcome import Outcome
from rag.answering.planning import Plan, Planner
from rag.answering.writing import written_outcome
from rag.errors import FathomError, ModelError, QuestionError
from rag.lm.engine import DocumentPrefix, Engine, GenerationDone, TextPiece
from rag.store.documents import DocumentStore
from rag.types import Answer, Document, Route

logger = logging.getLogger(__name__)

# From a plan, and what it came to if it was tried, to the stored answer; none where a stop left a
# half one.
Answered = Callable[[Asked, Plan, Event, Outcome | None], Iterator[Answer]]


class Table:
    """Answers the questions of a table with one planner."""

    def __init__(
        self, planner: Planner, store: DocumentStore, *, max_new_tokens: int, answered: Answered
    ) -> None:
        """Take what all questions have in common.

        Args:
            planner: plans each question.
            store: where quotations are read again.
            max_new_tokens: the longest answer.
            answered: goes on from a plan alone, reads more if need be, and stores the receipt.
        """
        self._planner, self._store = planner, store
        self._max_new_tokens, self._answered = max_new_tokens, answered

    def answer(
        self,
        questions: Mapping[int, str],
        documents: Sequence[Document],
        route: Route | None,
        stop: Event,
    ) -> Iterator[tuple[int, Answer | FathomError]]:
        """Plan these questions, then answer together those whose prompts begin with the same.

        Args:
            questions: by their numbers.
            documents: those asked about.
            route: the route asked for, None lets the router choose.
            stop: set it to end; what is not answered by then is not yielded.
        """
        groups: dict[tuple[DocumentPrefix | None, Engine], dict[int, tuple[Asked, Plan]]] = {}
        for number, typed in questions.items():
            if stop.is_set():
                return
            try:
                question = askable(typed)
            except QuestionError as error:
                yield number, error
                continue
            asked = Asked(
                question,
                question,
                documents,
                named_documents(question, documents),
                started=time.perf_counter(),
                asked_for=route,
                may_read_more=route is None,
                keeps_half=False,
            )
            try:
                plan = self._planner.plan(question, asked.documents, route=route, calibrate=True)
                if not plan.is_written:  # nothing to share with others
                    for answer in self._answered(asked, plan, stop, None):
                        yield number, answer
                    continue
            except FathomError as error:
                yield number, error
            else:
                groups.setdefault((plan.prefix, plan.engine), {})[number] = asked, plan
        for (prefix, engine), group in groups.items():
            yield from self._answer_group(group, prefix, engine, stop)

    def _answer_group(
        self,
        group: Mapping[int, tuple[Asked, Plan]],
        prefix: DocumentPrefix | None,
        engine: Engine,
        stop: Event,
    ) -> Iterator[tuple[int, Answer | FathomError]]:
        left = dict(group)
        tried: dict[int, Outcome] = {}
        try:
            for number, outcome in self._written(group, prefix, engine, stop):
                tried[number] = outcome
                if outcome.is_answer:
                    asked, plan = left.pop(number)
                    for answer in self._answered(asked, plan, stop, outcome):
                        yield number, answer
        except ModelError as error:
            logger.warning("questions asked together are asked one by one: %s", error.message)
        # More is read for the others once the engine is free again.
        for number, (asked, plan) in left.items():
            if stop.is_set():
                return
            try:
                for answer in self._answered(asked, plan, stop, tried.get(number)):
                    yield number, answer
            except FathomError as error:
                yield number, error

    def _written(
        self,
        group: Mapping[int, tuple[Asked, Plan]],
        prefix: DocumentPrefix | None,
        engine: Engine,
        stop: Event,
    ) -> Iterator[tuple[int, Outcome]]:
        """Yield the number of each plan as it ends, and its outcome; none of what was stopped."""
        numbers = list(group)
        prompts = [plan.prompt for _, plan in group.values()]
        predict = engine.predicted_prefill_seconds
        # Before the first answer, since each may mend the rate.
        alone = [predict(prompt.num_tokens) for prompt in prompts]
        kept = prefix.num_tokens if prefix else 0
        rest = [predict(prompt.num_tokens, cached_tokens=kept) for prompt in prompts]
        written: list[list[str]] = [[] for _ in numbers]
        for index, step in engine.generate_many(
            prompts, max_new_tokens=self._max_new_tokens, stop=stop, prefix=prefix
        ):
            if isinstance(step, TextPiece):
                written[index].append(step.text)
            elif isinstance(step, GenerationDone) and not step.stopped:
                asked, plan = group[numbers[index]]
                outcome = written_outcome(
                    asked.question,
                    plan,
                    self._planner.read_extent(plan, asked.documents),
                    "".join(written[index]),
                    step,
                    rest[index] if step.reused_tokens else alone[index],
                    store=self._store,
                )
                yield numbers[index], outcome
