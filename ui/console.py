"""What every verb shares: the two consoles, the common options, JSON lines, progress bars."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from rag.errors import FathomError
from rag.settings import Settings
from rag.types import Route
from ui.formatting import progress_words

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of the library (FATHOM_HOME).")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Catalog name, folder, GGUF file or hub id (FATHOM_MODEL)."),
]
Documents = Annotated[
    list[str] | None,
    typer.Option("--document", "-d", help="Number or title; may be repeated. Default: all."),
]
CollectionOption = Annotated[
    str | None, typer.Option("--collection", "-c", help="Only the documents of this collection.")
]
RouteOption = Annotated[
    Route | None, typer.Option("--route", help="Ask for a route; the gates still hold.")
]
ThriftOption = Annotated[
    float | None,
    typer.Option(
        "--thrift",
        min=0,
        max=1,
        help="Probability of being right that 1,000 prompt tokens are worth. Default:"
        " FATHOM_THRIFT.",
    ),
]


def open_fathom(settings: Settings) -> Any:  # noqa: ANN401
    """The library with its service; imported late, because --help must be instant."""
    from ui.assembly import Fathom

    fathom = Fathom(settings)
    if settings.user:
        fathom.accounts.require(settings.user)
    return fathom


def document_ids(
    fathom: Any,  # noqa: ANN401
    references: list[str] | None,
    collection: str | None = None,
) -> list[int] | None:
    """The numbers of the documents named and of the collection's; None where neither was given."""
    ids = [fathom.store.find(reference).id for reference in references or []]
    if collection:
        ids += [document.id for document in fathom.store.all(collection=collection)]
    return ids if references or collection else None


def print_json(value: dict[str, Any]) -> None:
    """Write one object a line on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def show_error(error: FathomError) -> None:
    """Two lines on stderr: what was found, and what to do."""
    err.print(f"error: {error.message}\nhint: {error.hint}", markup=False, soft_wrap=True)


@contextmanager
def ingest_bar() -> Iterator[Any]:
    """A bar whose callback takes `IngestProgress`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=1.0, figures="")

        def on_progress(event: Any) -> None:  # noqa: ANN401 - an IngestProgress
            progress.update(
                task,
                description=f"{event.stage} {event.title}",
                completed=event.fraction,
                figures=progress_words(event),
            )

        yield on_progress


@contextmanager
def stages_bar(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage that the callback is told of."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=err, transient=True) as progress:

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"{name}: {stage}", total=total)
            progress.update(tasks[stage], completed=done)

        yield on_progress
