"""fathom bench: what is measured on this machine; a card for people and one JSON line last."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure speed and quality on this machine.", no_args_is_help=True)

Data = Annotated[Path, typer.Option("--data", help="Folder that holds a folder for each set.")]
Split = Annotated[str, typer.Option(help="dev (to tune on) or test (to report).")]
