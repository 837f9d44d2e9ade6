"""Verbs on the library: ingest, list, collections, text, delete, reembed, doctor."""

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rag.errors import FathomError, UnsupportedFormatError
from rag.settings import load_settings
from ui.console import (
    CollectionOption,
    Documents,
    Home,
    Json,
    document_ids,
    err,
    ingest_bar,
    open_fathom,
    out,
    print_json,
    show_error,
)
from ui.formatting import plural

app = typer.Typer()

_PIPED_COLUMNS = 400  # where no screen breaks lines, a document is one of them


@app.command(
    epilog="Examples: fathom ingest report.pdf notes/  |  fathom ingest 'contracts/*.docx' -c deals"
    "  |  curl -s URL | fathom ingest - --name page.html  |  fathom ingest --sample",
)
def ingest(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders, quoted globs, - for stdin; with --fetch also URLs."),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Ingest the language reference in this Python.")
    ] = False,
    collection: Annotated[
        str | None,
        typer.Option("--collection", "-c", help="Group of documents that they join."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="File name of what comes from stdin.")
    ] = "stdin.txt",
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Allow the network, for the http(s) URLs given.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Read files into the library. The same file may be given again: it is known."""
    from ingest.pipeline import IngestFailure
    from ingest.sample import write_sample
    from ingest.sources import find_sources

    settings = load_settings(home=home)
    wanted = list(paths or [])
    if sample:
        wanted.append(str(write_sample(settings.home / "samples")))
    if not wanted:
        raise typer.BadParameter("give a file or a folder, or --sample")
    fathom = open_fathom(settings)
    failures = passed_over = 0
    scratch = settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as downloads, ingest_bar() as on_progress:
        sources = list(
            find_sources(
                wanted,
                settings=settings,
                downloads=Path(downloads),
                stdin_name=name,
                allow_network=fetch,
            )
        )
        if collection:
            sources = [_joining(source, collection) for source in sources]
        errors = [source for source in sources if isinstance(source, FathomError)]
        if len(errors) == len(sources):  # said at once: no model is loaded for them
            for error in errors:
                show_error(error)
            raise typer.Exit(1)
        for outcome in fathom.ingest_files(sources, on_progress=on_progress):
            if isinstance(outcome, IngestFailure):
                show_error(outcome.error)
                # a picture in a folder is no failure; a picture that was named is
                in_folder = isinstance(outcome.error, UnsupportedFormatError) and not outcome.title
                passed_over += in_folder
                failures += not in_folder
            elif as_json:
                print_json(
                    {"outcome": outcome.outcome, "message": outcome.message}
                    | {"document": outcome.document.to_json()}
                )
            else:
                out.print(outcome.message, markup=False)
                for warning in outcome.document.warnings:
                    err.print(f"  warning: {warning}", markup=False)
    if passed_over:
        err.print(f"{passed_over} of {len(sources)} files are of a kind that is not read")
    if failures:
        err.print(f"{failures} of {len(sources)} could not be read; the others are in the library")
        raise typer.Exit(1)


@app.command("list", epilog="Examples: fathom list  |  fathom list --all --json")
def list_documents(
    every: Annotated[bool, typer.Option("--all", help="Superseded versions too.")] = False,
    collection: CollectionOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the documents."""
    store = open_fathom(load_settings(home=home)).store
    documents = store.all(include_superseded=every, collection=collection)
    if as_json:
        for document in documents:
            print_json(document.to_json())
        return
    if not documents:
        err.print("the library is empty; add a document with: fathom ingest PATH")
        return
    columns = ("no.", "title", "version", "pages", "chunks", "characters", "added", "collections")
    table = Table(*columns, box=None)
    # a title is what -d takes, so it is broken into lines rather than cut
    table.columns[1].overflow = table.columns[-1].overflow = "fold"
    for d in documents:
        numbers = (str(d.version), str(d.num_pages or "-"), f"{d.num_chunks:,}", f"{d.num_chars:,}")
        table.add_row(
            str(d.id),
            escape(d.title),
            *numbers,
            d.created_at[:10],
            escape(", ".join(d.collections)),
        )
    screen = out if out.is_terminal else Console(width=_PIPED_COLUMNS, highlight=False)
    screen.print(table)


@app.command(
    epilog="Examples: fathom collections  |  fathom collections --add deals -d 3 -d 4"
    "  |  fathom collections --dissolve deals"
)
def collections(
    add: Annotated[
        str | None, typer.Option("--add", help="Put the documents given into this collection.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", help="Take the documents given out of it.")
    ] = None,
    dissolve: Annotated[
        str | None, typer.Option("--dissolve", help="Delete a collection, not its documents.")
    ] = None,
    documents: Documents = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the collections, and change what is in them."""
    fathom = open_fathom(load_settings(home=home))
    ids = document_ids(fathom, documents)
    if (add or remove) and not ids:
        raise typer.BadParameter("name the documents with --document")
    if add:
        fathom.store.add_to_collection(add, ids)
    if remove:
        fathom.store.remove_from_collection(remove, ids)
    if dissolve:
        fathom.store.dissolve_collection(dissolve)
    for found in fathom.store.collections():
        if as_json:
            print_json(found.to_json())
        else:
            out.print(f"{found.num_documents:>6}  {found.name}", markup=False)


@app.command(epilog="Examples: fathom text 1  |  fathom text report.pdf --start 0 --end 500")
def text(
    document: Annotated[str, typer.Argument(help="Number or title.")],
    start: Annotated[int, typer.Option(help="First character.", min=0)] = 0,
    end: Annotated[int | None, typer.Option(help="Character after the last.", min=0)] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Print a document's canonical text, which every citation's start and end refer to."""
    store = open_fathom(load_settings(home=home)).store
    found = store.find(document)
    if end is not None and end < start:
        raise typer.BadParameter(f"--end {end} lies before --start {start}")
    if start > found.num_chars:
        raise typer.BadParameter(
            f"--start {start} lies beyond the end: document {found.id} has {found.num_chars:,}"
            " characters"
        )
    content = store.text(found.id, start, end)
    if as_json:
        print_json(
            {"document": found.id, "start": start, "end": start + len(content)} | {"text": content}
        )
    else:
        sys.stdout.write(content + "\n")


@app.command(epilog="Examples: fathom delete 3  |  fathom delete -c deals --json")
def delete(
    documents: Annotated[list[str] | None, typer.Argument(help="Numbers or titles.")] = None,
    collection: CollectionOption = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Delete documents: text, vectors, original file, and their words in past answers.

    With --collection, the collection with every version of its documents, but for those that
    another collection holds too.
    """
    fathom = open_fathom(load_settings(home=home))
    doomed = [fathom.store.find(reference) for reference in documents or []]
    if not doomed and collection is None:
        raise typer.BadParameter("name a document, or a --collection")
    if doomed:
        fathom.delete(*(document.id for document in doomed))
    if collection:
        doomed += fathom.delete_collection(collection)
    for found in doomed:
        if as_json:
            print_json({"deleted": found.id, "title": found.title, "version": found.version})
        else:
            out.print(f"deleted document {found.id} {found.title!r}", markup=False)


@app.command(
    epilog="Examples: FATHOM_EMBEDDER=name fathom reembed  |  fathom reembed --embedder name --json"
)
def reembed(
    embedder: Annotated[
        str | None,
        typer.Option("--embedder", help="Catalog name, folder or hub id (FATHOM_EMBEDDER)."),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Change the library's embedder: embed all chunks beside the old vectors, then switch.

    The library answers meanwhile. A run that was stopped goes on where it was.
    """
    fathom = open_fathom(load_settings(home=home, embedder=embedder))
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        count = fathom.reembed(
            on_progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    name = fathom.embedder.fingerprint
    if as_json:
        print_json({"embedder": name, "chunks_embedded": count})
    else:
        out.print(
            f"{plural(count, 'chunk')} embedded; the library is searched with {name}", markup=False
        )


@app.command(epilog="Examples: fathom doctor  |  fathom doctor --repair")
def doctor(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended from what is right.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check that store, lexical index, FAISS and files agree."""
    from ui.doctor import examine
    from ui.doctor import repair as mend

    fathom = open_fathom(load_settings(home=home))
    if repair:
        for done in mend(fathom):
            err.print(f"  {done}", markup=False)
    failures = []
    for check in examine(fathom):
        if not check.passed:
            failures.append(check)
        if as_json:
            print_json(check.to_json())
        else:
            out.print(
                f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}", markup=False
            )
    consistent = all(check.about != "library" for check in failures)
    if as_json:
        print_json({"consistent": consistent, "failed": [check.name for check in failures]})
    else:
        out.print("the library is consistent" if consistent else "the library is NOT consistent")
    if failures:
        if any(check.repairable for check in failures) and not repair:
            err.print("hint: fathom doctor --repair")
        raise typer.Exit(1)


def _joining(source: Any, collection: str) -> Any:  # noqa: ANN401 - a SourceToRead or its error
    return source if isinstance(source, FathomError) else replace(source, collection=collection)
