"""The command line: `fathom VERB`. Results on stdout, everything else on stderr."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Never

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
from rich.table import Table

from rag.errors import FathomError, StorageFullError
from rag.runtime import prepare_process
from rag.settings import Settings, load_settings
from rag.types import Route

app = typer.Typer(
    name="fathom",
    help="Answer questions about long documents, say how they were read, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="List and fetch models.", no_args_is_help=True)
app.add_typer(models_app, name="models")
bench_app = typer.Typer(help="Measure Fathom on this machine.", no_args_is_help=True)
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


@app.command(
    epilog="Examples: fathom ingest report.pdf notes/  |  fathom ingest --sample",
)
def ingest(
    paths: Annotated[list[Path] | None, typer.Argument(help="Files and folders.")] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Ingest the language reference in this Python.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Read files into the library. The same file may be given again: it is known."""
    from ingest.pipeline import find_files
    from ingest.sample import write_sample

    fathom = _fathom(load_settings(home=home))
    wanted = list(paths or [])
    if sample:
        wanted.append(write_sample(fathom.settings.home / "samples"))
    if not wanted:
        raise typer.BadParameter("give a file or a folder, or --sample")
    failures = 0
    for file in find_files(wanted):
        try:
            if isinstance(file, FathomError):
                raise file
            with _ingest_progress(file.name) as on_progress:
                result = fathom.ingest(file, on_progress=on_progress)
        except StorageFullError:
            raise
        except FathomError as error:
            failures += 1
            _show_error(error)
            continue
        if as_json:
            _print_json(
                {"outcome": result.outcome, "message": result.message}
                | {"document": result.document.to_json()}
            )
            continue
        out.print(result.message, markup=False)
        for warning in result.document.warnings:
            err.print(f"  warning: {warning}", markup=False)
    fathom.index.catch_up()
    fathom.index.snapshot()
    if failures:
        raise typer.Exit(1)


@app.command("list", epilog="Examples: fathom list  |  fathom list --all --json")
def list_documents(
    every: Annotated[bool, typer.Option("--all", help="Superseded versions too.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the documents."""
    documents = _fathom(load_settings(home=home)).store.all(include_superseded=every)
    if as_json:
        for document in documents:
            _print_json(document.to_json())
        return
    if not documents:
        err.print("the library is empty; add a document with: fathom ingest PATH")
        return
    table = Table("no.", "title", "version", "pages", "chunks", "characters", "added", box=None)
    for d in documents:
        numbers = (str(d.version), str(d.num_pages or "-"), f"{d.num_chunks:,}", f"{d.num_chars:,}")
        table.add_row(str(d.id), d.title, *numbers, d.created_at[:10])
    out.print(table)


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


@app.command(epilog="Examples: fathom delete 3  |  fathom delete report.pdf --json")
def delete(
    document: Annotated[str, typer.Argument(help="Number or title.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Delete a document: its text, vectors, original file, and its words in past answers."""
    fathom = _fathom(load_settings(home=home))
    found = fathom.store.find(document)
    fathom.delete(found.id)
    if as_json:
        _print_json({"deleted": found.id, "title": found.title, "version": found.version})
    else:
        out.print(f"deleted document {found.id} {found.title!r}", markup=False)


@app.command(
    epilog="Examples: fathom ask 'Who signs?'  |  fathom ask --route full -d 1 'Who signs?' --json"
)
def ask(
    question: Annotated[str, typer.Argument(help="In words.")],
    documents: Documents = None,
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
    ids = _document_ids(fathom, documents)
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
    ids = _document_ids(fathom, documents)
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
        bool, typer.Option("--repair", help="Rebuild what derives from the store.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check that store, lexical index, FAISS and files agree."""
    from ui.doctor import examine
    from ui.doctor import repair as mend

    fathom = _fathom(load_settings(home=home))
    if repair:
        mend(fathom)
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
def bench_retrieval_command(
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
        with _progress() as progress:
            report = bench_retrieval(
                evidence,
                embedder=fathom.embedder,
                settings=settings,
                reranker=fathom.reranker,
                cache_folder=cache,
                on_progress=_stages(progress, name),
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
    for name in names:
        with _progress() as progress:
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


def _fathom(settings: Settings) -> Any:  # noqa: ANN401 - imported late: --help must be instant
    from ui.assembly import Fathom

    return Fathom(settings)


def _document_ids(fathom: Any, references: list[str] | None) -> list[int] | None:  # noqa: ANN401
    return [fathom.store.find(r).id for r in references] if references else None


@contextmanager
def _ingest_progress(name: str) -> Iterator[Any]:
    with _progress() as progress:
        task = progress.add_task(name, total=None)

        def on_progress(event: Any) -> None:  # noqa: ANN401 - an IngestProgress
            progress.update(
                task,
                description=f"{event.stage} {name}",
                completed=event.done,
                total=event.total or None,
            )

        yield on_progress


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )


def _stages(progress: Progress, name: str) -> Callable[[str, int, int], None]:
    """Return a callback that shows a bar for each stage that it is told of."""
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(f"{name}: {stage}", total=total)
        progress.update(tasks[stage], completed=done)

    return show


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
