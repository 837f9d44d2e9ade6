"""fathom models: the catalog and what of it is here."""

from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from rag.settings import load_settings
from ui.console import Json, err, out, print_json

app = typer.Typer(help="List and fetch models.", no_args_is_help=True)


@app.command("list", epilog="Examples: fathom models list  |  fathom models list --json")
def models_list(as_json: Json = False) -> None:
    """List the catalog, which of it is here, and what `auto` stands for."""
    from rag.lm.auto_model import choose_auto
    from rag.lm.catalog import fetched_models, load_catalog

    settings = load_settings()
    here = {model.name for model in fetched_models(settings)}
    auto = choose_auto(settings)
    for entry in load_catalog().values():
        if as_json:
            print_json(
                {"name": entry.name, "use": entry.use, "licence": entry.licence}
                | {"fetched": entry.name in here, "auto": entry.name == auto.name}
            )
        else:
            mark = "here" if entry.name in here else "    "
            why = f"  auto: {auto.reason}" if entry.name == auto.name else ""
            line = f"{mark}  {entry.name:<20} {entry.use:<16} {entry.licence}{why}"
            out.print(line, markup=False)


@app.command(
    "fetch", epilog="Examples: fathom models fetch smollm2-135m  |  fathom models fetch auto"
)
def models_fetch(
    names: Annotated[
        list[str], typer.Argument(help="Catalog names, hub ids, GGUF files, or auto.")
    ],
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
            print_json({"name": name, "folder": str(folder)})
        else:
            out.print(f"{name} is here", markup=False)
