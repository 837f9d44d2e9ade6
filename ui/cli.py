"""The command line: `fathom VERB`. Results on stdout, everything else on stderr."""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Annotated, Any, Never

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rag.errors import FathomError, UnsupportedFormatError
from rag.runtime import prepare_process
from rag.settings import Settings, load_settings
from rag.types import Route
from ui.formatting import progress_words

app = typer.Typer(
    name="fathom",
    help="Answer questions about long documents, say how they were read, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="List and fetch models.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed and quality on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of the library (FATHOM_HOME).")]
Model = Annotated[
    str | None, typer.Option("--model", help="Catalog name, folder or hub id (FATHOM_MODEL).")
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


def main() -> None:
    """Run the command line; a FathomError becomes two lines on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        prepare_process()
        app()
    except FathomError as error:
        _fail(error)
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        _fail(
            FathomError(
                f"the system answered: {error}",
                hint="check free space and permissions of the library's folder (--home)",
            )
        )
    except Exception as error:  # the edge: a person gets two lines, whoever mends it the traceback
        with NamedTemporaryFile("w", prefix="fathom-error-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        _fail(
            FathomError(
                f"something unexpected went wrong: {type(error).__name__}: {error}",
                hint=f"this is a fault in Fathom; {log.name} has the details. What was committed is"
                " kept: fathom doctor",
            )
        )


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
    fathom = _fathom(settings)
    failures = passed_over = 0
    scratch = settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as downloads, _ingest_progress() as on_progress:
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
                _show_error(error)
            raise typer.Exit(1)
        for outcome in fathom.ingest_files(sources, on_progress=on_progress):
            if isinstance(outcome, IngestFailure):
                _show_error(outcome.error)
                # a picture in a folder is no failure; a picture that was named is
                in_folder = isinstance(outcome.error, UnsupportedFormatError) and not outcome.title
                passed_over += in_folder
                failures += not in_folder
            elif as_json:
                _print_json(
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
    store = _fathom(load_settings(home=home)).store
    documents = store.all(include_superseded=every, collection=collection)
    if as_json:
        for document in documents:
            _print_json(document.to_json())
        return
    if not documents:
        err.print("the library is empty; add a document with: fathom ingest PATH")
        return
    columns = ("no.", "title", "version", "pages", "chunks", "characters", "added", "collections")
    table = Table(*columns, box=None)
    for d in documents:
        numbers = (str(d.version), str(d.num_pages or "-"), f"{d.num_chunks:,}", f"{d.num_chars:,}")
        table.add_row(
            str(d.id),
            escape(d.title),
            *numbers,
            d.created_at[:10],
            escape(", ".join(d.collections)),
        )
    out.print(table)


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
    fathom = _fathom(load_settings(home=home))
    ids = _document_ids(fathom, documents)
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
            _print_json(found.to_json())
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
    store = _fathom(load_settings(home=home)).store
    found = store.find(document)
    content = store.text(found.id, start, end)
    if as_json:
        _print_json(
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
    fathom = _fathom(load_settings(home=home))
    doomed = [fathom.store.find(reference) for reference in documents or []]
    if not doomed and collection is None:
        raise typer.BadParameter("name a document, or a --collection")
    if doomed:
        fathom.delete(*(document.id for document in doomed))
    if collection:
        doomed += fathom.delete_collection(collection)
    for found in doomed:
        if as_json:
            _print_json({"deleted": found.id, "title": found.title, "version": found.version})
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
    fathom = _fathom(load_settings(home=home, embedder=embedder))
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        count = fathom.reembed(
            on_progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    name = fathom.embedder.fingerprint
    if as_json:
        _print_json({"embedder": name, "chunks_embedded": count})
    else:
        out.print(f"{count:,} chunks embedded; the library is searched with {name}", markup=False)


@app.command(
    epilog="Examples: fathom ask 'Who signs?'  |  fathom ask --route full -d 1 'Who signs?' --json"
)
def ask(
    question: Annotated[str, typer.Argument(help="In words.")],
    documents: Documents = None,
    collection: CollectionOption = None,
    route: RouteOption = None,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Answer a question with citations and the receipt of how it was read."""
    from rag.answering.service import AnswerReady, RouteChosen
    from rag.lm.engine import PrefillProgress, TextPiece
    from ui.formatting import receipt_text

    if not question.strip():
        raise typer.BadParameter("the question is empty")
    fathom = _fathom(load_settings(home=home, model=model))
    ids = _document_ids(fathom, documents, collection)
    answer = None
    with err.status("loading the model") as status:
        for event in fathom.service().stream(question, document_ids=ids, route=route):
            if isinstance(event, RouteChosen):
                status.update(f"{event.decision.route}: reading {event.read}")
            elif isinstance(event, PrefillProgress):
                status.update(f"reading: {event.done:,} of {event.total:,} tokens")
            elif isinstance(event, TextPiece):
                status.update("writing")
            elif isinstance(event, AnswerReady):
                answer = event.answer
    assert answer is not None
    if as_json:
        _print_json(answer.to_json())
    else:
        out.print(receipt_text(answer), markup=False)


@app.command(epilog="Examples: fathom plan  |  fathom plan -d report.pdf --measure --json")
def plan(
    question: Annotated[str, typer.Argument(help="A question, if there is one.")] = "",
    documents: Documents = None,
    collection: CollectionOption = None,
    route: RouteOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the weights and time a prefill, too.")
    ] = False,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show which route would be taken and every gate's numbers, without reading a token."""
    from rag.routing.gates import describe

    fathom = _fathom(load_settings(home=home, model=model))
    ids = _document_ids(fathom, documents, collection)
    service = fathom.service()
    planned = service.plan(question, service.documents(ids), route=route, calibrate=measure)
    decision = planned.decision
    if as_json:
        _print_json(
            {
                "route": decision.route,
                "reason": decision.reason,
                "question_class": decision.question_class,
                "gates": [gate.to_json() for gate in decision.gates],
                "document_tokens": planned.document_tokens,
                "prompt_tokens": len(planned.prompt_ids),
                "longest_context_tokens": service.longest_context_tokens(),
                "model": fathom.engine.name,
            }
        )
        return
    out.print(f"{decision.route}: {decision.reason}", markup=False)
    for gate in decision.gates:
        verdict = "passed" if gate.passed else "FAILED"
        out.print(f"  {gate.route:<10} {verdict}  {describe(gate)}", markup=False)
    longest = service.longest_context_tokens()
    out.print(f"longest context that fits {fathom.engine.name} here: {longest:,} tokens")


@app.command(epilog="Examples: fathom receipt 1f2e3d4c5b6a  |  fathom receipt ID --json")
def receipt(
    receipt_id: Annotated[str, typer.Argument(help="The id in an answer's receipt.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show a past answer with its receipt."""
    from ui.formatting import receipt_text

    answer = _fathom(load_settings(home=home)).receipts.load(receipt_id)
    if as_json:
        _print_json(answer.to_json())
    else:
        out.print(receipt_text(answer), markup=False)


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

    fathom = _fathom(load_settings(home=home))
    if repair:
        for done in mend(fathom):
            err.print(f"  {done}", markup=False)
    failures = []
    for check in examine(fathom):
        if not check.passed:
            failures.append(check)
        if as_json:
            _print_json(check.to_json())
        else:
            out.print(
                f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}", markup=False
            )
    consistent = all(check.about != "library" for check in failures)
    if as_json:
        _print_json({"consistent": consistent, "failed": [check.name for check in failures]})
    else:
        out.print("the library is consistent" if consistent else "the library is NOT consistent")
    if failures:
        if any(check.repairable for check in failures) and not repair:
            err.print("hint: fathom doctor --repair")
        raise typer.Exit(1)


@app.command(epilog="Examples: fathom serve  |  fathom serve --port 8000")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind (FATHOM_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (FATHOM_PORT, 7860).")] = None,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Serve the chat in the browser."""
    from ui.app import serve as serve_page

    settings = load_settings(home=home, model=model, host=host, port=port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"

    def on_ready() -> None:
        if as_json:
            _print_json({"url": url})
        err.print(f"Fathom is at {url} (stop it with Ctrl-C)")

    serve_page(_fathom(settings), settings.host, settings.port, on_ready=on_ready)


@bench_app.command(
    "retrieval",
    epilog="Examples: fathom bench retrieval --data sets --split dev"
    "  |  fathom bench retrieval --data sets --set covidqa --limit 50 --json",
)
def bench_retrieval_verb(
    data: Annotated[Path, typer.Option("--data", help="Folder that holds a folder for each set.")],
    split: Annotated[str, typer.Option(help="dev (to tune on) or test (to report).")] = "dev",
    only: Annotated[
        list[str] | None, typer.Option("--set", help="A set's name; may be repeated. Default: all.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each set; default: all.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the chunks' vectors between runs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how often the evidence is found, beside a BM25 floor on the same questions."""
    from eval.bench.retrieval import bench_retrieval, card
    from eval.evidence_sets import SETS, load_evidence_set

    settings = load_settings()
    fathom = _fathom(settings)
    reports = []
    for name in only or list(SETS):
        evidence = load_evidence_set(data, name, split, limit=limit)
        with _stages(name) as on_progress:
            report = bench_retrieval(
                evidence,
                embedder=fathom.embedder,
                settings=settings,
                reranker=fathom.reranker,
                cache_folder=cache,
                on_progress=on_progress,
            )
        reports.append(report)
        (err if as_json else out).print(card(report), markup=False)
    line = {
        "bench": "retrieval",
        "split": split,
        "embedder": fathom.embedder.fingerprint,
        "reranker": settings.reranker,
        "chunk_tokens": settings.chunk_tokens,
        "num_candidates": settings.num_candidates,
        "sets": [report.to_json() for report in reports],
    }
    _print_json(line)


@models_app.command("list", epilog="Examples: fathom models list  |  fathom models list --json")
def models_list(as_json: Json = False) -> None:
    """List the catalog, and which of it is here."""
    from rag.lm.catalog import fetched_models, load_catalog

    here = {model.name for model in fetched_models(load_settings())}
    for entry in load_catalog().values():
        if as_json:
            _print_json(
                {"name": entry.name, "use": entry.use, "licence": entry.licence}
                | {"fetched": entry.name in here}
            )
        else:
            mark = "here" if entry.name in here else "    "
            out.print(f"{mark}  {entry.name:<20} {entry.use:<16} {entry.licence}", markup=False)


@models_app.command(
    "fetch", epilog="Examples: fathom models fetch smollm2-135m  |  fathom models fetch auto"
)
def models_fetch(
    names: Annotated[list[str], typer.Argument(help="Catalog names, hub ids, or auto.")],
    as_json: Json = False,
) -> None:
    """Fetch models, verify their checksums, convert them once to safetensors."""
    from rag.lm.catalog import fetch_model

    settings = load_settings()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    for name in names:
        with Progress(*columns, console=err, transient=True) as progress:
            task = progress.add_task(name, total=None)

            def on_progress(
                stage: str, done: int, total: int, task: TaskID = task, bar: Progress = progress
            ) -> None:
                bar.update(task, description=stage, completed=done, total=total or None)

            folder = fetch_model(name, settings, progress=on_progress)
        if as_json:
            _print_json({"name": name, "folder": str(folder)})
        else:
            out.print(f"{name} is here", markup=False)


@bench_app.command(
    "ingest", epilog="Examples: fathom bench ingest  |  fathom bench ingest report.pdf --json"
)
def bench_ingest_verb(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Files and folders; by default the sample.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of ours and the peer, in turn.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Ingest into a temporary library, beside plain sentence-transformers on the same chunks."""
    from eval.bench.ingest import bench_ingest, card, plain_sentence_transformers
    from ingest.sample import write_sample
    from ingest.sources import find_sources
    from rag.lm.catalog import resolve_model
    from rag.lm.local_engine import choose_device

    settings = load_settings()
    with TemporaryDirectory() as folder:
        wanted = paths or [str(write_sample(Path(folder)))]
        found = list(find_sources(wanted, settings=settings, downloads=Path(folder)))
        for source in found:
            if isinstance(source, FathomError):
                _show_error(source)
        embedder = _fathom(settings).embedder
        embedder.embed(["warm up"])
        model = resolve_model(settings.embedder, settings)
        device = choose_device(settings).type
        with err.status("ingesting, then the peer"):
            bench = bench_ingest(
                [source for source in found if not isinstance(source, FathomError)],
                embedder,
                lambda: plain_sentence_transformers(model, device=device),
                settings,
                rounds=rounds,
            )
    if not as_json:
        out.print(card(bench), markup=False)
    _print_json(bench.to_json() | {"embedder": embedder.fingerprint, "device": device})


@bench_app.command(
    "windowed",
    epilog="Examples: fathom bench windowed  |  fathom bench windowed --tokens 16384 --window 2048",
)
def bench_windowed_verb(
    model: Annotated[
        str, typer.Option(help="Catalog name, folder or hub id of a model without windows.")
    ] = "smollm2-135m",
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens to prefill; may be repeated. Default: 1024, 4096, 8192."),
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that stay for good.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens a token sees beside them.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Runs of both, in turn.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Prefill fully and through a window with sinks: tokens a second and peak bytes."""
    from eval.bench.windowed import bench_windowed, card, load_checked_model
    from rag.lm.windowed_attention import WindowPlan

    with err.status("loading and checking the model") as status:
        bench = bench_windowed(
            load_checked_model(model, load_settings()),
            WindowPlan(num_sinks=sinks, window=window),
            tokens or [1024, 4096, 8192],
            rounds=rounds,
            on_progress=lambda length: status.update(f"prefilling {length:,} tokens"),
        )
    (err if as_json else out).print(card(bench), markup=False)
    _print_json(bench.to_json() | {"model": model})


def _fathom(settings: Settings) -> Any:  # noqa: ANN401 - imported late: --help must be instant
    from ui.assembly import Fathom

    return Fathom(settings)


def _joining(source: Any, collection: str) -> Any:  # noqa: ANN401 - a SourceToRead or its error
    return source if isinstance(source, FathomError) else replace(source, collection=collection)


def _document_ids(
    fathom: Any,  # noqa: ANN401
    references: list[str] | None,
    collection: str | None = None,
) -> list[int] | None:
    ids = [fathom.store.find(reference).id for reference in references or []]
    if collection:
        ids += [document.id for document in fathom.store.all(collection=collection)]
    return ids if references or collection else None


@contextmanager
def _ingest_progress() -> Iterator[Any]:
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
def _stages(name: str) -> Iterator[Callable[[str, int, int], None]]:
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


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _show_error(error: FathomError) -> None:
    err.print(f"error: {error.message}\nhint: {error.hint}", markup=False, soft_wrap=True)


def _fail(error: FathomError) -> Never:
    _show_error(error)
    sys.exit(1)


if __name__ == "__main__":
    main()
