"""fathom bench: speed and quality on this machine, a card for people and one JSON line last."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rag.errors import FathomError, ReadError, SettingsError
from rag.settings import load_settings
from ui.console import Json, Model, err, open_fathom, out, print_json, show_error, stages_bar

if TYPE_CHECKING:
    from rag.lm.loading import OpenedModel
    from rag.lm.spec import ModelSpec

app = typer.Typer(help="Measure speed and quality on this machine.", no_args_is_help=True)

Clock = Annotated[
    str, typer.Option(help="wall, or cpu: CPU seconds, where others use the machine too.")
]
Rounds = Annotated[int, typer.Option(help="How often all is run; medians are shown.", min=1)]
Data = Annotated[Path, typer.Option("--data", help="Folder that holds a folder for each set.")]
Split = Annotated[str, typer.Option(help="dev (to tune on) or test (to report).")]
VectorCache = Annotated[
    Path | None, typer.Option("--cache", help="Folder that keeps the chunks' vectors between runs.")
]

_SMALL_CHARS = 2_000  # of a document, where a bench only tries itself


@app.command(
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
    from ingest.readers.guard import start_ahead
    from ingest.sample import write_sample
    from ingest.sources import find_sources
    from rag.lm.catalog import resolve_model
    from rag.lm.device import choose_device

    settings = load_settings()
    with TemporaryDirectory() as folder:
        wanted = paths or [str(write_sample(Path(folder)))]
        found = list(find_sources(wanted, settings=settings, downloads=Path(folder)))
        for source in found:
            if isinstance(source, FathomError):
                show_error(source)
        start_ahead()  # as every ingest does before it loads the embedder
        embedder = open_fathom(settings).embedder
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
    print_json(bench.to_json() | {"embedder": embedder.fingerprint, "device": device})


@app.command(
    "retrieval",
    epilog="Examples: fathom bench retrieval --data sets --split dev"
    "  |  fathom bench retrieval --data sets --set covidqa --limit 50 --json",
)
def bench_retrieval_verb(
    data: Data,
    split: Split = "dev",
    only: Annotated[
        list[str] | None, typer.Option("--set", help="A set's name; may be repeated. Default: all.")
    ] = None,
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
    only: Annotated[
        list[str] | None, typer.Option("--set", help="A set's name; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each set, of each kind; default: all.")
    ] = None,
    read: Annotated[
        bool, typer.Option(help="Let the model choose a span; without, sentences alone.")
    ] = True,
    model: Model = None,
    cache: VectorCache = None,
    rows: Annotated[Path | None, typer.Option(help="Write a JSON line a question here.")] = None,
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


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@app.command(
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
    window: Annotated[int, typer.Option(min=1, help="Tokens a token sees beside them.")] = 512,
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
    print_json(bench.to_json() | {"model": model})


@app.command("gpu", epilog="Examples: fathom bench gpu  |  fathom bench gpu --small --json")
def bench_gpu_verb(
    small: Annotated[
        bool, typer.Option("--small", help="Tiny shapes, on any device: tries the bench itself.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a GPU within ten minutes, on random weights of real shapes."""
    from eval.bench.gpu import REAL, SMALL, bench_gpu, card
    from rag.lm.device import choose_device

    try:
        device = choose_device(load_settings() if small else load_settings(device="cuda"))
    except SettingsError as error:
        hint = "run it where there is one, or try the bench itself with --small"
        raise SettingsError(error.message, hint=hint) from error
    with err.status("starting") as status:
        bench = bench_gpu(SMALL if small else REAL, device, on_progress=status.update)
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


@app.command("router", epilog="Examples: fathom bench router --data sets --split dev")
def bench_router_verb(
    data: Annotated[Path, typer.Option("--data", help="Folder that holds the folder lara.")],
    split: Annotated[
        str, typer.Option(help="dev (in folds, to tune) or test (to report).")
    ] = "dev",
    weights: Annotated[
        Path | None, typer.Option(help="From fathom fit-router, for test; default: those shipped.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge the router on stored answers of eleven models, beside simple rules; no model runs."""
    from eval.bench.router import Round, bench_router, card, cross_validation, label_pairs
    from eval.lara import load_lara
    from rag.routing.utility import load_weights

    if split not in ("dev", "test"):
        raise typer.BadParameter("--split is dev or test")
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
    print_json(bench.to_json())


@app.command(
    "prefill",
    epilog="Examples: fathom bench prefill  |  fathom bench prefill --model gemma-3-270m --json",
)
def bench_prefill_verb(
    model: Annotated[
        str, typer.Option(help="Catalog name, folder or hub id of a model.")
    ] = "smollm2-135m",
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=512, help="Multiples of 512; may be repeated. Default: 512 and its doubles to 8192."
        ),
    ] = None,
    rounds: Rounds = 3,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Compare predicted with measured prefill seconds; share of the matrix-product ceiling."""
    from eval.bench.prefill import bench_prefill, card
    from rag.lm.prefill_cost import PREFILL_CHUNK_TOKENS

    lengths = tokens or [512, 1024, 2048, 4096, 8192]
    if any(length % PREFILL_CHUNK_TOKENS for length in lengths):
        raise typer.BadParameter(f"--tokens must be multiples of {PREFILL_CHUNK_TOKENS}")
    _check_clock(clock)
    with err.status("loading the model") as status:
        opened, loaded, spec = _loaded(model)
        bench = bench_prefill(
            loaded,
            spec,
            lengths,
            name=opened.name,
            rounds=rounds,
            clock=clock,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


@app.command(
    "decode",
    epilog="Examples: fathom bench decode  |  fathom bench decode --context 2048 --rounds 5",
)
def bench_decode_verb(
    model: Annotated[
        str, typer.Option(help="Catalog name, folder or hub id of a model.")
    ] = "smollm2-135m",
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens in the cache; may be repeated. Default: 128, 2048, 8192."),
    ] = None,
    rounds: Rounds = 3,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Measure tokens a second of decoding beside what the memory's bandwidth allows."""
    from eval.bench.decode import bench_decode, card

    _check_clock(clock)
    with err.status("loading the model") as status:
        opened, loaded, spec = _loaded(model)
        bench = bench_decode(
            loaded,
            spec,
            context or [128, 2048, 8192],
            name=opened.name,
            rounds=rounds,
            clock=clock,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


@app.command(
    "document-kv",
    epilog="Examples: fathom bench document-kv  |  fathom bench document-kv --document-tokens 6000",
)
def bench_document_kv_verb(
    model: Annotated[str, typer.Option(help="Catalog name, folder, hub id, or auto.")] = "auto",
    document_tokens: Annotated[int, typer.Option(min=1, help="Length of the document.")] = 1500,
    question_tokens: Annotated[int, typer.Option(min=1, help="Length of a question.")] = 32,
    rounds: Rounds = 3,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Time the first token of a question: document read anew, kept in memory, kept on disk."""
    from eval.bench.document_kv import bench_document_kv, card

    _check_clock(clock)
    with TemporaryDirectory() as folder, err.status("loading the model") as status:
        opened, loaded, _ = _loaded(model)
        bench = bench_document_kv(
            loaded,
            opened.tokenizer,
            Path(folder),
            name=opened.name,
            document_tokens=document_tokens,
            question_tokens=question_tokens,
            rounds=rounds,
            clock=clock,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


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
    rows: Annotated[Path | None, typer.Option(help="Write a JSON line an answer here.")] = None,
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


@app.command(
    "batch",
    epilog="Examples: fathom bench batch --data sets  |  fathom bench batch --data sets --small",
)
def bench_batch_verb(
    data: Data,
    split: Split = "test",
    only: Annotated[str, typer.Option("--set", help="The set of documents and questions.")] = (
        "squad2_articles"
    ),
    model: Annotated[
        str, typer.Option(help="Catalog name, folder or hub id of a model.")
    ] = "smollm2-135m",
    documents: Annotated[int, typer.Option(min=1, help="The first so many that fit.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="About all of them together.")] = 200,
    alone: Annotated[
        int, typer.Option(min=1, help="Questions of each document that are asked alone, too.")
    ] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of both.")] = 32,
    small: Annotated[
        bool,
        typer.Option("--small", help="Two short documents, six questions: tries the bench itself."),
    ] = False,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Time a table of questions as a batch, and one by one without document KV.

    Every document is read whole by both. One by one is reckoned from a few questions of each.
    """
    from eval.batch_journal import Journal
    from eval.bench.batch import bench_batch, card, documents_that_fit
    from eval.evidence_sets import load_evidence_set
    from rag.lm.device import choose_device

    _check_clock(clock)
    if small:
        documents, questions, alone = 2, 6, 1
    evidence = load_evidence_set(data, only, split)
    with TemporaryDirectory() as folder, err.status("ingesting the documents") as status:
        here = {
            "home": Path(folder) / "home",
            "database_url": None,
            "max_new_tokens": max_new_tokens,
            "prefill_deadline_seconds": 1e9,
        }
        settings = load_settings(model=model).model_copy(update=here)
        fathom = open_fathom(settings)
        asked = {}
        for document in evidence.documents:
            path = Path(folder) / f"{document.id}.txt"
            path.write_text(document.text[:_SMALL_CHARS] if small else document.text)
            asked[fathom.ingest(path).document.id] = [
                question for question in evidence.questions if question.document == document.id
            ]
        chosen = documents_that_fit(
            fathom.documents(),
            asked,
            fathom.service(),
            num_documents=documents,
            num_questions=questions,
        )
        status.update("loading the model")
        nothing_kept = {"document_kv_memory_bytes": 0, "document_kv_disk_bytes": 0}
        forgetful = open_fathom(settings.model_copy(update=nothing_kept))
        for each in (fathom, forgetful):
            each.warm_up()
        with Journal(Path(folder) / "answers.journal") as journal:
            bench = bench_batch(
                chosen,
                fathom.service(),
                forgetful.service(),
                journal,
                model=fathom.engine.name,
                device=choose_device(settings),
                max_new_tokens=max_new_tokens,
                num_alone=alone,
                clock=clock,
                on_progress=status.update,
            )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json() | {"set": only, "split": split, "small": small})


def _loaded(name: str) -> "tuple[OpenedModel, Any, ModelSpec]":
    """Return a fetched model, its weights, and its spec."""
    from rag.lm.loading import open_model
    from rag.lm.spec import ModelSpec

    settings = load_settings()
    opened = open_model(name, settings)
    if settings.num_threads is not None:
        import torch

        torch.set_num_threads(settings.num_threads)
    spec = ModelSpec.from_config(opened.config, dtype_bytes=opened.dtype.itemsize)
    return opened, opened.load(), spec


def _check_clock(name: str) -> None:
    from eval.bench.machine import CLOCKS

    if name not in CLOCKS:
        raise typer.BadParameter(f"--clock is {name!r}; expected {' or '.join(CLOCKS)}")
