"""Pull the plug anywhere: nothing acknowledged is lost, nothing half-done shows, deleted is gone.

Real processes, real SIGKILL, real files. `pytest -m long` runs the same for longer.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import HANDBOOK
from hash_embedder import HashEmbedder
from rag.errors import StorageFullError
from rag.settings import Settings
from ui.assembly import Fathom
from ui.doctor import examine_library

HERE = Path(__file__).resolve().parent
OLD, NEW = HashEmbedder.fingerprint, "other-64"


class Lab:
    """The warm process of crash_lab.py."""

    def __init__(self) -> None:
        paths = [str(HERE.parent), str(HERE)]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "crash_lab.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def ask(self, do: str, **arguments: Any) -> Any:  # noqa: ANN401 - what the command answers
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert not (isinstance(answer, dict) and "error" in answer), answer["error"]
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Return a warm process that forks victims and checkers."""
    lab = Lab()
    yield lab
    lab.close()


# ---- killed at random -------------------------------------------------------------------------


class Ledger:
    """What the writers said before and after each thing they did."""

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.gone: set[str] = set()
        self.open: set[str] = set()
        self.acknowledged = 0

    def read(self, path: Path) -> None:
        pending = None
        for line in path.read_text().splitlines():
            act, *names = line.split()
            if act in ("adding", "deleting"):
                pending = names[0]
            elif act in ("added", "deleted"):
                pending = None
                self.acknowledged += 1
                self.kept.add(names[0]) if act == "added" else self.kept.discard(names[0])
                if act == "deleted":
                    self.gone.add(names[0])
        if pending:
            self.kept.discard(pending)
            self.open.add(pending)

    def settle(self, titles: set[str]) -> None:
        """What was under way when the process died may have happened or not, as a whole."""
        for name in self.open:
            (self.kept if name in titles else self.gone).add(name)
        self.open = set()


def kill_loop(lab: Lab, root: Path, *, writers: int, rounds: int, seed: int) -> Ledger:
    """Start writers, kill them all in the middle, check everything; again and again."""
    home, ledger, chance = str(root / "home"), Ledger(), random.Random(seed)
    for number in range(rounds):
        paths = [root / f"ledger-{number}-{writer}" for writer in range(writers)]
        pids = [
            lab.ask("write", home=home, seed=seed * 1000 + number * 10 + writer, ledger=str(path))
            for writer, path in enumerate(paths)
        ]
        _wait_for(lambda paths=paths: all(p.is_file() and "added" in p.read_text() for p in paths))
        time.sleep(chance.uniform(0.0, 0.4))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            lab.ask("reap", pid=pid)
        for path in paths:
            ledger.read(path)
        searched = chance.sample(sorted(ledger.kept), min(5, len(ledger.kept)))
        forgotten = chance.sample(sorted(ledger.gone), min(5, len(ledger.gone)))
        found = lab.ask("check", home=home, present=searched, absent=forgotten)
        found["wrong"].pop("index snapshots", None)  # half a file that nothing reads
        found["wrong"].pop("original files", None)  # a copy whose commit did not come
        assert found["wrong"] == {}
        titles = set(found["titles"])
        assert ledger.kept - titles == set(), "acknowledged and lost"
        assert ledger.gone & titles == set(), "deleted and back"
        assert titles - ledger.kept - ledger.open == set(), "never acknowledged nor begun"
        ledger.settle(titles)
    return ledger


@pytest.mark.parametrize(("writers", "rounds"), [(1, 5), (3, 5)])
def test_killed_writers_lose_nothing_acknowledged(
    lab: Lab, tmp_path: Path, writers: int, rounds: int
) -> None:
    ledger = kill_loop(lab, tmp_path, writers=writers, rounds=rounds, seed=writers)
    assert ledger.acknowledged >= rounds * writers


@pytest.mark.long
@pytest.mark.parametrize(("writers", "rounds"), [(1, 100), (3, 100)])
def test_killed_writers_lose_nothing_acknowledged_long(
    lab: Lab, tmp_path: Path, writers: int, rounds: int
) -> None:
    ledger = kill_loop(lab, tmp_path, writers=writers, rounds=rounds, seed=40 + writers)
    assert ledger.acknowledged >= rounds * writers


# ---- killed at every step ---------------------------------------------------------------------

KEPT, DOOMED = ["kept.txt", 1, True], ["doomed.txt", 1, True]
BEFORE = [KEPT, DOOMED]
# what the library may hold after a kill: all as before, or all as after
AFTER = {
    "snapshot": BEFORE,
    "rebuild": BEFORE,
    "delete": [KEPT],
    "add": [KEPT, DOOMED, ["new", 1, True]],
    "ingest": [KEPT, DOOMED, ["new.txt", 1, True]],
    "version": [KEPT, DOOMED, ["kept.txt", 1, True]],
    "reembed": BEFORE,
}
HARMLESS = {"index snapshots", "original files"}  # half-made copies, which a repair removes


@pytest.fixture(scope="module")
def base(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a library of two documents, one of them newer than the snapshot."""
    root = tmp_path_factory.mktemp("base") / "root"
    root.mkdir()
    lab.ask("prepare", home=str(root / "home"))
    return root


def kill_at_every_step(lab: Lab, base: Path, root: Path, scenario: str) -> list[str]:
    """Kill the scenario at its first step, then its second ..., each time on a fresh copy."""
    home, committed = str(root / "home"), False
    steps: list[str] = []
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        told = lab.ask("run", home=home, scenario=scenario, stop_at=len(steps) + 1)
        found = lab.ask("state", home=home)
        where = f"{scenario}, step {len(steps) + 1}: {told['step']}"
        assert found["documents"] in (BEFORE, AFTER[scenario]), where
        assert set(found["wrong"]) <= HARMLESS, (where, found["wrong"])
        assert found["originals"], where
        if committed and scenario in ("delete", "add"):
            assert found["documents"] == AFTER[scenario], f"{where}: a commit came undone"
        if found["wrong"]:
            assert lab.ask("mend", home=home, embedder=found["embedder"]) == {}, where
        if told["step"] is None:
            assert found["documents"] == AFTER[scenario]
            assert found["embedder"] == (NEW if scenario == "reembed" else OLD)
            return steps
        committed = committed or (bool(steps) and found["documents"] == AFTER[scenario] != BEFORE)
        steps.append(told["step"])


@pytest.mark.parametrize("scenario", ["snapshot", "delete", "add"])
def test_a_kill_at_any_step_leaves_all_or_nothing(
    lab: Lab, base: Path, tmp_path: Path, scenario: str
) -> None:
    steps = kill_at_every_step(lab, base, tmp_path / "root", scenario)
    assert "COMMIT" in steps
    assert "BEGIN IMMEDIATE" in steps
    if scenario != "add":
        assert steps.count("fsync") == 4, "file, folder, manifest, folder"
        order = [steps.index(s) for s in ("open .tmp", "fsync", "os.rename .tmp")]
        assert order == sorted(order), "written, synced, then renamed"


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["ingest", "version", "rebuild", "reembed"])
def test_a_kill_at_any_step_leaves_all_or_nothing_long(
    lab: Lab, base: Path, tmp_path: Path, scenario: str
) -> None:
    assert len(kill_at_every_step(lab, base, tmp_path / "root", scenario)) > 15


# ---- a full disk ------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of this size."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def library_at(home: Path) -> Fathom:
    return Fathom(Settings(home=home), embedder=HashEmbedder())


def consistent(fathom: Fathom) -> bool:
    return [c.name for c in examine_library(fathom) if not c.passed] == []


def test_a_disk_that_fills_up_in_a_commit_keeps_the_library_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "6m") as disk:
        library = library_at(disk / "home")
        kept = tmp_path / "kept.md"
        kept.write_text(HANDBOOK)
        library.ingest(kept)
        big = tmp_path / "big.txt"
        big.write_text(" ".join(f"word{n}" for n in range(200_000)))
        with pytest.raises(StorageFullError, match="disk is full"):
            library.ingest(big)
        assert [d.title for d in library.documents()] == ["kept.md"]
        assert library.lexical.search("crowns", top_k=1)
        assert consistent(library)
        small = tmp_path / "small.txt"
        small.write_text("The next file still fits.")
        assert library.ingest(small).outcome == "added"
        library.database.engine.dispose()


def test_a_disk_that_is_full_for_a_snapshot_does_not_stop_the_search(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with small_disk(home / "index", "48k"):
        library = library_at(home)
        kept, long = tmp_path / "kept.md", tmp_path / "long.md"
        kept.write_text(HANDBOOK)
        library.ingest(kept)
        before = library.index.snapshot()
        assert before is not None
        long.write_text("\n\n".join(f"# Part {n}\n\nwords of part {n}" for n in range(600)))
        number = library.ingest(long).document.id
        with pytest.raises(StorageFullError, match="snapshot"):
            library.index.snapshot()
        assert before.exists(), "the older one stays"
        assert not list(before.parent.glob("*.tmp"))
        fresh = library_at(home)
        fresh.index.catch_up()
        assert fresh.index.num_vectors == library.index.num_vectors > 600
        library.delete(number)
        assert consistent(library)
        library.database.engine.dispose()
        fresh.database.engine.dispose()


# ---- several processes ------------------------------------------------------------------------


def test_two_processes_that_snapshot_at_once_leave_a_good_one(
    lab: Lab, base: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(base, root)
    script = (
        "import sys; from crash_lab import open_library; f = open_library(sys.argv[1]);"
        "f.index.catch_up(); print('ready', flush=True); sys.stdin.readline();"
        "print([bool(f.index.snapshot(wait=n % 2 == 0)) for n in range(40)].count(True))"
    )
    processes = [_start(script, str(root / "home")) for _ in range(2)]
    written = [int(answer) for answer in _go(processes)]
    assert min(written) >= 20, "one that waits gets its turn"
    assert lab.ask("state", home=str(root / "home"))["wrong"] == {}


def test_a_process_behind_the_logs_floor_starts_anew(lab: Lab, base: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(base, root)
    script = (
        "import sys; from crash_lab import *; f = open_library(sys.argv[1]);"
        "f.index.catch_up(); print('ready', flush=True); sys.stdin.readline();"
        "f.index.catch_up(); d = f.index.differences(); print(d.wrong + d.foreign);"
        "assert_found(f, 'new')"
    )
    late = _start(script, str(root / "home"))
    for scenario in ("delete", "ingest", "snapshot", "snapshot"):
        lab.ask("run", home=str(root / "home"), scenario=scenario, stop_at=0)
    assert _go([late]) == ["[]"]


def test_doctor_is_not_misled_by_others_at_work(lab: Lab, tmp_path: Path) -> None:
    home = tmp_path / "home"
    pid = lab.ask("write", home=str(home), seed=5, ledger=str(tmp_path / "ledger"))
    try:
        _wait_for(lambda: (tmp_path / "ledger").is_file())
        library = library_at(home)
        for _ in range(12):
            wrong = {c.name: c.detail for c in examine_library(library) if not c.passed}
            wrong.pop("original files", None)  # this writer copies them without ingest's lock
            assert wrong == {}
    finally:
        os.kill(pid, signal.SIGKILL)
        lab.ask("reap", pid=pid)


def test_a_reader_never_shows_what_another_process_deletes(
    lab: Lab, base: Path, tmp_path: Path
) -> None:
    """A reader searches all the while; once a deletion is acknowledged, nothing is of it."""
    root = tmp_path / "root"
    shutil.copytree(base, root)
    home = str(root / "home")
    deleter = (
        "import sys; from crash_lab import *; f = open_library(sys.argv[1]);"
        "docs = [(n, add(f, n)) for n in (f'z{i}' for i in range(12))];"
        "print('ready', flush=True); sys.stdin.readline();"
        "[(f.delete(d), print(n, flush=True)) for n, d in docs]"
    )
    process = _start(deleter, home)
    library = library_at(Path(home))
    retriever = _retriever(library)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    gone: set[str] = set()
    for line in process.stdout:
        gone.add(line.strip())
        hits = retriever.retrieve("keeper tower seen", library.documents(), num_candidates=200)
        shown = " ".join(hit.chunk.chunk.text for hit in hits)
        assert "keptx1 " in shown, "what was not deleted is found"
        assert not [name for name in gone if f"{name}x" in shown]
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0
    assert len(gone) == 12


def _retriever(library: Fathom) -> Any:  # noqa: ANN401
    from rag.retrieval.retriever import Retriever

    return Retriever(library.store, library.index, library.lexical, library.embedder)


def _start(script: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _go(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let waiting processes go on, and return what each then printed."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return answers


def _wait_for(condition: Any, seconds: float = 60.0) -> None:  # noqa: ANN401
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


# ---- deleted ----------------------------------------------------------------------------------

SECRET = "Quintessel Vanderbrook pays zolothurn marks to the ferryman of Esperwyck."
SECRET_WORDS = ("quintessel", "vanderbrook", "zolothurn", "esperwyck")


def _files_with(folder: Path, *words: str) -> list[str]:
    """Return every file below `folder` in which one of the words stands, in any encoding of it."""
    needles = [word.encode(code) for word in words for code in ("utf-8", "utf-16-le")]
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(needle in path.read_bytes().lower() for needle in needles)
    )


def test_after_a_deletion_no_byte_of_the_text_is_left(library: Fathom, tmp_path: Path) -> None:
    home = library.settings.home
    samples = home / "samples"
    samples.mkdir(parents=True)
    secret = samples / "secret.txt"  # as the sample lies, inside the library
    secret.write_text(f"# Ferry\n\n{SECRET}\n\n" + "Nothing else of note. " * 40)
    other = tmp_path / "other.md"
    other.write_text(HANDBOOK)
    document = library.ingest(secret).document
    library.ingest(other)
    library.index.snapshot()
    answer = library.service().answer("Who pays zolothurn marks to the ferryman?")
    vector = library.index.vectors(library.store.chunk_ids([document.id]))[1][0].tobytes()

    before = _files_with(home, *SECRET_WORDS)
    places = {path.split("/")[0].split("-")[0] for path in before}
    assert places == {"fathom.sqlite", "originals", "samples"}, "the search would have found it"
    assert any(vector in path.read_bytes() for path in (home / "index").rglob("*.faiss"))
    assert "zolothurn" in json.dumps(library.receipts.load(answer.receipt.id).to_json()).lower()

    library.delete(document.id)

    assert _files_with(home, *SECRET_WORDS) == []
    assert not any(vector in path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert "zolothurn" not in json.dumps(library.receipts.load(answer.receipt.id).to_json()).lower()
    assert library.lexical.search("zolothurn", top_k=5) == []
    hits = _retriever(library).retrieve(SECRET, library.documents(), num_candidates=50)
    assert not [hit for hit in hits if "ferryman" in hit.chunk.chunk.text]
    assert consistent(library)


@pytest.mark.parametrize("others", [0, 400])
def test_words_go_from_the_full_text_index_however_few_are_deleted(
    library: Fathom, tmp_path: Path, others: int
) -> None:
    """FTS5 erases a few chunks one by one and many by merging: neither leaves a term."""
    many = tmp_path / "many.txt"
    many.write_text("\n\n".join(f"# Part {n}\n\nplain words {n}" for n in range(others + 1)))
    library.ingest(many)
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    number = library.ingest(secret).document.id
    assert _files_with(library.settings.home, *SECRET_WORDS)
    library.delete(number)
    assert _files_with(library.settings.home, *SECRET_WORDS) == []
    assert consistent(library)


@pytest.mark.long
def test_ten_thousand_chunks_are_deleted_within_a_second(tmp_path: Path) -> None:
    """Rows, words, vectors, original, index and snapshot: the better of two, for a busy machine."""
    library = library_at(tmp_path / "home")
    words = [f"word{n}" for n in range(5_000)]
    numbers = []
    for seed in range(3):
        chance = random.Random(seed)
        parts = [" ".join(chance.choices(words, k=60)) + "\n" for _ in range(10_000)]
        path = tmp_path / f"{seed}.txt"
        path.write_text("".join(parts))
        numbers.append(library.ingest(path).document)
    assert min(document.num_chunks for document in numbers) >= 10_000
    library.index.snapshot()
    seconds = []
    for document in numbers[:2]:
        begun = time.perf_counter()
        library.delete(document.id)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) * 10_000 / numbers[0].num_chunks < 1.0
    assert consistent(library)
