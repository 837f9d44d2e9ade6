"""The command line: `fathom VERB`. Results on stdout, everything else on stderr."""

import logging
import sys
import traceback
from tempfile import NamedTemporaryFile
from typing import Never

import typer

from rag.errors import FathomError
from rag.runtime import prepare_process
from ui.console import err, show_error
from ui.verbs import (
    agents,
    batch,
    bench,
    calibration,
    comparison,
    documents,
    harness,
    models,
    questions,
    serving,
    users,
)

app = typer.Typer(
    name="fathom",
    help="Answer questions about long documents, say how they were read, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(documents.app)
app.add_typer(questions.app)
app.add_typer(batch.app)
app.add_typer(comparison.app)
app.add_typer(harness.app)
app.add_typer(calibration.app)
app.add_typer(serving.app)
app.add_typer(agents.app)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.add_typer(users.app, name="users")


def main() -> None:
    """Run the command line; a FathomError becomes two lines on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        prepare_process()
        app()
    except FathomError as error:
        _fail(error)
    except KeyboardInterrupt:
        err.print("stopped; what was finished is kept")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        _fail(
            FathomError(
                f"the system answered: {error}",
                hint="check free space and permissions of the library's folder (--home)",
            )
        )
    except Exception as error:  # the edge: a person gets two lines, whoever mends it the traceback
        with NamedTemporaryFile("w", prefix="fathom-error-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        _fail(
            FathomError(
                f"something unexpected went wrong: {type(error).__name__}: {error}",
                hint=f"this is a fault in Fathom; {log.name} has the details. What was committed is"
                " kept: fathom doctor",
            )
        )


def _fail(error: FathomError) -> Never:
    show_error(error)
    sys.exit(1)


if __name__ == "__main__":
    main()
