"""The command line as a person meets it: real processes, exit codes, stdout and stderr."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HANDBOOK, INGEST_DOCS
from rag.errors import FathomError
from rag.lm.catalog import resolve_model
from rag.settings import load_settings
from ui.cli import main

ROOT = Path(__file__).resolve().parents[1]


def _is_here(name: str) -> bool:
    try:
        resolve_model(name, load_settings())
    except FathomError:
        return False
    return True


needs_models = pytest.mark.skipif(
    not (_is_here("all-minilm-l6-v2") and _is_here("smollm2-135m")),
    reason="the test models are not fetched: make test fetches them",
)


def fathom(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "FATHOM_HOME": str(home),
        "FATHOM_MODEL": "smollm2-135m",
        "FATHOM_MAX_NEW_TOKENS": "32",
        "FATHOM_RETRIEVAL_TOKENS": "400",
    }
    return subprocess.run(
        [sys.executable, "-m", "ui.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert "hint: " in done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
    assert done.stdout == ""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library with the handbook in it, made by the command line itself."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "handbook.md").write_text(HANDBOOK)
    done = fathom(folder / "home", "ingest", str(folder / "handbook.md"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "added"
    return folder / "home"


@needs_models
@pytest.mark.model
def test_ask_prints_the_contract_and_its_quotes_are_the_text(home: Path) -> None:
    done = fathom(home, "ask", "--json", "--thrift", "0.02", "What is the harbour fee a night?")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"answer", "abstained", "citations", "receipt"}
    for citation in answer["citations"]:
        span = ("--start", str(citation["start"]), "--end", str(citation["end"]))
        text = fathom(home, "text", str(citation["document"]), *span, "--json")
        assert json.loads(text.stdout)["text"] == citation["quote"]
        assert citation["verified"]
    receipt = answer["receipt"]
    assert receipt["kv_bytes"]["predicted"] == receipt["kv_bytes"]["actual"]
    assert receipt["model"] == "smollm2-135m"
    assert receipt["thrift"] == 0.02
    stored = fathom(home, "receipt", receipt["id"], "--json")
    assert json.loads(stored.stdout) == answer


@needs_models
@pytest.mark.model
def test_ask_prints_answer_and_receipt_for_people(home: Path) -> None:
    done = fathom(home, "ask", "--route", "retrieval", "What colour is the south beacon?")
    assert done.returncode == 0, done.stderr
    assert "retrieval was asked for" in done.stdout
    assert "KV" in done.stdout


@needs_models
@pytest.mark.model
@pytest.mark.skipif(not INGEST_DOCS.is_dir(), reason="../shared/data/ingest_docs is not here")
def test_full_on_a_document_that_does_not_fit_names_the_gate(home: Path) -> None:
    path = INGEST_DOCS / "debian-policy.pdf"
    assert fathom(home, "ingest", str(path)).returncode == 0
    question = "Which section must a package that only provides debugging symbols use?"
    done = fathom(home, "ask", "--json", "--route", "full", "-d", path.name, question)
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)["receipt"]
    assert receipt["route"] == "retrieval"
    assert "fails a gate: tokens" in receipt["reason"]
    assert receipt["read"]["not_read"]
    assert fathom(home, "delete", path.name, "--json").returncode == 0


@needs_models
def test_a_piped_list_has_whole_titles_and_text_says_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / f"{'a long title ' * 9}.txt"
    path.write_text("The harbour fee is 35 crowns a night.")
    home = tmp_path / "home"
    assert fathom(home, "ingest", str(path)).returncode == 0
    listed = fathom(home, "list").stdout.splitlines()
    assert len(listed) == 2
    assert path.name in listed[1]
    assert fathom(home, "text", "1", "--start", "37").stdout == "\n"
    for wrong in (("--start", "38"), ("--start", "9", "--end", "4")):
        refused = fathom(home, "text", "1", *wrong)
        assert refused.returncode == 2
        assert "--start" in refused.stderr


@needs_models
def test_list_plan_and_doctor_speak_json(home: Path) -> None:
    (document,) = fathom(home, "list", "--json").stdout.splitlines()
    assert json.loads(document)["title"] == "handbook.md"
    plan = json.loads(fathom(home, "plan", "--json").stdout)
    assert plan["route"] == "full"
    assert plan["longest_context_tokens"] == 8192
    lines = [json.loads(line) for line in fathom(home, "doctor", "--json").stdout.splitlines()]
    *checks, last = lines
    assert last == {"consistent": True, "failed": []}
    assert [c["name"] for c in checks if not c["passed"]] == []
    assert len(checks) >= 9


@needs_models
def test_a_document_comes_and_goes(home: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("The lighthouse keeper is called by bell.")
    assert "added" in fathom(home, "ingest", str(tmp_path)).stdout
    assert "same content" in fathom(home, "ingest", str(tmp_path)).stdout
    assert "deleted" in fathom(home, "delete", "note.txt").stdout
    _error(fathom(home, "delete", "note.txt"), "no document 'note.txt'", "fathom list")


def test_a_fault_of_our_own_is_two_lines_and_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**flags: object) -> None:
        raise RuntimeError("the tide is out")

    monkeypatch.setattr("ui.verbs.documents.load_settings", broken)
    monkeypatch.setattr("sys.argv", ["fathom", "list"])
    with pytest.raises(SystemExit, match="1"):
        main()
    shown = " ".join(capsys.readouterr().err.split())
    assert "RuntimeError: the tide is out" in shown
    assert "Traceback" not in shown
    found = re.search(r"hint: .*; (\S+\.log) has the details", shown)
    assert found
    log = Path(found.group(1))
    assert "in broken" in log.read_text()
    log.unlink()


@needs_models
def test_a_picture_in_a_folder_is_passed_over_and_named_is_an_error(
    home: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "repository" / "logo.png"
    picture.parent.mkdir()
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (picture.parent / "readme.md").write_text("# Lighthouse\n\nIts lamp is oiled on Mondays.\n")
    done = fathom(home, "ingest", str(picture.parent))
    assert done.returncode == 0
    assert "logo.png" in done.stderr
    assert "1 of 2 files are of a kind that is not read" in done.stderr
    assert "readme.md" in fathom(home, "list", "-c", "repository", "--json").stdout
    _error(fathom(home, "ingest", str(picture)), "logo.png")


@needs_models
def test_bad_input_is_told(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    _error(fathom(home, "ingest", str(tmp_path / "none.pdf")), "there is no file")
    _error(fathom(home, "ingest", str(tmp_path / "empty.txt")), "empty.txt is empty")
    _error(fathom(home, "ingest", str(tmp_path / "folder")), "holds no file")
    _error(fathom(home, "ask", "x", FATHOM_MODEL="gpt-9"), "gpt-9", "smollm2-135m")
    _error(fathom(tmp_path / "new", "ask", "x"), "no document to ask about", "fathom ingest")
    _error(fathom(home, "list", FATHOM_COLOUR="red"), "FATHOM_COLOUR")
    _error(fathom(home, "list", FATHOM_PORT="many"), "port")
    _error(fathom(home, "receipt", "nothing"), "no receipt")
    assert fathom(home, "ask", " ").returncode == 2
    assert fathom(home, "ask").returncode == 2


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "fathom.sqlite").write_text("not a database " * 100)
    _error(fathom(tmp_path, "list"), "not a database", "doctor")
    assert (tmp_path / "fathom.sqlite").read_text().startswith("not a database")


@needs_models
def test_a_port_in_use_and_a_public_address_are_refused(home: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _error(fathom(home, "serve", "--port", port), port, "--port")
    _error(fathom(home, "serve", "--host", "0.0.0.0"), "0.0.0.0")
