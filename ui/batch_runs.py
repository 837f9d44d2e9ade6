"""The batches that are being answered: one at a time for each owner, a row a turn at the model.

A row waits in the fair queue like a question that a person types, so that nobody waits for a batch
longer than for the row that is running. What a row was answered is in the journal before it counts:
a server that is killed goes on with the next row when it starts again. Of several servers on one
library one answers a batch, whose claim it holds; another goes on with it once that is killed.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from eval.batch import (
    PlacedQuestion,
    Question,
    answer_questions,
    begin_run,
    place_questions,
    read_questions,
)
from eval.batch_journal import Journal
from rag.answering.service import AnswerEvent, RouteChosen
from rag.errors import DocumentNotFoundError, FathomError, QuotaError
from rag.lm.engine import PrefillProgress, TextPiece
from rag.store.receipts import REDACTED, ReceiptStore
from rag.types import Answer, Route
from ui.batch_folder import UNFINISHED, Batch, BatchFolders, Fault, State, unfinished
from ui.fair_queue import Waiting

if TYPE_CHECKING:
    from ui.assembly import Fathom
    from ui.library import Library

logger = logging.getLogger(__name__)
_FULL_QUEUE_SECONDS = 1.0  # until a row asks again for a place in a queue that was full
_CLAIM_SECONDS = 2.0  # between two looks at whether a batch is another server's still


@dataclass(slots=True)
class Run:
    """A batch that is being answered now."""

    journal: Journal
    num_left: int = 0  # rows without answer or fault
    num_done: int = 0  # rows done in this run
    now: str = "preparing"
    began: float = field(default_factory=time.monotonic)
    stop: Event = field(default_factory=Event)
    wants: State = State.STOPPED  # what it is to be once it has stopped
    is_deleted: bool = False

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last row at the rate so far, None before the first."""
        if not self.num_done:
            return None
        return (time.monotonic() - self.began) / self.num_done * self.num_left


class BatchRuns:
    """The threads that answer batches, one for each owner that has one unfinished."""

    def __init__(self, fathom: "Fathom") -> None:
        self._fathom = fathom
        self.folders = BatchFolders(fathom.settings.home / "batches")
        self._lock = threading.RLock()
        self._runs: dict[str, Run] = {}
        self._workers: dict[str, threading.Thread] = {}
        self._closed = Event()

    def go_on(self) -> None:
        """Answer what was waiting or running when the server before this one ended."""
        self.folders.clear()
        for owner in {batch.owner for batch in unfinished(self.folders.all(None))}:
            self._wake(owner)

    def close(self) -> None:
        """Stop after the rows that are being answered; the next server goes on with the rest."""
        with self._lock:
            self._closed.set()
            for run in self._runs.values():
                _halt(run, State.RUNNING)
            workers = list(self._workers.values())
        for worker in workers:
            worker.join(30)

    def run_of(self, batch: Batch) -> Run | None:
        """Return how a batch is being answered now, None if it is not."""
        return self._runs.get(batch.id)

    def start(self, batch: Batch) -> None:
        """Have a batch answered, from where it was left."""
        with self._lock:
            if batch.state in (State.READY, State.STOPPED, State.DONE, State.FAILED):
                self.folders.change(batch, state=State.WAITING, problem=None)
            self._wake(batch.owner)

    def stop(self, batch: Batch) -> None:
        """Stop a batch within a token; the rows that are answered stay."""
        with self._lock:
            if run := self._runs.get(batch.id):
                _halt(run, State.STOPPED)
            elif batch.state in (State.WAITING, State.RUNNING):
                self.folders.change(batch, state=State.STOPPED)

    def delete(self, batch: Batch) -> None:
        """Delete a batch with its answers; one that is being answered is stopped."""
        with self._lock:
            if run := self._runs.get(batch.id):
                _halt(run, State.STOPPED, is_deleted=True)
            with self.journal(batch) as journal:
                receipts = set(journal.receipts) if journal else set()
            self.folders.delete(batch)
        self._fathom.for_owner(batch.owner).receipts.delete(receipts)

    @contextmanager
    def journal(self, batch: Batch) -> Iterator[Journal | None]:
        """Yield a batch's journal to look at, None if there is none."""
        with self._lock:
            if run := self._runs.get(batch.id):
                yield run.journal
            elif (path := self.folders.journal_path(batch)).exists():
                with Journal(path, to_read=True) as journal:
                    yield journal
            else:
                yield None

    def redact(self) -> None:
        """Take the words of documents that were deleted out of the journals, as out of receipts.

        Another server does so with the one that it writes when it ends it.
        """
        for batch in self.folders.all(None):
            with self._lock:
                if run := self._runs.get(batch.id):
                    self._redact(batch, run.journal)
                elif (path := self.folders.journal_path(batch)).exists():
                    with self.folders.claimed(batch) as is_ours:
                        if is_ours:
                            with Journal(path) as journal:
                                self._redact(batch, journal)

    def _redact(self, batch: Batch, journal: Journal) -> None:
        receipts = self._fathom.for_owner(batch.owner).receipts
        journal.rewrite(partial(_as_kept, receipts))

    def _wake(self, owner: str) -> None:
        with self._lock:
            if owner not in self._workers and not self._closed.is_set():
                name = f"batches of {owner or 'the library'}"
                worker = threading.Thread(target=self._work, args=[owner], name=name, daemon=True)
                self._workers[owner] = worker
                worker.start()

    def _work(self, owner: str) -> None:
        """Answer the batches of an owner, one after the other, until none is left."""
        while True:
            with self._lock:
                batch = next(unfinished(self.folders.all(owner)), None)
                if batch is None or self._closed.is_set():
                    del self._workers[owner]
                    return
            with self.folders.claimed(batch) as is_ours:
                run = self._begun(batch) if is_ours else None
                if run is not None:
                    self._answer(batch, run)
            if not is_ours:
                self._closed.wait(_CLAIM_SECONDS)

    def _begun(self, batch: Batch) -> Run | None:
        """Begin to answer a batch that is claimed; None if it is none to answer any more."""
        with self._lock:
            now = self.folders.reread(batch)
            if now is None or now.state not in UNFINISHED:
                return None  # another server has ended it before it was claimed
            self.folders.change(now, state=State.RUNNING)
            try:
                journal = Journal(self.folders.journal_path(batch))
            except FathomError as error:
                self.folders.change(now, state=State.FAILED, problem=Fault.of(error))
                return None
            run = self._runs[batch.id] = Run(journal)
            return run

    def _answer(self, batch: Batch, run: Run) -> None:
        """Answer a batch as far as it goes, and write down how far that was."""
        faults: dict[int, Fault] = {}
        state, problem = State.DONE, None
        try:
            self._answer_rows(batch, run, faults)
            if run.stop.is_set():
                state = run.wants
        except FathomError as error:
            state, problem = State.FAILED, Fault.of(error)
        except Exception as error:
            logger.exception("the batch %s ended", batch.id)
            told = FathomError(
                f"something unexpected went wrong: {type(error).__name__}",
                hint="the log of `fathom serve` has the details; start the batch again",
            )
            state, problem = State.FAILED, Fault.of(told)
        with self._lock:
            num_answered = run.journal.num_answered
            if self.folders.reread(batch) is not None:
                self._redact(batch, run.journal)  # documents that another server has deleted
            self.folders.change(
                batch, state=state, problem=problem, faults=faults, num_answered=num_answered
            )
            del self._runs[batch.id]
            run.journal.__exit__(None, None, None)
        if run.is_deleted:  # what was answered between
            self._fathom.for_owner(batch.owner).receipts.delete(run.journal.receipts)

    def _answer_rows(self, batch: Batch, run: Run, faults: dict[int, Fault]) -> None:
        library = self._fathom.for_owner(batch.owner)
        questions = read_questions(self.folders.table(batch))
        model = self._fathom.engine.name
        placed, wrong = place_rows(library, batch, questions, model=model)
        begin_run(placed, run.journal, library.receipts, model=model)
        answered = {q.number for q in questions if run.journal.latest(q.id) is not None}
        faults |= {n: Fault.of(error) for n, error in wrong.items() if n not in answered}
        left = [question for question in placed if question.number not in answered]
        run.num_left, run.began = len(left), time.monotonic()
        turns = _Turns(library, run)
        for question, outcome in answer_questions(left, turns, run.journal, stop=run.stop):
            if isinstance(outcome, FathomError):
                faults[question.number] = Fault.of(outcome)
            run.num_done += 1
            run.num_left -= 1
            now = self.folders.reread(batch)
            if not run.stop.is_set() and (now is None or now.state is not State.RUNNING):
                # by another server
                _halt(run, now.state if now else State.STOPPED, is_deleted=now is None)


def place_rows(
    library: "Library", batch: Batch, questions: Sequence[Question], *, model: str
) -> tuple[list[PlacedQuestion], dict[int, FathomError]]:
    """Return the rows that can be asked, and what is wrong with the others.

    Rows that name no document are asked of those the batch was made for; if one of these is gone,
    they are not asked of the rest.
    """
    gone: FathomError | None = None
    default = []
    try:
        default = library.store.with_ids(batch.document_ids)
    except DocumentNotFoundError as error:
        gone = error
    placed, wrong = place_questions(
        questions, library.store, default=default, route=batch.route, model=model
    )
    if gone is not None:
        wrong |= {question.number: gone for question in questions if question.document is None}
    return [question for question in placed if question.number not in wrong], wrong


class _Turns:
    """Answers a row when it is its turn, and notes for people how far that is."""

    def __init__(self, library: "Library", run: Run) -> None:
        self._library = library
        self._run = run

    def stream(
        self, question: str, *, document_ids: Sequence[int], route: Route | None, stop: Event
    ) -> Iterator[Waiting | AnswerEvent]:
        """Answer one row; where the queue is full, it tries again."""
        while not stop.is_set():
            try:
                for event in self._library.stream(
                    question, document_ids=document_ids, route=route, stop=stop
                ):
                    if not stop.is_set():
                        self._run.now = _words(event, question) or self._run.now
                    yield event
                return
            except QuotaError:
                stop.wait(_FULL_QUEUE_SECONDS)


def _words(event: Waiting | AnswerEvent, question: str) -> str | None:
    match event:
        case Waiting(place):
            return f"waiting for the model, place {place}: {question}"
        case RouteChosen(decision, _):
            return f"{decision.route}: {question}"
        case PrefillProgress(done, total):
            return f"reading {done:,} of {total:,} tokens: {question}"
        case TextPiece():
            return f"writing: {question}"
        case _:
            return None


def _as_kept(receipts: ReceiptStore, answer: Answer) -> Answer:
    """Return an answer as the store has it, if a document has taken its words along."""
    try:
        kept = receipts.load(answer.receipt.id)
    except DocumentNotFoundError:
        return answer
    return kept if kept.answer == REDACTED else answer


def _halt(run: Run, wants: State, *, is_deleted: bool = False) -> None:
    if not run.stop.is_set():
        run.journal.stop()
    run.is_deleted |= is_deleted
    run.wants, run.now = wants, "stopping"
    run.stop.set()
