"""fathom bench, of speed: ours, the limit and the peer, measured in turn in one run."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rag.errors import FathomError, SettingsError
from rag.settings import load_settings
from ui.console import Json, err, open_fathom, out, print_json, show_error
from ui.verbs.bench_options import Clock, Data, Rounds, Split, TimedModel, app

if TYPE_CHECKING:
    from rag.lm.loading import OpenedModel
    from rag.lm.spec import ModelSpec

ModelFile = Annotated[
    Path | None,
    typer.Option(
        "--gguf",
        exists=True,
        dir_okay=False,
        help="The model's GGUF file: for llama.cpp, to decode with its whole numbers and in 4 bits,"
        " and as the measure of answers. Default: --model, if that is one.",
    ),
]
AnswerData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of question sets: how many answers are those of float32 (squad2_articles).",
    ),
]
NumQuestions = Annotated[int, typer.Option("--questions", min=2, help="So many questions of them.")]
_SMALL_CHARS = 2_000  # of a document, where a bench only tries itself


@app.command(
    "ingest", epilog="Examples: fathom bench ingest  |  fathom bench ingest report.pdf --json"
)
def bench_ingest_verb(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Files and folders; by default the sample.")
    ] = None,
    rounds: Rounds = 1,
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
    rounds: Rounds = 1,
    clock: Clock = "wall",
    peers: Annotated[
        bool, typer.Option("--peers", help="The full prefill is transformers' own.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prefill fully and through a window with sinks: tokens a second and peak bytes."""
    from eval.bench.generation_peers import load_plain
    from eval.bench.windowed import bench_windowed, card, load_checked_model
    from rag.lm.catalog import resolve_model
    from rag.lm.window_kernels import WindowPlan

    settings = load_settings()
    with err.status("loading and checking the model") as status:
        bench = bench_windowed(
            load_checked_model(model, settings),
            WindowPlan(num_sinks=sinks, window=window),
            tokens or [1024, 4096, 8192],
            rounds=rounds,
            clock=clock,
            peer=load_plain(resolve_model(model, settings)) if peers else None,
            on_progress=lambda length: status.update(f"prefilling {length:,} tokens"),
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json() | {"model": model})


@app.command(
    "prefill",
    epilog="Examples: fathom bench prefill  |  fathom bench prefill --model gemma-3-270m --json",
)
def bench_prefill_verb(
    model: TimedModel = "smollm2-135m",
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=512,
            help="Multiples of 512 (on a GPU, of 4096); may be repeated. Default: that, and its"
            " doubles up to 16 times as many.",
        ),
    ] = None,
    rounds: Rounds = 3,
    clock: Clock = "wall",
    gguf: ModelFile = None,
    data: AnswerData = None,
    split: Split = "dev",
    questions: NumQuestions = 200,
    as_json: Json = False,
) -> None:
    """Compare predicted with measured prefill seconds; share of the matrix-product ceiling.

    With --data: what reading so does to answers, beside plain float32 and beside transformers.
    """
    from eval.bench.prefill import bench_prefill, card
    from eval.bench.reading_quality import reading_quality

    gguf = _model_file(model, gguf, data)
    with err.status("loading the model") as status:
        opened, loaded, spec = _loaded(model)
        lengths = tokens or [spec.chunk_tokens * times for times in (1, 2, 4, 8, 16)]
        if any(length % spec.chunk_tokens for length in lengths):
            raise typer.BadParameter(f"--tokens must be multiples of {spec.chunk_tokens}")
        bench = bench_prefill(
            loaded,
            spec,
            lengths,
            name=opened.name,
            rounds=rounds,
            clock=clock,
            on_progress=status.update,
        )
        if data is not None and gguf is not None:
            told = _beside_float32(
                reading_quality, opened, loaded, gguf, data, split, questions, status
            )
            bench = replace(bench, quality=told)
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


def _beside_float32(
    measure: Any,  # noqa: ANN401 - decode_quality or reading_quality
    opened: "OpenedModel",
    loaded: Any,  # noqa: ANN401
    gguf: Path,
    data: Path,
    split: str,
    questions: int,
    status: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return what a model does to answers beside its file's weights in float32."""
    from eval.bench.decode_quality import load_exact
    from eval.evidence_sets import load_evidence_set
    from rag.lm.chat_tokenizer import ChatTokenizer

    return measure(
        loaded,
        load_exact(gguf),
        ChatTokenizer(opened.tokenizer),
        load_evidence_set(data, "squad2_articles", split),
        num_questions=questions,
        on_progress=lambda number: status.update(f"question {number} of {questions}"),
    )


def _model_file(model: str, gguf: Path | None, data: Path | None) -> Path | None:
    """Return the GGUF file that is meant; one there must be where answers are compared."""
    from rag.lm.catalog import is_gguf

    if gguf is None and is_gguf(model):
        gguf = Path(model).expanduser()
    if data and gguf is None:
        raise typer.BadParameter(
            "it needs --gguf FILE: its weights are the measure", param_hint="--data"
        )
    return gguf


@app.command(
    "decode",
    epilog="Examples: fathom bench decode  |  fathom bench decode --peers --gguf smollm2.gguf",
)
def bench_decode_verb(
    model: TimedModel = "smollm2-135m",
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens in the cache; may be repeated. Default: 128, 2048, 8192."),
    ] = None,
    rounds: Rounds = 3,
    clock: Clock = "wall",
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Prefill and decode beside transformers and llama.cpp."),
    ] = False,
    gguf: ModelFile = None,
    data: AnswerData = None,
    split: Split = "dev",
    questions: NumQuestions = 200,
    as_json: Json = False,
) -> None:
    """Measure tokens a second of decoding beside what the memory's bandwidth allows."""
    from eval.bench.decode import bench_decode, card

    gguf = _model_file(model, gguf, data)
    with err.status("loading the model") as status:
        opened, loaded, spec = _loaded(model)
        if peers or data:
            bench: Any = _beside_peers(
                opened,
                loaded,
                context or [512],
                rounds,
                clock,
                gguf,
                data,
                split,
                questions,
                status,
            )
            from eval.bench import generation_peers

            shown = generation_peers.card(bench)
        else:
            has_integers = load_settings().decode_weights == "integers"
            bench = bench_decode(
                loaded,
                spec,
                context or [128, 2048, 8192],
                name=opened.name,
                integers_bytes=opened.extra_bytes if has_integers else 0,
                rounds=rounds,
                clock=clock,
                on_progress=status.update,
            )
            shown = card(bench)
    (err if as_json else out).print(shown, markup=False)
    print_json(bench.to_json())


def _beside_peers(
    opened: "OpenedModel",
    loaded: Any,  # noqa: ANN401
    lengths: list[int],
    rounds: int,
    clock: str,
    gguf: Path | None,
    data: Path | None,
    split: str,
    questions: int,
    status: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Run the bench beside peers; with a GGUF file its own whole numbers decode as well.

    An answer that copies is written too, with drafts and without.
    """
    from eval.bench.decode_quality import decode_quality
    from eval.bench.decode_ways import decode_with
    from eval.bench.generation_peers import bench_generation, copying_prompt, load_plain
    from rag.lm.chat_tokenizer import ChatTokenizer
    from rag.lm.gguf_models import load_gguf_config

    if gguf is not None:
        load_gguf_config(gguf)  # refuses what cannot be used
    with TemporaryDirectory() as folder:
        if gguf is not None and opened.device.type == "cpu":
            decode_with(loaded, opened.config, gguf, Path(folder))
        quality = None
        if data is not None and gguf is not None:
            quality = _beside_float32(
                decode_quality, opened, loaded, gguf, data, split, questions, status
            )
        return bench_generation(
            loaded,
            load_plain(opened.folder),
            lengths,
            name=opened.name,
            gguf=gguf,
            rounds=rounds,
            clock=clock,
            quality=quality,
            copied=partial(copying_prompt, ChatTokenizer(opened.tokenizer)),
            on_progress=status.update,
        )


@app.command(
    "threads",
    epilog="Examples: fathom bench threads  |  fathom bench threads --busy 4 --threads 2",
)
def bench_threads_verb(
    model: TimedModel = "smollm2-135m",
    busy: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that keep a core busy. Default: one for each core."),
    ] = None,
    threads: Annotated[int, typer.Option(min=2, help="Set beside one thread.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt that is read.")] = 512,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Read and write with one thread and with several while other processes use the cores."""
    from eval.bench.threads import bench_threads, card

    with err.status("loading the model") as status:
        opened, loaded, spec = _loaded(model)
        bench = bench_threads(
            loaded,
            spec,
            name=opened.name,
            busy=busy if busy is not None else os.cpu_count() or 1,
            num_threads=threads,
            prompt_tokens=tokens,
            rounds=rounds,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


@app.command(
    "document-kv",
    epilog="Examples: fathom bench document-kv  |  fathom bench document-kv --document-tokens 6000",
)
def bench_document_kv_verb(
    model: TimedModel = "auto",
    document_tokens: Annotated[int, typer.Option(min=1, help="Length of the document.")] = 1500,
    question_tokens: Annotated[int, typer.Option(min=1, help="Length of a question.")] = 32,
    rounds: Rounds = 3,
    clock: Clock = "wall",
    peers: Annotated[
        bool, typer.Option("--peers", help="Transformers, which keeps nothing, beside it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the first token of a question: document read anew, kept in memory, kept on disk."""
    from eval.bench.document_kv import bench_document_kv, card
    from eval.bench.generation_peers import load_plain

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
            peer=load_plain(opened.folder) if peers else None,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


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
    model: TimedModel = "smollm2-135m",
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
                spec=fathom.engine.spec,
                device=choose_device(settings),
                max_new_tokens=max_new_tokens,
                num_alone=alone,
                clock=clock,
                on_progress=status.update,
            )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json() | {"set": only, "split": split, "small": small})


@app.command("gpu", epilog="Examples: fathom bench gpu  |  fathom bench gpu --small --json")
def bench_gpu_verb(
    small: Annotated[
        bool, typer.Option("--small", help="Tiny shapes, on any device: tries the bench itself.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="One of attention, search, embedding, rows, models; may be repeated."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="No measurement begins later; what is left out is named.")
    ] = 540,
    as_json: Json = False,
) -> None:
    """Measure a GPU within ten minutes, on random weights of real shapes."""
    from eval.bench.gpu import REAL, SECTIONS, SMALL, bench_gpu, card
    from rag.lm.device import choose_device

    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))} is no section; there are {', '.join(SECTIONS)}",
            param_hint="--only",
        )

    try:
        device = choose_device(load_settings() if small else load_settings(device="cuda"))
    except SettingsError as error:
        hint = "run it where there is one, or try the bench itself with --small"
        raise SettingsError(error.message, hint=hint) from error
    with err.status("starting") as status:
        bench = bench_gpu(
            SMALL if small else REAL,
            device,
            sections=only or SECTIONS,
            deadline_seconds=seconds,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


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
    return opened, opened.load_hastened(), spec.on_device(opened.device.type)
