"""A table of questions about long documents: as a batch, and one by one without document KV."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from threading import Event
from typing import TYPE_CHECKING, Any

from eval.batch import PlacedQuestion, answer_questions
from eval.batch_journal import Journal
from eval.bench.machine import CLOCKS, Machine, peak_resident_bytes, this_machine
from eval.evidence_sets import EvidenceQuestion
from rag.answering.service import AnsweringService
from rag.errors import ReadError
from rag.lm.batch_generation import MOST_ROWS, shared_batch_bytes
from rag.lm.spec import ModelSpec
from rag.settings import MIB
from rag.types import Answer, Document, Receipt, Route

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One document: its questions as a batch, and a few of them alone; seconds are of all of them.

    `same_answers` counts the questions asked alone whose answer reads the same in the batch.
    `resident_bytes` is by how much the process grew at most while the batch was answered, what
    allocators hold besides included; `promised_bytes` is what the tensors of the rows in step may
    take, None where a server runs the model.
    """

    title: str
    prompt_tokens: int
    num_questions: int
    batch_seconds: float
    num_alone: int
    alone_seconds: float
    num_prefills: int
    same_answers: int
    resident_bytes: int
    promised_bytes: int | None


@dataclass(frozen=True, slots=True)
class BatchBench:
    """What `fathom bench batch` shows.

    `alone_seconds` is what all questions would take one by one: the mean of those really asked so,
    document by document, times their number. `ratio` is that over `batch_seconds`.
    """

    model: str
    clock: str
    machine: Machine
    max_new_tokens: int
    num_questions: int
    num_alone: int
    rows: tuple[DocumentRow, ...]
    batch_seconds: float
    alone_seconds: float
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench batch` prints last."""
        return {"bench": "batch", **asdict(self)}


def documents_that_fit(
    documents: Sequence[Document],
    questions: Mapping[int, Sequence[EvidenceQuestion]],
    service: AnsweringService,
    *,
    num_documents: int,
    num_questions: int,
) -> list[tuple[Document, list[str]]]:
    """Return the first documents that can be read whole, each with as many questions as others.

    Args:
        documents: to choose from, in order.
        questions: of each document, by its number.
        service: knows what fits the model.
        num_documents: so many are chosen.
        num_questions: of all of them together.

    Raises:
        ReadError: if there are fewer.
    """
    each = num_questions // num_documents
    chosen: list[tuple[Document, list[str]]] = []
    for document in documents:
        asked = [question.question for question in questions[document.id][:each]]
        if len(asked) < each:
            continue
        longest = max(asked, key=len)
        if service.plan(longest, [document], route=Route.FULL).decision.route is not Route.FULL:
            continue
        chosen.append((document, asked))
        if len(chosen) == num_documents:
            return chosen
    raise ReadError(
        f"{len(chosen)} documents with {each} questions each fit this model; expected"
        f" {num_documents}",
        hint="give another --split, fewer --documents, or a model with a longer context",
    )


def bench_batch(
    chosen: Sequence[tuple[Document, list[str]]],
    together: AnsweringService,
    alone: AnsweringService,
    journal: Journal,
    *,
    model: str,
    spec: ModelSpec | None,
    device: "torch.device",
    max_new_tokens: int,
    num_alone: int,
    clock: str = "wall",
    on_progress: Callable[[str], None] = lambda _: None,
) -> BatchBench:
    """Take turns, document by document: a few questions alone, then all of them as a batch.

    Both read every document whole (the route `full`) and are ready before the clock starts.

    Args:
        chosen: the documents with their questions.
        together: the service of the batch, as people have it.
        alone: another that keeps no document.
        journal: a new one, as every batch has it.
        model: its name.
        spec: its shape, None where a server runs it.
        device: where it runs.
        max_new_tokens: the longest answer of both, as their settings have it.
        num_alone: how many questions of each document are asked alone; spread over its questions.
        clock: `wall`, or `cpu` where others have the machine for most of the time.
        on_progress: called with what is run next.
    """
    read_clock = CLOCKS[clock]
    rows = []
    for number, (document, questions) in enumerate(chosen, start=1):
        step = max(1, len(questions) // num_alone)
        sample = questions[::step][:num_alone]
        on_progress(f"document {number} of {len(chosen)}: {len(sample)} questions alone")
        begun = read_clock()
        by_question = {
            question: alone.answer(question, document_ids=[document.id], route=Route.FULL)
            for question in sample
        }
        alone_seconds = read_clock() - begun
        on_progress(f"document {number} of {len(chosen)}: {len(questions)} questions as a batch")
        placed = [
            PlacedQuestion(n, f"{document.id}-{n}", text, (document.id,), Route.FULL, text)
            for n, text in enumerate(questions)
        ]
        begun = read_clock()
        with peak_resident_bytes() as grown:
            outcomes = list(answer_questions(placed, together, journal, stop=Event()))
        batch_seconds = read_clock() - begun
        answers: dict[str, Answer] = {}
        for question, outcome in outcomes:
            if not isinstance(outcome, Answer):
                raise outcome
            answers[question.text] = outcome
        receipts = [answer.receipt for answer in answers.values()]
        rows.append(
            DocumentRow(
                title=document.title,
                prompt_tokens=max(receipt.prompt_tokens for receipt in receipts),
                num_questions=len(questions),
                batch_seconds=batch_seconds,
                num_alone=len(sample),
                alone_seconds=alone_seconds,
                num_prefills=sum(not receipt.cached_tokens for receipt in receipts),
                same_answers=sum(
                    answers[question].answer == answer.answer
                    for question, answer in by_question.items()
                ),
                resident_bytes=grown(),
                promised_bytes=_promised_bytes(spec, receipts, max_new_tokens),
            )
        )
    batch_total = sum(row.batch_seconds for row in rows)
    alone_total = sum(row.alone_seconds / row.num_alone * row.num_questions for row in rows)
    return BatchBench(
        model=model,
        clock=clock,
        machine=this_machine(device),
        max_new_tokens=max_new_tokens,
        num_questions=sum(row.num_questions for row in rows),
        num_alone=sum(row.num_alone for row in rows),
        rows=tuple(rows),
        batch_seconds=batch_total,
        alone_seconds=alone_total,
        ratio=alone_total / batch_total,
    )


def _promised_bytes(
    spec: ModelSpec | None, receipts: Sequence[Receipt], max_new_tokens: int
) -> int | None:
    """Return what the rows of a batch are reckoned to take at most, if they shared a document."""
    if spec is None:
        return None
    return shared_batch_bytes(
        spec,
        min(MOST_ROWS, len(receipts)),
        max(receipt.prompt_tokens for receipt in receipts) + max_new_tokens,
        shared_tokens=max(receipt.cached_tokens or 0 for receipt in receipts),
    )


def card(bench: BatchBench) -> str:
    """Return the figures for people."""
    each = mean(row.alone_seconds / row.num_alone for row in bench.rows)
    same = sum(row.same_answers for row in bench.rows)
    return "\n".join(
        [
            f"{bench.model}; {bench.machine.describe()}",
            f"{bench.num_questions} questions about {len(bench.rows)} documents, read whole;"
            f" answers of at most {bench.max_new_tokens} tokens; {bench.clock} seconds",
            *(
                f"  {row.title[:32]:<32} {row.prompt_tokens:7,} tokens"
                f"  batch {row.batch_seconds:8.1f} s for {row.num_questions}"
                f" ({row.num_prefills} prefilled), grew by {_mib(row.resident_bytes)},"
                f" reckoned {_mib(row.promised_bytes)}"
                f"  alone {row.alone_seconds / row.num_alone:7.1f} s each"
                for row in bench.rows
            ),
            f"as a batch {bench.batch_seconds:,.1f} s; one by one without document KV"
            f" {bench.alone_seconds:,.1f} s: {bench.ratio:.1f} times",
            f"one by one is reckoned from {bench.num_alone} questions really asked so, {each:.1f} s"
            f" each, times {bench.num_questions}; {same} of them were answered in the same words",
        ]
    )


def _mib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / MIB:,.0f} MiB"
