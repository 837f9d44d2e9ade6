"""fathom bench, beside peers: embed, frameworks, search, cold, and all of a CPU in one run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from rag.errors import FathomError, SettingsError
from rag.settings import load_settings
from rag.types import Route
from ui.console import Json, err, open_fathom, out, print_json
from ui.verbs.bench_options import Rounds, TimedModel, app

BEGIN, END = "<!-- fathom bench all -->", "<!-- end of fathom bench all -->"

# What `fathom bench all` runs, each in a process of its own, and how each only tries itself.
_ALL = (
    (["embed"], ["--texts", "4", "--rounds", "1"]),
    (["frameworks", "--rounds", "2"], ["--chars", "3000", "--rounds", "1", "--without-peers"]),
    (["search"], ["--vectors", "2000", "--rounds", "1"]),
    (
        ["prefill", "--tokens", "512", "--tokens", "2048", "--clock", "cpu"],
        ["--tokens", "512", "--rounds", "1"],
    ),
    (
        ["decode", "--peers", "--context", "512", "--clock", "cpu"],
        ["--context", "16", "--rounds", "1"],
    ),
    (["threads"], ["--tokens", "16", "--rounds", "1"]),
    (["document-kv", "--clock", "cpu"], ["--document-tokens", "64", "--rounds", "1"]),
    (["cold"], ["--rounds", "1"]),
)

_READ_GGUF = ("decode", "cold")


@app.command(
    "embed", epilog="Examples: fathom bench embed  |  fathom bench embed --texts 100 --json"
)
def bench_embed_verb(
    texts: Annotated[int, typer.Option(min=1, help="Texts of 500 characters to embed.")] = 300,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Embed the same texts by sentence-transformers and by ours: rates, cosine, limit."""
    from eval.bench.corpus import QUESTIONS, python_texts
    from eval.bench.embed import bench_embed, card
    from eval.bench.ingest import plain_sentence_transformers
    from rag.lm.catalog import resolve_model
    from rag.lm.device import choose_device

    chars = 500
    settings = load_settings()
    whole = "\n".join(python_texts(texts * chars))
    with err.status("loading both") as status:
        folder, device = resolve_model(settings.embedder, settings), choose_device(settings)
        embedder = open_fathom(settings).embedder
        bench = bench_embed(
            [whole[at : at + chars] for at in range(0, texts * chars, chars)],
            QUESTIONS[0],
            embedder,
            plain_sentence_transformers(folder, device=device.type),
            folder,
            device=device,
            rounds=rounds,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(
        bench.to_json() | {"embedder": embedder.fingerprint, "ours": type(embedder).__name__}
    )


@app.command(
    "frameworks",
    epilog="Examples: fathom bench frameworks  |  fathom bench frameworks --chars 2000000",
)
def bench_frameworks_verb(
    chars: Annotated[int, typer.Option(min=1000, help="Characters of text to ingest.")] = 200_000,
    rounds: Rounds = 3,
    without_peers: Annotated[
        bool, typer.Option("--without-peers", help="Ours alone: tries the bench itself.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ingest and ask beside LlamaIndex, LangChain, Haystack and txtai, with the same embedder."""
    from eval.bench.corpus import python_texts
    from eval.bench.frameworks import bench_frameworks, card, installed_frameworks
    from ingest.readers.guard import start_ahead
    from rag.lm.catalog import resolve_model
    from rag.lm.device import choose_device

    settings = load_settings()
    with err.status("loading the embedders") as status:
        start_ahead()
        embedder = open_fathom(settings).embedder
        embedder.embed(["warm up"])
        folder = resolve_model(settings.embedder, settings)
        frameworks = installed_frameworks(embedder, folder, settings)
        bench = bench_frameworks(
            python_texts(chars),
            {
                name: load if name == "fathom" or not without_peers else None
                for name, load in frameworks.items()
            },
            device=choose_device(settings),
            rounds=rounds,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json() | {"embedder": embedder.fingerprint})


@app.command(
    "search",
    epilog="Examples: fathom bench search  |  fathom bench search --vectors 1000000 --json",
)
def bench_search_verb(
    vectors: Annotated[int, typer.Option(min=100, help="Vectors to search.")] = 100_000,
    dim: Annotated[int, typer.Option(min=8, help="Length of a vector.")] = 384,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Search all vectors exactly: one query beside the memory's speed, many beside FAISS Flat."""
    from eval.bench.search import bench_search, card

    with err.status("searching") as status:
        bench = bench_search(vectors, dim, rounds=rounds, on_progress=status.update)
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


@app.command(
    "cold",
    epilog="Examples: fathom bench cold  |  fathom bench cold --gguf smollm2-135m.Q4_1.gguf",
)
def bench_cold_verb(
    model: TimedModel = "smollm2-135m",
    gguf: Annotated[
        Path | None, typer.Option(help="The same model's GGUF file, for transformers.")
    ] = None,
    rounds: Rounds = 3,
    as_json: Json = False,
) -> None:
    """Time new processes to their first token: ours, and transformers loading the GGUF file."""
    from eval.bench.cold import bench_cold, card
    from eval.bench.corpus import QUESTIONS, python_texts

    settings = load_settings(model=model)
    with TemporaryDirectory(prefix="fathom-bench-") as folder, err.status("ingesting") as status:
        home = Path(folder) / "home"
        text = Path(folder) / "reference.txt"
        text.write_text(python_texts(20_000)[0], encoding="utf-8")
        here = {"home": home, "database_url": None}
        fathom = open_fathom(settings.model_copy(update=here))
        fathom.ingest(text)
        plan = fathom.service().plan(QUESTIONS[0], fathom.documents(), route=Route.RETRIEVAL)
        bench = bench_cold(
            model,
            home,
            QUESTIONS[0],
            gguf,
            messages=plan.prompt.messages,
            rounds=rounds,
            on_progress=status.update,
        )
    (err if as_json else out).print(card(bench), markup=False)
    print_json(bench.to_json())


@app.command(
    "all",
    epilog="Examples: fathom bench all  |  fathom bench all --write docs/benchmarks.md --json",
)
def bench_all_verb(
    write: Annotated[
        Path | None, typer.Option(help="Put the tables between the marks in this file.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="The model's GGUF file, for peers that read one.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Tiny sizes: tries the benches themselves.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every bench of a CPU with one thread, each in a process of its own: about 15 minutes."""
    if write and (not write.is_file() or BEGIN not in write.read_text(encoding="utf-8")):
        raise SettingsError(
            f"{write} has no line {BEGIN}", hint=f"put it where the tables belong, and {END} below"
        )
    cards: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    with err.status("starting") as status:
        for command, tiny in _ALL:
            arguments = command[:1] + tiny if small else command
            said = "fathom bench " + " ".join(arguments)
            if command[0] in _READ_GGUF and gguf:
                arguments = [*arguments, "--gguf", str(gguf)]
                said += f" --gguf {gguf.name}"  # its folder is this machine's own
            status.update(said)
            cards[said], result = _run(arguments)
            results.append(result)
            (err if as_json else out).print(f"\n{cards[said]}", markup=False)
            if write:  # now: one that fails later takes nothing back
                _write(write, cards)
    print_json({"bench": "all", "small": small, "results": results})


def _run(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the card and the JSON of one bench, run by a process with one thread."""
    one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "FATHOM_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ui.cli", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | one_thread,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = " ".join(done.stderr.split())[-300:]
        raise FathomError(f"fathom bench {' '.join(arguments)} failed: {said}", hint="run it alone")
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def _write(path: Path, cards: dict[str, str]) -> None:
    """Put the cards between the marks; what people wrote around them stays."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1] if END in rest else ""
    tables = "\n\n".join(f"    $ {name}\n" + _indented(card) for name, card in cards.items())
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def _indented(card: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in card.splitlines())
