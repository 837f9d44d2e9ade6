"""What every entry point does before it imports anything heavy."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rag.errors import InstallError

# Read once by the libraries when they load; a value the user has set is kept.
_PROCESS_ENVIRONMENT = {
    # libgomp's threads sleep instead of spinning: on a busy machine decoding is up to 60 times
    # faster (docs/decisions/0004). It is read when torch is imported.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def prepare_process() -> None:
    """Set the process up for torch, and check that the installation is the right one.

    Call it first in every entry point, before torch is imported. Nothing is fetched from a network
    after it unless `allow_hub` is called.

    Raises:
        InstallError: if both FAISS builds are installed, or none, or `rag` is another project's.
    """
    if "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        raise InstallError(
            "torch was imported before prepare_process(); OMP_WAIT_POLICY is not set",
            hint="call prepare_process() first, or set OMP_WAIT_POLICY=PASSIVE yourself",
        )
    for name, value in _PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    check_packages_are_ours()
    check_one_faiss()


@contextmanager
def without_collecting() -> Iterator[None]:
    """Look for no garbage inside the block, where libraries are imported and a model is opened.

    What they make stays; the collector would go through all of it again and again, which is a
    tenth of a cold start (docs/log.md). What is there at the end is not looked at again, so that
    this is for what a process does once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()


def check_packages_are_ours() -> None:
    """Raise InstallError if `ingest`, `eval` or `ui` would come from elsewhere than `rag`.

    The four names are generic, and PyPI has a `rag` and an `eval` of its own.
    """
    root = Path(__file__).resolve().parents[1]
    for name in ("ingest", "eval", "ui"):
        if not (root / name / "__init__.py").is_file():
            raise InstallError(
                f"package rag was found in {root}, but {name} is not beside it",
                hint="another project's `rag` is installed; use a fresh venv (make setup)",
            )


def check_one_faiss() -> str:
    """Return the name of the installed FAISS distribution.

    Raises:
        InstallError: unless exactly one of faiss-cpu and faiss-gpu is installed. Both write the
            same folder, pip does not notice, and the last one installed wins silently.
    """
    found = [name for name in ("faiss-cpu", "faiss-gpu") if _is_installed(name)]
    if len(found) == 1:
        return found[0]
    raise InstallError(
        f"found {' and '.join(found) if found else 'no FAISS'}; expected exactly one FAISS build",
        hint="delete .venv and run make setup, or: pip uninstall faiss-cpu faiss-gpu, then"
        " pip install -e '.[cpu]' or '.[gpu]'",
    )


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def load_openvino() -> Any:  # noqa: ANN401 - a package whose stubs are not always there
    """Return the package openvino.

    Importing it reports the import to its maker, unless the package that does so is not there:
    nothing is sent from here.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
