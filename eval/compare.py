"""The same questions by every arm, paired: asked, written down as they come, and gone on with.

What comes of it is rows (`eval.journal`); what they say is `eval.analysis`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Event

from eval.arms import Arm, Workplace, answer_by, spans_of
from eval.examples import EvalExample, load_examples
from eval.journal import Journal, Run, appending, check_same, read_journals
from rag.errors import DocumentNotFoundError, ReadError
from rag.store.documents import DocumentStore
from rag.types import Document

EXAMPLES = "examples.jsonl"
# An arm that reads a document whole would make it cheap for the router to do so, too; and what a
# router reads would be cheap for `full`. Each drops what is kept first; the cheap arms come first,
# so that a run that is ended early has whole pairs.
_ORDER = tuple(Arm)


def find_documents(
    examples: Sequence[EvalExample], find: Callable[[str], Document]
) -> dict[str, Document]:
    """Return the document of every example by the name that the example gives it.

    Args:
        examples: the questions.
        find: from a name to a document of the library.

    Raises:
        DocumentNotFoundError: naming every example whose document is not there.
    """
    found: dict[str, Document] = {}
    faults: dict[str, str] = {}
    for name in dict.fromkeys(example.document for example in examples):
        try:
            found[name] = find(name)
        except DocumentNotFoundError as error:
            faults[name] = error.message
    if faults:
        ids = [example.id for example in examples if example.document in faults]
        raise DocumentNotFoundError(
            "\n".join(faults.values())
            + f"\n{len(ids)} examples ask about them, e.g. {', '.join(ids[:5])}",
            hint="add them first: fathom ingest PATH...; fathom list shows what is there",
        )
    return found


def check_evidence(
    examples: Sequence[EvalExample], documents: Mapping[str, Document], store: DocumentStore
) -> None:
    """Refuse evidence that lies outside its document.

    Raises:
        ReadError: naming every example, and what is wrong.
    """
    faults = []
    for example in examples:
        document = documents[example.document]
        faults += [
            f"example {example.id}: evidence [{start}, {end}) ends after the"
            f" {document.num_chars:,} characters of {document.title}"
            for start, end in example.evidence
            if end > document.num_chars
        ]
        if example.pages and not spans_of(example, document, store):
            pages = ", ".join(map(str, example.pages))
            faults.append(f"example {example.id}: {document.title} has no page {pages}")
    if faults:
        raise ReadError(
            "\n".join(faults),
            hint="evidence counts characters of the text that `fathom text DOCUMENT` prints",
        )


def keep_examples(examples: Sequence[EvalExample], folder: Path) -> bool:
    """Write the examples into the folder of the comparison, or see that they are those there.

    Returns:
        Whether the comparison begins with this; else it goes on.

    Raises:
        ReadError: if the folder holds others.
    """
    path = folder / EXAMPLES
    if path.exists():
        if load_examples(path) != list(examples):
            raise ReadError(
                f"{path} holds other examples than those asked for",
                hint="give another folder with -o, or the same examples, --limit and --seed",
            )
        return False
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = (json.dumps(example.to_json(), ensure_ascii=False) for example in examples)
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)
    return True


def load_comparison(folder: Path) -> tuple[list[EvalExample], Journal]:
    """Return what a comparison left in its folder, to be scored again without a model.

    Raises:
        ReadError: if there is none.
    """
    if not (folder / EXAMPLES).is_file():
        raise ReadError(
            f"{folder} holds no comparison: there is no {EXAMPLES}",
            hint="make one first: fathom compare EXAMPLES -o DIR",
        )
    return load_examples(folder / EXAMPLES), read_journals(folder)


def compare(
    examples: Sequence[EvalExample],
    documents: Mapping[str, Document],
    arms: Sequence[Arm],
    place: Workplace,
    run: Run,
    folder: Path,
    *,
    shard: tuple[int, int] = (1, 1),
    at_once: int | None = None,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Event | None = None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Journal:
    """Ask what has not been asked yet, document by document; return all rows that there are.

    The rows of a document by an arm are on the disk together once they are answered: a process that
    is killed loses at most those it was at. What is kept of the document from another arm is
    dropped first, so that none reads for free what another paid for.

    Args:
        examples: the questions, those of `keep_examples`.
        documents: by the names that the examples give them.
        arms: the ways to answer.
        place: store, retriever and model.
        run: what the rows are made with.
        folder: of the journals.
        shard: (i, n) takes every n-th document, from the i-th; each shard writes its own journal.
        at_once: questions of a document that are asked together, and written together; None: all.
        turn: entered for the time in which those have the model, and left before the next.
        stop: set it to end; what was being asked then is not written, and asked again another time.
        on_progress: called with the arm, the rows done by this shard, and all of them.

    Raises:
        SettingsError: if rows there were made with other things, or are being written.
    """
    number, of = shard
    stop = stop or Event()
    before = read_journals(folder)
    if before.runs:
        check_same(before.runs[0], run)
    by_document: dict[str, list[EvalExample]] = {}
    for example in examples:
        by_document.setdefault(example.document, []).append(example)
    mine = list(by_document)[number - 1 :: of]
    total = len(arms) * sum(len(by_document[name]) for name in mine)
    num_done = 0
    name = "rows.jsonl" if of == 1 else f"rows-{number}-of-{of}.jsonl"
    with appending(folder / name, run) as journal:
        for document in mine:
            for arm in sorted(set(arms), key=_ORDER.index):
                asked = by_document[document]
                left = [e for e in asked if (e.id, arm) not in before.done]
                num_done += len(asked) - len(left)
                counted = num_done

                def on_answer(arm: Arm = arm) -> None:
                    nonlocal counted
                    counted += 1
                    on_progress(arm, counted, total)

                on_progress(arm, num_done, total)
                if left:
                    place.forget(documents[document])
                size = at_once or max(1, len(left))
                for begin in range(0, len(left), size):
                    part = left[begin : begin + size]
                    with turn():
                        rows = answer_by(
                            arm,
                            part,
                            documents[document],
                            place,
                            seed=run.seed,
                            stop=stop,
                            on_answer=on_answer,
                        )
                    if stop.is_set():
                        return read_journals(folder)
                    journal.append([row.to_json() for row in rows])
                    num_done += len(part)
                on_progress(arm, num_done, total)
    return read_journals(folder)
