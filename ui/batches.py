"""One owner's batches: a table of questions in, a table of cited answers out; see `Library`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval.batch import Outcome, Question, read_questions
from eval.batch_output import ANSWERS, CITATIONS, answer_tables
from eval.tables import Table, holds_lists, write_table
from rag.errors import EmptyLibraryError, FathomError, QuotaError, TableError
from rag.types import Answer, Route
from ui.batch_folder import Batch, Fault, State
from ui.batch_runs import BatchRuns, place_rows

if TYPE_CHECKING:
    from ui.library import Library

MOST_ROWS, MOST_BATCHES = 10_000, 200  # of one batch, of one owner


class OwnBatches:
    """What one owner may do with batches; nobody else's is ever found."""

    def __init__(self, runs: BatchRuns, library: "Library") -> None:
        self._runs = runs
        self._folders = runs.folders
        self._library = library

    def create(
        self,
        name: str,
        content: bytes,
        *,
        document_ids: Sequence[int] | None = None,
        route: Route | None = None,
    ) -> Batch:
        """Keep a table of questions, and find out which rows cannot be asked; nothing is asked yet.

        Args:
            name: of the file; its suffix says what it is.
            content: the file.
            document_ids: of rows that name no document; None for all there are now.
            route: of rows that name none.

        Raises:
            TableError: if it is no table of questions.
            EmptyLibraryError: if there is nothing to ask about.
            QuotaError: if it is too long, or there are too many batches already.
        """
        if len(self.all()) >= MOST_BATCHES:
            raise QuotaError(
                f"you have {MOST_BATCHES} batches already", hint="delete those that are done with"
            )
        batch, questions = self._folders.create(self._library.owner, name, content)
        try:
            if len(questions) > MOST_ROWS:
                raise QuotaError(
                    f"the table has {len(questions):,} rows; at most {MOST_ROWS:,} are taken",
                    hint="split it",
                )
            return self.aim(batch.id, document_ids=document_ids, route=route)
        except BaseException:
            self._folders.delete(batch)
            raise

    def aim(
        self, batch_id: str, *, document_ids: Sequence[int] | None, route: Route | None
    ) -> Batch:
        """Say what the rows are asked of that name no document or route, before they are asked.

        Raises:
            EmptyLibraryError: if there is nothing to ask about.
            TableError: if the batch was begun.
        """
        batch = self.find(batch_id)
        if batch.state is not State.READY:
            raise TableError("the batch was begun already", hint="give the table once more")
        questions = read_questions(self._folders.table(batch))
        if document_ids is None:
            document_ids = [document.id for document in self._library.documents()]
        if not document_ids and any(question.document is None for question in questions):
            raise EmptyLibraryError(
                "there is no document to ask about", hint="add one first, in the Library"
            )
        aimed = replace(batch, document_ids=tuple(document_ids), route=route)
        _, wrong = place_rows(self._library, aimed, questions, model="")
        faults = {number: Fault.of(error) for number, error in wrong.items()}
        aimed = replace(aimed, faults=faults)
        self._folders.save(aimed)
        return aimed

    def all(self) -> list[Batch]:
        """Return the owner's batches, the latest first."""
        return self._folders.all(self._library.owner)

    def find(self, batch_id: str) -> Batch:
        """Return a batch.

        Raises:
            BatchNotFoundError: if the owner has none of this id.
        """
        return self._folders.find(self._library.owner, batch_id)

    def start(self, batch_id: str) -> Batch:
        """Have a batch answered, from where it was left; rows with a fault are asked again."""
        self._runs.start(self.find(batch_id))
        return self.find(batch_id)

    def stop(self, batch_id: str) -> Batch:
        """Stop a batch; what is answered stays."""
        self._runs.stop(self.find(batch_id))
        return self.find(batch_id)

    def delete(self, batch_id: str) -> None:
        """Delete a batch: its table, its answers and their receipts."""
        self._runs.delete(self.find(batch_id))

    def delete_all(self) -> None:
        """Delete every batch of the owner."""
        for batch in self.all():
            self._runs.delete(batch)

    def told(self, batch: Batch) -> dict[str, Any]:
        """Return how far a batch is, as JSON: its record, and what is being read."""
        run = self._runs.run_of(batch)
        answered = batch.num_answered
        if run is not None:
            answered = run.journal.num_answered
        return {
            "id": batch.id,
            "name": batch.name,
            "created_at": batch.created_at,
            "state": batch.state,
            "rows": batch.num_rows,
            "answered": answered,
            "documents": list(batch.document_ids),
            "route": batch.route,
            "now": run.now if run else None,
            "seconds_left": run.seconds_left if run else None,
            "problem": asdict(batch.problem) if batch.problem else None,
            "faults": [
                {"row": number + 1, **asdict(fault)}
                for number, fault in sorted(batch.faults.items())
            ],
        }

    def outcomes(self, batch: Batch) -> tuple[Table, list[Question], dict[int, Outcome]]:
        """Return the table, its questions, and what came of each row so far."""
        table = self._folders.table(batch)
        questions = read_questions(table)
        found: dict[int, Outcome] = {}
        with self._runs.journal(batch) as journal:
            for question in questions:
                answer = journal.latest(question.id) if journal else None
                if answer is not None:
                    found[question.number] = answer
                elif fault := batch.faults.get(question.number):
                    found[question.number] = FathomError(fault.message, hint=fault.hint)
        return table, questions, found

    def result(self, batch: Batch, suffix: str) -> bytes:
        """Return the table of the answers so far as a file.

        Args:
            batch: of `find`.
            suffix: .xlsx, .csv, .tsv, .jsonl or .parquet; an XLSX has the citations as a sheet.
        """
        table, questions, outcomes = self.outcomes(batch)
        scratch = self._library.settings.home / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=scratch) as folder:
            path = Path(folder) / f"answers{suffix}"
            answers, citations = answer_tables(
                table,
                questions,
                outcomes,
                holds_lists=holds_lists(path),
                source_of=self._addresses(outcomes).get,
            )
            write_table(path, answers, sheet=ANSWERS, further={CITATIONS: citations})
            return path.read_bytes()

    def _addresses(self, outcomes: dict[int, Outcome]) -> dict[int, str]:
        """Return the web addresses that documents came from; where a file lay is not told."""
        wanted = {
            citation.document
            for outcome in outcomes.values()
            if isinstance(outcome, Answer)
            for citation in outcome.citations
        }
        return {
            document.id: document.source
            for document in self._library.store.all(include_superseded=True)
            if document.id in wanted and document.source.startswith(("http://", "https://"))
        }
