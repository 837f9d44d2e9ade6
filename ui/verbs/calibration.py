"""fathom calibrate: how long a prompt this model uses well, measured here and kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from rag.errors import ModelError
from rag.settings import Settings, load_settings
from ui.console import Home, Json, Model, err, open_fathom, out, print_json
from ui.formatting import amount

if TYPE_CHECKING:
    from eval.calibrate import Run
    from rag.lm.engine import Engine
    from rag.lm.kv_bytes import KVDtype
    from rag.store.calibrations import EffectiveLength

app = typer.Typer()


@app.command(
    epilog="Examples: fathom calibrate --quick  |  fathom calibrate --plot effective.png --json"
    "  |  fathom calibrate --lengths 512,2048,8192 --haystacks 4"
)
def calibrate(
    quick: Annotated[
        bool, typer.Option("--quick", help="Under five minutes: fewer and shorter haystacks.")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(help="Prompt lengths in tokens, e.g. 512,2048,8192. Default: by the machine."),
    ] = None,
    haystacks: Annotated[
        int | None, typer.Option(min=1, help="Haystacks of each kind and length, at most.")
    ] = None,
    filler: Annotated[
        Path | None,
        typer.Option(help="Hide the facts in this text, or JSON Lines with a passage a line."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew instead of going on where a run ended.")
    ] = False,
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="Of the cache: q8_0 measures the 8-bit one, which is used only then."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw accuracy by length and depth here (.png, .svg, .pdf).")
    ] = None,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Measure how long a prompt the model uses well; answers hold to it from then on.

    Facts are hidden at every depth of texts of several lengths, and asked for. What is measured is
    stored haystack by haystack: a run that was killed goes on where it was.
    """
    from ui.verbs.model_plan import PICTURES, parse_kv_dtype

    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"--plot {plot} ends in none of {', '.join(PICTURES)}")
    asked = _parse_lengths(lengths) if lengths else None
    cache = parse_kv_dtype(kv_dtype) if kv_dtype else None
    settings = load_settings(home=home, model=model)
    from eval.bench.machine import device_name
    from eval.calibrate import calibrate as run_calibration
    from rag.lm.device import choose_device

    fathom = open_fathom(settings)
    with err.status("loading the model"):
        engine = _with_cache(_engine(fathom, settings, asked), cache)
        engine.warm_up()
        engine.predicted_prefill_seconds(1)  # measures the rate, where none is known
        run = _run(engine, settings, asked, haystacks, quick=quick, filler=filler, seed=seed)
    with _bar() as on_progress:
        found = run_calibration(
            engine,
            fathom.calibrations,
            run,
            dtype=_dtype(engine),
            device="the server's" if settings.remote_url else device_name(choose_device(settings)),
            fresh=fresh,
            on_progress=on_progress,
        )
    if plot is not None:
        from ui.plots import draw_calibration

        draw_calibration(found, plot)
    if as_json:
        print_json(found.to_json())
        return
    _print_calibration(found)
    if plot is not None:
        out.print(f"drawn in {plot}", markup=False)


def _parse_lengths(text: str) -> tuple[int, ...]:
    """Return the lengths of a list such as 512,2048."""
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"--lengths {text!r} is no list such as 512,2048") from None
    if len(lengths) < 2 or lengths[0] < 1:
        raise typer.BadParameter("--lengths needs two lengths or more, to compare them")
    return lengths


def _engine(fathom: Any, settings: Settings, lengths: tuple[int, ...] | None) -> "Engine":  # noqa: ANN401
    """Return the engine of the settings with a document KV of its own, which holds a haystack.

    The caches kept for people's documents stay as they are.
    """
    if settings.remote_url is not None:
        server: Engine = fathom.engine
        return server
    from rag.lm.document_kv import DocumentKV
    from rag.lm.kv_bytes import kv_cache_bytes
    from rag.lm.local_engine import LocalEngine
    from rag.lm.model_facts import find_model_facts

    kept_bytes = settings.document_kv_memory_bytes
    if lengths:
        spec = find_model_facts(settings.model, settings).spec
        kept_bytes = max(kept_bytes, kv_cache_bytes(spec, lengths[-1]))
    kept = DocumentKV(settings.document_kv_dir, memory_bytes=kept_bytes, disk_bytes=0)
    return LocalEngine.load(
        settings.model, settings, calibrations=fathom.calibrations, document_kv=kept
    )


def _with_cache(engine: "Engine", kv_dtype: "KVDtype | None") -> "Engine":
    """Return the engine with a cache in that format; None is the model's own.

    Raises:
        UnsupportedModelError: if there is none in it.
    """
    from rag.errors import UnsupportedModelError

    if kv_dtype is None:
        return engine
    quantised = engine.quantised
    if quantised is None or quantised.spec is None or quantised.spec.kv_dtype != kv_dtype:
        has = "its own alone"
        if quantised is not None and quantised.spec is not None:
            has = f"its own and {quantised.spec.kv_dtype}"
        raise UnsupportedModelError(
            f"{engine.name} has no cache in {kv_dtype}: this engine keeps {has}",
            hint="leave --kv-dtype out, or give q8_0 for a model that has it",
        )
    return quantised


def _dtype(engine: "Engine") -> str:
    """Return the format of weights and cache, for the record."""
    if engine.spec is None:
        return "the server's"
    weights = f"{8 * engine.spec.dtype_bytes} bits"
    return f"{weights}, cache in {engine.spec.kv_dtype}" if engine.spec.kv_dtype else weights


def _run(
    engine: "Engine",
    settings: Settings,
    asked: tuple[int, ...] | None,
    haystacks: int | None,
    *,
    quick: bool,
    filler: Path | None,
    seed: int,
) -> "Run":
    """Return what to measure: by default as much as a full reading may take here."""
    from eval.calibrate import (
        LONGEST_REPLY_TOKENS,
        NUM_HAYSTACKS,
        QUICK_SECONDS,
        Run,
        lengths_within,
        possible_lengths,
        quick_lengths,
        step_seconds,
    )
    from eval.synthetic import Mix, load_filler
    from rag.routing.model_plan import longest_context

    caps = [settings.max_context_tokens, engine.context_tokens]
    free_bytes = engine.free_bytes()
    if engine.spec is not None and free_bytes is not None:
        caps.append(longest_context(engine.spec, max(0, free_bytes - settings.kv_reserve_bytes)))
    mixes = (Mix.LOOKUP,) if quick else tuple(Mix)
    longest = min((cap for cap in caps if cap is not None), default=2**15)
    if asked and asked[-1] + LONGEST_REPLY_TOKENS > longest:
        raise ModelError(
            f"a prompt of {asked[-1]:,} tokens and its reply do not fit the {longest:,} that"
            f" {engine.name} takes here",
            hint=f"give --lengths up to {longest - LONGEST_REPLY_TOKENS:,}; fathom plan says what"
            " ends the context",
        )
    lengths = list(asked or possible_lengths(longest))
    if quick and not asked:
        lengths = quick_lengths(
            lengths, QUICK_SECONDS, lambda tokens: step_seconds(engine, Mix.LOOKUP, tokens)
        )
    elif not asked:
        # A prompt that takes longer to read fails another gate.
        deadline = settings.prefill_deadline_seconds
        lengths = lengths_within(lengths, deadline, engine.predicted_prefill_seconds)
    return Run(
        lengths=tuple(lengths),
        num_haystacks=haystacks or NUM_HAYSTACKS,
        mixes=mixes,
        budget_seconds=QUICK_SECONDS if quick else None,
        seed=seed,
        filler=load_filler(filler) if filler else (),
        filler_name=filler.name if filler else "own sentences",
    )


@contextmanager
def _bar() -> Iterator[Callable[[Any], None]]:
    """A bar whose callback takes `CalibrationProgress`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("haystacks", total=None, left="")

        def on_progress(event: Any) -> None:  # noqa: ANN401 - a CalibrationProgress
            left = event.seconds_left
            progress.update(
                task,
                description=f"haystack of {event.tokens:,} tokens",
                completed=event.done,
                total=event.total,
                left="" if left is None else f"about {amount(left, 'seconds')} left",
            )

        yield on_progress


def _print_calibration(found: "EffectiveLength") -> None:
    """Print what was found for people: lengths, tasks, and what follows."""
    table = Table(box=None, pad_edge=False)
    for column in ("tokens", "right", "95%", "questions", "prefill s", "predicted"):
        table.add_column(column, justify="right")
    for point in found.points:
        table.add_row(
            f"{point.tokens:,}",
            f"{point.correct:.0%}",
            f"{point.low:.0%} to {point.high:.0%}",
            f"{point.num_questions:,} on {point.num_haystacks}",
            "" if point.prefill_seconds is None else f"{point.prefill_seconds:,.1f}",
            "" if point.predicted_seconds is None else f"{point.predicted_seconds:,.1f}",
        )
    out.print(table)
    tasks = Table(box=None, pad_edge=False)
    for column in ("task", "right at the shortest", "effective tokens"):
        tasks.add_column(column, justify="left" if column == "task" else "right")
    for task, figures in found.tasks.items():
        tokens = f"{figures['tokens']:,.0f}" if figures["tokens"] else "not measurable"
        tasks.add_row(task, f"{figures['base']:.0%}", tokens)
    out.print(tasks)
    out.print(verdict(found), markup=False)


def _consequence(found: "EffectiveLength") -> str:
    if "cache in" in found.dtype:
        return "prompts up to that length are read so where the model's own cache does not fit"
    return "longer prompts now fail the gate effective_length"


def verdict(found: "EffectiveLength") -> str:
    """Return what was found and what follows from it, in words."""
    if not found.is_measurable:
        return (
            f"{found.model}: effective length not measurable: lookups are right for"
            f" {found.base:.0%} at {found.points[0].tokens:,} tokens, and {found.floor:.0%} must be"
            " sure; documents longer than the retrieval budget are not read whole unless asked for"
        )
    most = "or more, for none longer was tried" if found.tokens == found.longest_tokens else ""
    how = "replies" if found.scored_by == "replies" else "the likeliest of the values in the text"
    return (
        f"{found.model}: effective length {found.tokens:,} tokens {most}".rstrip()
        + f" (5th percentile; median {found.median_tokens:,}, 95th {found.high_tokens:,};"
        f" scored by {how}); {_consequence(found)}"
    )
