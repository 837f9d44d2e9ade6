"""The next plan, where one came to nothing: more to read, or less where memory ran out."""

from collections.abc import Sequence
from dataclasses import replace

from rag.answering.planning import Plan, Planner
from rag.answering.scan_receipt import predicted_scan_seconds
from rag.errors import ModelError, OutOfMemoryError
from rag.routing.gates import describe, failed
from rag.settings import Settings
from rag.types import AnswerMode, Document, ReadExtent, Route


class Escalation:
    """Says what is tried after a plan, with the planner that made it."""

    def __init__(self, planner: Planner, settings: Settings) -> None:
        self._planner, self._settings = planner, settings

    def further(
        self, question: str, documents: Sequence[Document], plan: Plan, read: ReadExtent
    ) -> tuple[Plan | None, str]:
        """Return what to read after a plan found no supported answer, and why, in words.

        `read` is what was read by that plan.

        Twice as much, then everything: in one prompt where every gate passes, else in windows,
        where that takes no longer than the deadline of a prefill. None if there is nothing more to
        read, no time for it, or no use: a model that is to quote made answers up from the whole of
        a document where its sentences held none. Source: docs/decisions/0031.
        """
        if plan.is_extracted:
            written = self._planner.plan(
                question, documents, mode=AnswerMode.WRITTEN, calibrate=True, thrift=plan.thrift
            )
            return self._because(
                written, "no sentence holds the words asked for, so the model reads"
            )
        if plan.counted or plan.decision.route is not Route.RETRIEVAL:
            return None, "everything was read"
        mode = plan.decision.mode
        is_quoted = mode is AnswerMode.QUOTED
        before = f"the nearest {read.tokens:,} tokens gave no supported answer"
        if is_quoted:
            before = (
                f"the nearest chunks ({read.chunks:,} of {read.of_chunks:,}) seem to hold no answer"
            )
        if plan.breadth == 1:
            try:
                wider = self._planner.plan(
                    question,
                    documents,
                    route=None if is_quoted else Route.RETRIEVAL,
                    mode=mode if is_quoted else None,
                    calibrate=True,
                    breadth=2,
                    thrift=plan.thrift,
                )
            except ModelError:
                wider = plan
            is_more = wider.context.num_tokens > plan.context.num_tokens
            if read.chunks < read.of_chunks if is_quoted else is_more:
                return self._because(wider, f"{before}, so up to twice as much is read")
        if is_quoted:
            return None, f"{before}, and a model that is to quote is not asked to write"
        everything = self._planner.plan(
            question, documents, route=Route.FULL, calibrate=True, thrift=plan.thrift
        )
        against = failed(everything.decision.gates, Route.FULL)
        if not against:
            return self._because(everything, f"{before}, so everything is read")
        windows = self._planner.plan(
            question, documents, route=Route.SCAN, calibrate=True, thrift=plan.thrift
        )
        seconds = predicted_scan_seconds(windows.decision)
        too_long = seconds is None or seconds > self._settings.prefill_deadline_seconds
        if windows.decision.route is Route.SCAN and not too_long:
            return self._because(windows, f"{before}, so everything is read in windows")
        words = f"everything was not read: {describe(against[0])}"
        if seconds is not None and too_long:
            words += f", and in windows it would take about {seconds:,.1f} s"
        return None, words

    def smaller(
        self, question: str, documents: Sequence[Document], plan: Plan, problem: str
    ) -> tuple[Plan, str]:
        """Return what to do where memory ran out with `plan`, and that in words.

        Everything, then the retrieved passages, then half as many of them.

        Raises:
            OutOfMemoryError: if there is nothing smaller.
        """
        budget = self._settings.retrieval_tokens
        if plan.decision.route is Route.RETRIEVAL:
            budget //= 2
            if plan.context.num_tokens <= budget:
                raise OutOfMemoryError(problem)
        smaller = self._planner.plan(
            question,
            documents,
            route=Route.RETRIEVAL,
            calibrate=True,
            retrieval_tokens=budget,
            thrift=plan.thrift,
        )
        words = f"{problem}; so at most {budget:,} tokens of retrieved passages were read instead"
        reason = f"memory ran out on the route {plan.decision.route}: {words}"
        return self._because(smaller, reason)[0], words

    def _because(self, plan: Plan, words: str) -> tuple[Plan, str]:
        words += self._planner.cache_words(plan.engine)
        return replace(plan, decision=replace(plan.decision, reason=words)), words
