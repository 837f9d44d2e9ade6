"""fathom harness: other people's tasks, run against the routes."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from rag.settings import load_settings
from rag.types import Route
from ui.console import Json, Model, err, open_fathom, out, print_json

app = typer.Typer()


@app.command(
    epilog="Examples: fathom harness my_task --include tasks/ --route full --route retrieval"
    "  |  HF_HUB_OFFLINE=0 fathom harness longbench_qasper --limit 20 --json"
)
def harness(
    tasks: Annotated[list[str], typer.Argument(help="Tasks of lm-evaluation-harness.")],
    include: Annotated[
        Path | None, typer.Option(help="Folder of task definitions of your own (YAML).")
    ] = None,
    route: Annotated[
        list[Route] | None,
        typer.Option("--route", help="May be repeated: each is run. Default: the router chooses."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.")] = None,
    document_field: Annotated[str, typer.Option(help="Field with the document.")] = "context",
    question_field: Annotated[str, typer.Option(help="Field with the question.")] = "question",
    abstains_with: Annotated[
        str, typer.Option(help="What the task is told where nothing is found.")
    ] = "unanswerable",
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness (generate_until) with Fathom as the model.

    Each row's document is taken into a temporary library and its question asked of it, in Fathom's
    own prompt: the task's instructions and examples are not shown, its metric judges the answer.
    Needs the extra `harness`.
    """
    from eval.harness import FathomLM, run_tasks

    routes: list[Route | None] = [*route] if route else [None]
    for asked in routes:
        with TemporaryDirectory(prefix="fathom-harness-") as folder:
            here = {"home": Path(folder) / "home", "database_url": None}
            fathom = open_fathom(load_settings(model=model).model_copy(update=here))
            lm = FathomLM(
                fathom,
                Path(folder),
                route=asked,
                document_field=document_field,
                question_field=question_field,
                abstains_with=abstains_with,
            )
            name = str(asked or "router")
            with err.status(f"{name}: answering"):
                records = run_tasks(tasks, lm, include=include, limit=limit)
            model_name = fathom.engine.name
        for record in records:
            if as_json:
                print_json({"route": name, "model": model_name, **record})
                continue
            metrics = ", ".join(f"{n} {value:.3f}" for n, value in record["metrics"].items())
            out.print(
                f"{record['task']} by {name}: {metrics} ({record['questions']} questions,"
                f" {record['failures']} failed, {record['seconds']} s; {model_name})",
                markup=False,
            )
