"""fathom bench, of quality: is the evidence found, quoted, routed well, and no order obeyed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from rag.errors import ReadError
from rag.settings import Settings, load_settings
from rag.types import QuestionClass
from ui.console import Home, Json, Model, err, open_fathom, out, print_json, stages_bar
from ui.verbs.bench_options import Data, Rows, SetNames, Split, VectorCache, app
from ui.verbs.comparison import MAX_NEW_TOKENS, ask_paired


@app.command(
    "retrieval",
    epilog="Examples: fathom bench retrieval --data sets --split dev"
    "  |  fathom bench retrieval --data sets --set covidqa --limit 50 --json",
)
def bench_retrieval_verb(
    data: Data,
    split: Split = "dev",
    only: SetNames = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each set; default: all.")
    ] = None,
    cache: VectorCache = None,
    as_json: Json = False,
) -> None:
    """Measure how often the evidence is found, beside a BM25 floor on the same questions."""
    from eval.bench.retrieval import bench_retrieval, card
    from eval.evidence_sets import SETS, load_evidence_set

    settings = load_settings()
    fathom = open_fathom(settings)
    reports = []
    for name in only or list(SETS):
        evidence = load_evidence_set(data, name, split, limit=limit)
        with stages_bar(name) as on_progress:
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
    print_json(line)


@app.command(
    "quotation",
    epilog="Examples: fathom bench quotation --data sets --split dev --limit 50"
    "  |  fathom bench quotation --data sets --fit weights.json",
)
def bench_quotation_verb(
    data: Data,
    split: Split = "dev",
    only: SetNames = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each set, of each kind; default: all.")
    ] = None,
    read: Annotated[
        bool, typer.Option(help="Let the model choose a span; without, sentences alone.")
    ] = True,
    model: Model = None,
    cache: VectorCache = None,
    rows: Rows = None,
    fit: Annotated[
        Path | None,
        typer.Option(help="Fit the weights on --split and write them here instead."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure verbatim answers: do they hold the answer, how long are they, what do they take."""
    from eval.bench.quotation import bench_quotation, card, spread, with_questions
    from eval.evidence_sets import load_evidence_set
    from eval.fit_quotation import fit_quotation

    settings = load_settings(model=model)
    fathom = open_fathom(settings)
    sets = []
    for name in only or ["squad2_articles", "covidqa"]:
        whole = load_evidence_set(data, name, split)
        try:
            without = load_evidence_set(data, name, split, answerable=False).questions
        except ReadError:
            without = ()  # every question of the set has an answer
        about = {document.id for document in whole.documents}
        unanswerable = [question for question in without if question.document in about]
        sets.append(
            (
                with_questions(whole, spread(whole.questions, limit)),
                spread(unanswerable, limit),
            )
        )
    if fit is not None:
        with stages_bar("fitting") as on_progress:
            weights = fit_quotation(
                sets,
                embedder=fathom.embedder,
                settings=settings,
                engine=fathom.engine if read else None,
                cache_folder=cache,
                on_progress=on_progress,
            )
        fitted = {name: table for name, table in asdict(weights).items() if table}
        fit.write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
        print_json({"bench": "quotation", "split": split, "limit": limit, **fitted})
        return
    reports = []
    for evidence, unanswerable in sets:
        with stages_bar(evidence.name) as on_progress:
            report = bench_quotation(
                evidence,
                unanswerable,
                embedder=fathom.embedder,
                engine=fathom.engine,
                settings=settings,
                read=read,
                cache_folder=cache,
                on_progress=on_progress,
                on_row=lambda row: _append(rows, asdict(row)) if rows else None,
            )
        reports.append(report)
        (err if as_json else out).print(card(report), markup=False)
    line = {
        "bench": "quotation",
        "split": split,
        "limit": limit,
        "model": fathom.engine.name,
        "embedder": fathom.embedder.fingerprint,
        "sets": [report.to_json() for report in reports],
    }
    print_json(line)


@app.command(
    "router",
    epilog="Examples: fathom bench router --data sets --split dev"
    "  |  fathom bench router --data sets --split test -o slices",
)
def bench_router_verb(
    data: Data,
    split: Split = "dev",
    weights: Annotated[
        Path | None, typer.Option(help="From fathom fit-router, for test; default: those shipped.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Ask the model, too: folder of its answers; goes on there where it was ended.",
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(min=1, help="With -o: documents of each kind and length.")
    ] = 2,
    only: Annotated[
        list[QuestionClass] | None,
        typer.Option("--class", help="With -o: questions of this class; may be repeated."),
    ] = None,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Judge the router on stored answers of eleven models; with -o on those of the model here, too.

    The latter ask questions of every class on documents of several lengths by retrieval, by reading
    everything, and as the router would have it, and tell for each slice how far the router is from
    the better of the two. On dev each fold of the stored answers is judged by weights that were
    fitted on the others.
    """
    from eval.bench.router import Round, bench_router, card, cross_validation, label_pairs
    from eval.lara import load_lara
    from rag.routing.utility import load_weights

    if weights and split == "dev":
        raise typer.BadParameter("--weights are judged on test: on dev every fold fits its own")
    documents, predictions = load_lara(data)
    with stages_bar("lara") as on_progress:
        pairs = label_pairs(documents, predictions, on_progress=on_progress)
    tested = {document.id for document in documents if document.split == "test"}
    dev = [pair for pair in pairs if pair.document not in tested]
    if split == "test":
        test = [pair for pair in pairs if pair.document in tested]
        rounds = [Round(dev, test, load_weights(weights))]
    else:
        rounds = cross_validation(dev)
    bench = bench_router(rounds, split=split)
    (err if as_json else out).print(card(bench), markup=False)
    line = bench.to_json()
    if output is not None:
        settings = load_settings(home=home, model=model, max_new_tokens=MAX_NEW_TOKENS)
        line["asked"] = _ask_suite(data, split, size, only or (), output, settings, as_json=as_json)
    print_json(line)


def _ask_suite(
    data: Path,
    split: str,
    size: int,
    classes: Sequence[QuestionClass],
    folder: Path,
    settings: Settings,
    *,
    as_json: bool,
) -> dict[str, Any]:
    """Ask the suite in three ways, show the slices, and leave the report in the folder."""
    from eval.analysis import analyse
    from eval.arms import Arm
    from eval.bench.router_slices import judge_slices, slices_card
    from eval.compare import load_comparison
    from eval.provenance import sha256_of_files
    from eval.report import write_report
    from eval.router_suite import SETS, of_classes, router_suite
    from rag.routing.utility import load_weights

    suite = router_suite(data, split, size=size)
    if classes:
        suite = of_classes(suite, classes)
    ask_paired(
        suite.examples,
        folder,
        (Arm.HYBRID, Arm.FULL, Arm.ROUTER),
        texts=suite.documents,
        name="router suite",
        split=split,
        sha256=sha256_of_files(*(data / name for name in SETS)),
        settings=settings,
    )
    asked, journal = load_comparison(folder)
    slices = judge_slices(asked, journal)
    (err if as_json else out).print(slices_card(slices), markup=False)
    analysis = analyse(asked, journal, load_weights(settings.router_weights))
    page = write_report(analysis, asked, journal, folder)
    return {"report": str(page), "slices": [asdict(part) for part in slices]}


@app.command(
    "poisoned",
    epilog="Examples: fathom bench poisoned --small  |  fathom bench poisoned --inside book.txt",
)
def bench_poisoned_verb(
    small: Annotated[
        bool, typer.Option("--small", help="One document for each kind of injection.")
    ] = False,
    inside: Annotated[
        Path | None,
        typer.Option(help="A text file, in whose middle the short documents are put."),
    ] = None,
    model: Model = None,
    rows: Rows = None,
    as_json: Json = False,
) -> None:
    """Ask documents that try to give orders, beside the same without: who obeys, who is right."""
    from eval.bench.poisoned import bench_poisoned, card
    from eval.poisoned import inside as hosts_inside
    from eval.poisoned import poisoned_cases
    from ui.answer_html import answer_html, citations_html, receipt_html
    from ui.formatting import receipt_text

    hosts = None
    if inside is not None:
        try:
            hosts = hosts_inside(inside.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ReadError(f"{inside}: {error}", hint="give a text file in UTF-8") from error
    with TemporaryDirectory(prefix="fathom-bench-") as folder:
        here = {"home": Path(folder), "database_url": None}
        fathom = open_fathom(load_settings(model=model).model_copy(update=here))
        with stages_bar("poisoned") as on_progress:
            bench = bench_poisoned(
                poisoned_cases(hosts=hosts, hosts_per_kind=1 if small else None),
                fathom,
                page=lambda a: answer_html(a) + citations_html(a) + receipt_html(a.receipt),
                terminal=receipt_text,
                on_progress=on_progress,
                on_row=lambda row: _append(rows, asdict(row)) if rows else None,
            )
        named = {"model": fathom.engine.name, "embedder": fathom.embedder.fingerprint}
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json() | {"inside": inside and inside.name, **named})


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
