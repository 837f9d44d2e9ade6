"""fathom bench: what is measured on this machine, and the options that several of its verbs have.

Each verb prints a card for people, and one JSON line last.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Measure speed and quality on this machine.", no_args_is_help=True)

Data = Annotated[Path, typer.Option("--data", help="Folder that holds a folder for each set.")]
Split = Annotated[
    Literal["dev", "test"], typer.Option(help="dev (to tune on) or test (to report).")
]
SetNames = Annotated[
    list[str] | None,
    typer.Option("--set", help="A set's name; may be repeated. Default: all that it is for."),
]
VectorCache = Annotated[
    Path | None, typer.Option("--cache", help="Folder that keeps the chunks' vectors between runs.")
]
Rows = Annotated[
    Path | None, typer.Option("--rows", help="Write a JSON line for each question here.")
]
Rounds = Annotated[int, typer.Option(help="How often all is run; medians are shown.", min=1)]
Clock = Annotated[
    Literal["wall", "cpu"],
    typer.Option(help="wall, or cpu: CPU seconds, where others use the machine too."),
]
# What is timed is no library's, so it is not FATHOM_MODEL, and small by default.
TimedModel = Annotated[
    str, typer.Option("--model", help="Catalog name, folder or hub id of a model, or auto.")
]
