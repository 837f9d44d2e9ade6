"""fathom compare: the same questions by every way to answer, paired, as a report."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from rag.settings import Settings, load_settings
from ui.console import Home, Json, Model, err, open_fathom, out, print_json, stages_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.arms import Arm
    from eval.evidence_sets import EvidenceDocument
    from eval.examples import EvalExample

app = typer.Typer()

# Longest answer of every arm.
MAX_NEW_TOKENS = 64


@app.command(
    epilog="Examples: fathom compare questions.csv -o report"
    "  |  fathom compare sets/squad2_articles --split test --limit 100 --documents 3 -o report"
    "  |  fathom compare --rescore report --json"
)
def compare(
    examples: Annotated[
        Path | None,
        typer.Argument(help="Table of questions (JSONL, CSV, XLSX), or the folder of a set."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the report; goes on there. Default: among those that the page shows.",
        ),
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Ways to answer, by commas; all of them: `all`.")
    ] = "closed,hybrid,full,router",
    split: Annotated[str, typer.Option(help="Of a set: dev (to tune on) or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions; default: all.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents; default: all.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer of every arm, in tokens.")
    ] = MAX_NEW_TOKENS,
    seed: Annotated[int, typer.Option(help="Of the choice, and of random passages.")] = 0,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th document from the i-th, beside other processes.")
    ] = "1/1",
    rescore: Annotated[
        Path | None, typer.Option(help="Score the answers in this folder again; no model is run.")
    ] = None,
    failures: Annotated[
        bool, typer.Option(help="Write the page of questions that divide the arms; it quotes them.")
    ] = True,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Ask the same questions in every way, paired, and say whether a difference is shown.

    A row holds id, question, document (title, path or number of one in the library), answers,
    answerable, and may hold evidence. The documents of a set come with it, into a library of their
    own inside the report's folder. A run that was ended goes on where it was.
    """
    from eval.analysis import analyse
    from eval.compare import load_comparison
    from eval.report import summary, to_json, write_report
    from rag.routing.utility import load_weights
    from ui.comparing import comparisons_dir, folder_name

    if (rescore is None) == (examples is None):
        raise typer.BadParameter("give a table of questions, or --rescore with a folder")
    if rescore is None:
        assert examples is not None
        settings = load_settings(home=home, model=model, max_new_tokens=max_new_tokens)
        output = output or comparisons_dir(settings, settings.user) / folder_name(examples.name)
        _ask(
            examples,
            output,
            _arms(arms),
            split=split,
            limit=limit,
            documents=documents,
            seed=seed,
            shard=_shard(shard),
            settings=settings,
        )
    folder = rescore or output
    assert folder is not None
    asked, journal = load_comparison(folder)
    analysis = analyse(asked, journal, load_weights(load_settings().router_weights))
    page = write_report(analysis, asked, journal, output or folder, with_failures=failures)
    if as_json:
        print_json({"report": str(page), **to_json(analysis)})
        return
    out.print(summary(analysis), markup=False)
    out.print(f"\n{page}", markup=False)


def _ask(
    examples: Path,
    folder: Path,
    arms: "Sequence[Arm]",
    *,
    split: str,
    limit: int | None,
    documents: int | None,
    seed: int,
    shard: tuple[int, int],
    settings: Settings,
) -> None:
    """Ask what has not been asked yet."""
    from eval.evidence_sets import is_example_set, load_example_set
    from eval.examples import choose, load_examples
    from eval.provenance import sha256_of_files

    is_set = examples.is_dir() and is_example_set(examples)
    found = load_example_set(examples, split) if is_set else None
    asked = choose(
        found.examples if found else load_examples(examples),
        documents=documents,
        limit=limit,
        seed=seed,
    )
    ask_paired(
        asked,
        folder,
        arms,
        texts=found.documents if found else None,
        name=examples.name,
        split=split if found else "",
        sha256=sha256_of_files(examples),
        seed=seed,
        shard=shard,
        settings=settings,
    )


def ask_paired(
    asked: "Sequence[EvalExample]",
    folder: Path,
    arms: "Sequence[Arm]",
    *,
    texts: "Sequence[EvidenceDocument] | None",
    name: str,
    split: str,
    sha256: str,
    settings: Settings,
    seed: int = 0,
    shard: tuple[int, int] = (1, 1),
) -> None:
    """Ask these questions by every arm, as far as the folder does not hold the answers already.

    Args:
        asked: the questions.
        folder: of the comparison.
        arms: the ways to answer.
        texts: the documents asked about, for a library inside the folder; None asks those of the
            person's own.
        name: of the questions, for the report.
        split: theirs; a look at held-out ones is counted.
        sha256: of the files that they come from.
        settings: with the model that answers.
        seed: of random passages.
        shard: (i, n), as in `eval.compare.compare`.
    """
    from eval.arms import Workplace
    from eval.compare import check_evidence, compare, find_documents, keep_examples
    from eval.evidence_sets import ingest_set
    from eval.held_out import HELD_OUT
    from eval.provenance import made_with

    is_new = keep_examples(asked, folder)
    looks = 0
    if texts is not None and split == HELD_OUT:
        looks = _look(settings.home, f"{name} {split}", sha256, is_new=is_new)
    calibrations = open_fathom(settings).calibrations  # the person's own, whatever the library
    if texts is not None:
        own = {"home": folder / "library", "database_url": None, "document_kv_disk_bytes": 0}
        settings = settings.model_copy(update=own | {"user": ""})
    fathom = open_fathom(settings)
    with stages_bar("compare") as on_progress:
        if texts is not None:
            names = {example.document for example in asked}
            with TemporaryDirectory(prefix="fathom-compare-") as files:
                by_name = ingest_set(
                    [document for document in texts if document.id in names],
                    fathom.ingest_files,
                    Path(files),
                    on_progress=lambda done, total: on_progress("documents", done, total),
                )
        else:
            by_name = find_documents(asked, fathom.store.find)
        place = Workplace(
            store=fathom.store,
            retriever=fathom.retriever,
            engine=fathom.engine,
            settings=settings,
            calibrations=calibrations,
            forget=lambda document: fathom.document_kv.forget({document.version_key}),
        )
        check_evidence(asked, by_name, fathom.store)
        compare(
            asked,
            by_name,
            arms,
            place,
            made_with(
                place,
                by_name,
                command=shlex.join(["fathom", *sys.argv[1:]]),
                data=f"{name} {split}".strip(),
                examples_sha256=sha256,
                seed=seed,
                held_out_looks=looks,
            ),
            folder,
            shard=shard,
            on_progress=lambda arm, done, total: on_progress("answers", done, total),
        )


def _look(home: Path, data: str, sha256: str, *, is_new: bool) -> int:
    """Write down that held-out questions are looked at, and say how often that has been done."""
    from eval.held_out import Look, in_words, looks_at, write_down

    if is_new:  # one that goes on looks no second time
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_down(home, Look(data, sha256, now, shlex.join(["fathom", *sys.argv[1:]])))
    looks = looks_at(home, sha256)
    if looks:
        err.print(in_words(looks), markup=False)
    return len(looks)


def _arms(names: str) -> "list[Arm]":
    from eval.arms import Arm

    if names == "all":
        return list(Arm)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in list(Arm)]
    if unknown or not wanted:
        raise typer.BadParameter(
            f"there is no arm {', '.join(unknown) or names!r}; known are: {', '.join(Arm)}"
        )
    return [Arm(name) for name in wanted]


def _shard(words: str) -> tuple[int, int]:
    number, _, of = words.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise typer.BadParameter(f"--shard is {words!r}; expected i/n, e.g. 1/4")
    return int(number), int(of)
