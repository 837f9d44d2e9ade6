"""The house keeps its own rules."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ui.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("rag", "ingest", "eval", "ui") for p in (ROOT / folder).rglob("*.py")]


def test_packages_are_imported_by_name_only() -> None:
    """`import eval` would hide the builtin: only `from x.y import Z` is used."""
    for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]:
        assert not re.search(r"^\s*import (rag|ingest|eval|ui)\b", path.read_text(), re.M), path


def test_heavy_libraries_have_one_home() -> None:
    homes = {
        "faiss": {
            "rag/retrieval/vector_index.py",
            "eval/bench/gpu.py",
            "eval/bench/gpu_search.py",
            "eval/bench/search.py",
        },
        "sentence_transformers": {
            "rag/retrieval/embedding.py",
            "rag/retrieval/gpu_embedder.py",
            "rag/retrieval/openvino_embedder.py",
            "rag/retrieval/reranker.py",
            "eval/bench/ingest.py",
            "eval/bench/gpu_embed.py",
        },
        "openvino": {"rag/runtime.py"},
        "Stemmer": {"rag/retrieval/lexical_score.py"},
        "tantivy": {"rag/retrieval/tantivy_index.py"},
        "psycopg": set(),
        "gradio": {"ui/app.py", "ui/look.py", *_files("ui/tabs")},
        "pypdfium2": {
            "ingest/readers/pdf.py",
            "ingest/readers/hidden_text.py",
            "ingest/readers/page_image.py",
        },
        "pikepdf": {"ingest/readers/pdf.py"},
        "kreuzberg": {"ingest/readers/office.py"},
        "httpx": {"ingest/sources.py", "rag/lm/model_server.py"},
        "matplotlib": {"ui/plots.py", "eval/pictures.py"},
        "openpyxl": {"eval/tables.py"},
        "pyarrow": {"eval/tables.py"},
        "lm_eval": {"eval/harness.py"},
        "argon2": {"rag/store/accounts.py"},
        "prometheus_client": {"ui/metrics.py"},
        "mcp": {"ui/mcp_server.py"},
    }
    for library, allowed in homes.items():
        users = {
            str(path.relative_to(ROOT))
            for path in SOURCES
            if re.search(rf"^\s*(import|from) {library}\b", path.read_text(), re.M)
        }
        assert users <= allowed, (library, users - allowed)


def _files(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.py")}


def test_every_command_has_help_examples_json_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = list(_leaves(typer.main.get_command(app), "fathom"))
    assert len(commands) > 15
    for name, command in commands:
        assert command.help, name
        assert "Examples:" in (command.epilog or ""), name
        assert name in readme, name
        if name == "fathom mcp":  # speaks JSON-RPC on standard output, and nothing else
            continue
        assert "--json" in {option for p in command.params for option in p.opts}, name


def _leaves(command: object, name: str) -> Iterator[tuple[str, Any]]:
    for word, sub in getattr(command, "commands", {}).items():
        yield from _leaves(sub, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield name, command


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from ui.cli import app;"
        "print([m for m in ('torch', 'faiss', 'gradio', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_entry_point_lets_threads_sleep_before_torch_is_imported() -> None:
    code = (
        "import os; os.environ.pop('OMP_WAIT_POLICY', None);"
        "from rag.runtime import prepare_process; prepare_process(); import torch;"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "PASSIVE"
    assert "prepare_process()" in (ROOT / "ui" / "cli.py").read_text()


def test_documents_name_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text()):
        assert name in targets, name


def test_constraints_pin_every_dependency_without_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        asked += extra
    missing = {canonicalize_name(Requirement(line).name) for line in asked} - pinned
    assert missing == set()
    assert not [line for line in lines if "://" in line or " @ " in line]
