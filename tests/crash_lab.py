"""A warm process that forks others which write to a library, are killed, and are checked after.

Started by test_durability.py; commands and answers are one JSON object a line. Forking saves each
victim the seconds of importing, so that hundreds can be killed in a test run. Imports no torch.

A victim can be killed at its n-th *step*: each SQL statement that
writes, each commit, and each time it opens
for writing, syncs, renames or removes a file in the library. SQLAlchemy's events, the interpreter's
audit hook and a wrapped os.fsync tell of them, so the program itself holds no failpoints.
"""

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from hash_embedder import HashEmbedder
from ingest.chunking import chunk_text
from ingest.pipeline import original_path
from ingest.reindex import reembed_library
from rag.runtime import prepare_process
from rag.settings import Settings
from rag.store.documents import SourceFile
from rag.types import CanonicalText
from ui.assembly import Fathom
from ui.doctor import examine_library, repair


class OtherEmbedder(HashEmbedder):
    fingerprint = "other-64"


def open_library(home: str, embedder: HashEmbedder | None = None) -> Fathom:
    return Fathom(Settings(home=Path(home)), embedder=embedder or HashEmbedder())


def words_of(name: str) -> str:
    """Return the text of the document of this name: several chunks, each with a word of its own."""
    part = "The keeper of {0} writes that {0}x{1} was seen from the tower. "
    return "".join(part.format(name, number) for number in range(16))


# ---- victims ----------------------------------------------------------------------------------


def write(home: str, seed: int, ledger: str) -> None:
    """Add, delete, search and snapshot until killed; what was done stands in the ledger."""
    fathom, choose = open_library(home), random.Random(seed)
    mine: list[tuple[str, int]] = []
    log = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(*words: str) -> None:
        os.write(log, (" ".join(words) + "\n").encode())

    say("ready")
    for number in range(10**6):
        action = choose.random()
        if action < 0.6 or not mine:
            name = f"s{seed}n{number}"
            say("adding", name)
            document_id = add(fathom, name)
            say("added", name)
            mine.append((name, document_id))
        elif action < 0.8:
            name, document_id = mine.pop(choose.randrange(len(mine)))
            say("deleting", name)
            fathom.delete(document_id)
            say("deleted", name)
        elif action < 0.9:
            fathom.index.snapshot()
        else:
            name, document_id = choose.choice(mine)
            fathom.index.catch_up()
            assert_found(fathom, name)


def add(fathom: Fathom, name: str) -> int:
    """Put a document into the store the way ingest does, but without a reader's process."""
    embedder = fathom.embedder
    content = CanonicalText(words_of(name), "text/plain")
    chunks = chunk_text(
        content,
        title=name,
        token_offsets=embedder.token_offsets,
        max_tokens=embedder.max_tokens,
    )
    vectors = embedder.embed([chunk.text for chunk in chunks])
    data = content.text.encode()
    file = SourceFile(f"/{name}", name, hashlib.sha256(data).hexdigest(), len(data))
    original = original_path(fathom.settings, file.content_sha256)
    original.parent.mkdir(parents=True, exist_ok=True)
    original.write_bytes(data)
    return fathom.store.save(file, content, chunks, vectors, embedder=embedder.fingerprint).id


SCENARIOS: dict[str, Callable[[Fathom], object]] = {
    "add": lambda f: add(f, "new"),
    "ingest": lambda f: f.ingest(f.settings.home.parent / "new.txt"),
    "version": lambda f: f.ingest(f.settings.home.parent / "changed" / "kept.txt"),
    "delete": lambda f: f.delete(f.store.find("doomed.txt").id),
    "snapshot": lambda f: f.index.snapshot(),
    "rebuild": lambda f: f.index.rebuild(),
    "reembed": lambda f: reembed_library(f.database, OtherEmbedder(), f.settings),
}


def run(home: str, scenario: str, stop_at: int, tell: Callable[[Any], None]) -> None:
    """Run one scenario and die at its n-th step; tell the step's name first."""
    fathom = open_library(home)
    fathom.index.catch_up()
    done = 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        if done == stop_at:
            tell({"step": name})
            os.kill(os.getpid(), signal.SIGKILL)

    watch(Path(home), step)
    SCENARIOS[scenario](fathom)
    done = -(10**9)
    tell({"step": None})


def watch(home: Path, step: Callable[[str], None]) -> None:
    """Call `step` before each thing that can leave a mark on disk."""

    @event.listens_for(Engine, "before_cursor_execute")
    def statement(connection: Connection, _cursor: object, sql: str, *_rest: object) -> None:
        if connection.get_execution_options().get("fathom_write"):
            step(sql.split("\n")[0][:60])

    @event.listens_for(Engine, "commit")
    def commit(connection: Connection) -> None:
        if connection.get_execution_options().get("fathom_write"):
            step("COMMIT")

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            _, _, flags = arguments
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif name not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path = arguments[0]
        if isinstance(path, str | os.PathLike) and str(path).startswith(str(home)):
            step(f"{name} {Path(path).suffix or Path(path).name[:9]}")

    sys.addaudithook(audit)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        step("fsync")
        fsync(descriptor)

    os.fsync = synced  # type: ignore[assignment]


# ---- checks -----------------------------------------------------------------------------------


def check(home: str, present: list[str], absent: list[str]) -> dict[str, Any]:
    """Return what is wrong, and the titles of all documents; `present` ones must be found."""
    fathom = open_library(home)
    wrong = wrong_with(fathom)
    for name in present:
        assert_found(fathom, name)
    for name in absent:
        assert fathom.lexical.search(f"{name}x1", top_k=1) == [], name
    return {"wrong": wrong, "titles": sorted(d.title for d in fathom.documents())}


def mend(home: str, embedder: str) -> dict[str, Any]:
    """Repair a library, and return what is still wrong."""
    active = OtherEmbedder() if embedder == OtherEmbedder.fingerprint else HashEmbedder()
    fathom = open_library(home, active)
    list(repair(fathom))
    return wrong_with(open_library(home, active))


def prepare(home: str) -> None:
    """Make the library that the scenarios start from, with files for them beside it."""
    root = Path(home).parent
    (root / "changed").mkdir()
    (root / "kept.txt").write_text(words_of("kept"))
    (root / "doomed.txt").write_text(words_of("doomed"))
    (root / "new.txt").write_text(words_of("new"))
    (root / "changed" / "kept.txt").write_text(words_of("changed"))
    fathom = open_library(home)
    fathom.ingest(root / "kept.txt", source="kept")
    fathom.index.snapshot()
    fathom.ingest(root / "doomed.txt")


def state(home: str) -> dict[str, Any]:
    """Return what a library holds, and what is wrong with it, before any repair."""
    plain = open_library(home)
    active = plain.store.active_embedder()
    other = active == OtherEmbedder.fingerprint
    fathom = open_library(home, OtherEmbedder() if other else None)
    documents = fathom.store.all(include_superseded=True)
    originals = [original_path(fathom.settings, d.content_sha256).is_file() for d in documents]
    return {
        "wrong": wrong_with(fathom),
        "documents": [[d.title, d.version, d.is_latest] for d in documents],
        "originals": all(originals),
        "embedder": active,
    }


def wrong_with(fathom: Fathom) -> dict[str, str]:
    return {c.name: c.detail for c in examine_library(fathom) if not c.passed}


def assert_found(fathom: Fathom, name: str) -> None:
    """Both searches find the document by its own words."""
    hits = [i for i, _ in fathom.lexical.search(f"{name}x1", top_k=3)]
    texts = [stored.chunk.text for stored in fathom.store.chunks(hits).values()]
    assert any(f"{name}x1 " in text for text in texts), (name, texts)
    stored = next(c for c in fathom.store.chunks(hits).values() if f"{name}x1 " in c.chunk.text)
    vector = fathom.embedder.embed([stored.chunk.text])[0]
    fathom.index.catch_up()
    best = fathom.index.search(vector, top_k=1)[0][1]
    own = fathom.index.search(vector, top_k=1, among=[stored.id])
    assert own, name
    assert own[0][1] > best - 1e-5, (name, own, best)


# ---- the warm process --------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., Any]] = {
    "check": check, "mend": mend, "prepare": prepare, "state": state,
}  # fmt: skip


def main() -> None:
    """Answer commands until stdin ends."""
    prepare_process()
    for line in sys.stdin:
        command = json.loads(line)
        sys.stdout.write((_answer(command.pop("do"), command) or '{"error": "it died"}') + "\n")
        sys.stdout.flush()


def _answer(do: str, arguments: dict[str, Any]) -> str:
    if do == "reap":
        os.waitpid(arguments["pid"], 0)
        return "null"

    def work(tell: Callable[[Any], None]) -> None:
        if do == "write":
            write(**arguments)
        elif do == "run":
            run(**arguments, tell=tell)
        else:
            tell(CHECKS[do](**arguments))

    pid, answers = fork(work)
    if do == "write":
        return str(pid)
    with os.fdopen(answers, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(pid, 0)
    return told


def fork(work: Callable[[Callable[[Any], None]], None]) -> tuple[int, int]:
    """Run `work` in a child; it may tell one thing. Return its pid and where that can be read."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writable)
        return pid, readable
    os.close(readable)

    def tell(value: object) -> None:
        os.write(writable, json.dumps(value).encode())

    try:
        work(tell)
        os._exit(0)
    except BaseException:
        import traceback

        tell({"error": traceback.format_exc()})
        os._exit(1)


if __name__ == "__main__":
    main()
