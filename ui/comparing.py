"""Comparisons of one owner: begun from a table of questions, gone on with, listed, opened, deleted.

Each is a folder of his under `FATHOM_HOME/comparisons`: the questions, the rows as they come, the
report; what `fathom compare` leaves there is among them. A run is a thread of the server. It takes
the model for a few questions at a time and then waits its turn again, so that nobody's question
waits for a whole comparison; it goes on when the page is closed, and can be gone on with after the
server was.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rag.errors import DocumentNotFoundError, FathomError, ModelError, QuotaError, SettingsError
from rag.settings import Settings
from rag.store.access import NAMELESS
from rag.types import Document

if TYPE_CHECKING:
    from eval.arms import Arm, Workplace
    from eval.examples import EvalExample
    from ui.assembly import Fathom
    from ui.library import Library

logger = logging.getLogger(__name__)

# Asked together, and again if they are broken off: others wait for the model as long.
_AT_ONCE = 4
_MAX_NEW_TOKENS = 64  # as `fathom compare`
_ABOUT = "comparison.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
_PICTURE = re.compile(r"[a-z]{1,40}\.png")
_SECONDS_TO_STOP = 60.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison as it is listed.

    `state` is running, done, or stopped; `problem` says why, where that was no person's wish.
    `num_rows` of `of_rows` questions by an arm are answered; `of_rows` is None where that is not
    known. `arm` is the one that is asked now, `waiting` its place in the queue, 0 while it has the
    model; `seconds_left` is None until something was measured. `is_stopping` says that it runs, but
    was told to stop.
    """

    name: str
    title: str
    started: str
    arms: tuple[str, ...]
    state: str
    num_rows: int
    of_rows: int | None
    has_report: bool
    problem: str = ""
    arm: str = ""
    waiting: int = 0
    seconds_left: float | None = None
    is_stopping: bool = False


def comparisons_dir(settings: Settings, owner: str) -> Path:
    """Return the folder of an owner's comparisons."""
    return settings.home / "comparisons" / (owner or NAMELESS)


def folder_name(title: str) -> str:
    """Return what the folder of a comparison is called after the table it asks."""
    words = re.sub(r"[^a-z0-9]+", "-", title.rsplit(".", 1)[0].lower()).strip("-")
    return words[:48].strip("-") or "questions"


class Comparisons:
    """One owner's comparisons; at most one of them runs."""

    def __init__(self, fathom: Fathom, library: Library) -> None:
        self._fathom = fathom
        self._library = library
        self._folder = comparisons_dir(fathom.settings, library.owner)
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()

    # ---- running --------------------------------------------------------------------------------

    def begin(self, title: str, examples: Sequence[EvalExample], arms: Sequence[Arm]) -> str:
        """Begin to ask every question by every arm; return the comparison's name.

        Raises:
            DocumentNotFoundError: if a document asked about is not in the library.
            ReadError: if evidence lies outside its document.
            SettingsError: if another one runs.
        """
        from eval.compare import keep_examples

        self._documents(examples)
        with self._lock:
            self._require_idle()
            now = datetime.now(UTC)
            name = f"{folder_name(title)}-{now:%y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
            folder = self._folder / name
            keep_examples(examples, folder)
            about = _About(title, tuple(arms), f"{now:%Y-%m-%dT%H:%M:%SZ}")
            (folder / _ABOUT).write_text(json.dumps(asdict(about)) + "\n", encoding="utf-8")
            self._start(name)
        return name

    def go_on(self, name: str) -> None:
        """Ask what a comparison that was begun here has not asked yet.

        Raises:
            DocumentNotFoundError: if there is none of this name, or a document is gone.
            SettingsError: if another one runs, or settings have changed since.
        """
        from eval.compare import load_comparison

        if _About.read(self._path(name)) is None:
            raise DocumentNotFoundError(
                f"the comparison {name} was not begun in the page",
                hint="fathom compare with the same questions and -o goes on with it",
            )
        examples, _ = load_comparison(self._path(name))
        self._documents(examples)
        with self._lock:
            self._require_idle()
            self._start(name)

    def stop(self) -> None:
        """End the one that runs; it can be gone on with."""
        for job in self._jobs.values():
            job.stop.set()

    def _require_idle(self) -> None:
        running = [name for name, job in self._jobs.items() if job.is_running]
        if running:
            raise SettingsError(
                f"the comparison {running[0]} is running",
                hint="wait for it, or stop it first",
            )

    def _start(self, name: str) -> None:
        job = _Job()
        job.thread = threading.Thread(
            target=self._run, args=[name, job], name=f"comparison {name}", daemon=True
        )
        self._jobs[name] = job
        job.thread.start()

    def _run(self, name: str, job: _Job) -> None:
        """Ask, and write the report of what there is; what goes wrong is told in the list."""
        from eval.arms import Arm
        from eval.compare import compare, load_comparison
        from eval.provenance import made_with, sha256_of_files

        folder = self._path(name)
        try:
            examples, before = load_comparison(folder)
            about = _About.read(folder)
            assert about is not None  # only what was begun here is run
            arms = [Arm(arm) for arm in about.arms]
            documents = self._documents(examples)
            place = self._workplace()
            job.expect(arms, len(examples), [row.arm for row in before.rows])
            run = made_with(
                place,
                documents,
                command=shlex.join(["fathom", "compare", about.title, "--arms", ",".join(arms)]),
                data=about.title,
                examples_sha256=sha256_of_files(folder / "examples.jsonl"),
                seed=0,
            )
            compare(
                examples,
                documents,
                arms,
                place,
                run,
                folder,
                at_once=_AT_ONCE,
                turn=lambda: self._turn(job),
                stop=job.stop,
                on_progress=job.tell,
            )
            self._write_report(folder)
        except FathomError as error:
            job.problem = f"{error.message}; {error.hint}" if error.hint else error.message
        except Exception:
            number = uuid.uuid4().hex[:8]
            logger.exception("unexpected error %s", number)
            job.problem = f"something unexpected went wrong (error {number}); the log has more"

    @contextmanager
    def _turn(self, job: _Job) -> Iterator[None]:
        """Have the model when it is this owner's turn; a stop ends the waiting, too."""
        while True:
            try:
                ticket = self._fathom.queue.join(self._library.owner)
                break
            except QuotaError:  # a question of his own is worth more than the next of a table
                if job.stop.wait(1.0):
                    yield
                    return
        with ticket:
            for waiting in ticket.wait(job.stop):
                job.waiting = waiting.place
            job.waiting = 0
            yield

    def _workplace(self) -> Workplace:
        from eval.arms import Workplace

        fathom, library = self._fathom, self._library
        library.service()  # builds what it stands on, one at a time
        settings = fathom.settings.model_copy(update={"max_new_tokens": _MAX_NEW_TOKENS})
        return Workplace(
            store=library.store,
            retriever=library.retriever,
            engine=fathom.engine,
            settings=settings,
            calibrations=fathom.calibrations,
            forget=lambda document: fathom.document_kv.forget({document.version_key}),
        )

    def _documents(self, examples: Sequence[EvalExample]) -> dict[str, Document]:
        """Return the documents asked about, whose evidence lies within them."""
        from eval.compare import check_evidence, find_documents

        documents = find_documents(examples, self._library.store.find)
        check_evidence(examples, documents, self._library.store)
        return documents

    def _write_report(self, folder: Path) -> None:
        from eval.analysis import analyse
        from eval.compare import load_comparison
        from eval.report import write_report
        from rag.routing.utility import load_weights

        examples, journal = load_comparison(folder)
        if journal.rows:
            weights = load_weights(self._fathom.settings.router_weights)
            write_report(analyse(examples, journal, weights), examples, journal, folder)

    # ---- past ones ------------------------------------------------------------------------------

    def all(self) -> list[Comparison]:
        """Return the comparisons, the newest first."""
        folders = [path for path in self._folder.glob("*") if _NAME.fullmatch(path.name)]
        found = [self._listed(path) for path in folders if _is_comparison(path)]
        return sorted(found, key=lambda one: (one.state == "running", one.started), reverse=True)

    def running(self) -> Comparison | None:
        """Return the one that runs."""
        for name, job in self._jobs.items():
            if job.is_running:
                return self._listed(self._folder / name)
        return None

    def report(self, name: str) -> str:
        """Return a comparison's report as HTML, its pictures at `/comparisons/NAME/PICTURE`.

        Raises:
            DocumentNotFoundError: if there is none.
        """
        from eval.report import read_report

        return read_report(self._path(name), f"/comparisons/{name}/")

    def failures(self, name: str) -> str:
        """Return the page of failures that a report has, as HTML; empty if it has none.

        Raises:
            DocumentNotFoundError: if there is no such comparison.
        """
        from eval.report import read_failures

        return read_failures(self._path(name))

    def title(self, name: str) -> str:
        """Return what the comparison is called."""
        return self._listed(self._path(name)).title

    def numbers(self, name: str) -> str:
        """Return a report's numbers as JSON.

        Raises:
            DocumentNotFoundError: if there is none.
        """
        return self._file(name, "report.json").read_text(encoding="utf-8")

    def picture(self, name: str, file: str) -> bytes:
        """Return a picture of a report as PNG.

        Raises:
            DocumentNotFoundError: if there is none.
        """
        if not _PICTURE.fullmatch(file):
            raise _nothing(f"{name}/{file}")
        return self._file(name, file).read_bytes()

    def delete(self, name: str) -> None:
        """Delete a comparison with its questions, answers and report; one that runs is ended.

        Raises:
            DocumentNotFoundError: if there is none.
        """
        path = self._path(name)
        if job := self._jobs.pop(name, None):
            job.end()
        shutil.rmtree(path)

    def delete_all(self) -> None:
        """Delete every comparison of the owner."""
        for job in self._jobs.values():
            job.end()
        self._jobs.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget_deleted(self, contents: set[str]) -> None:
        """Delete the comparisons that asked about a document of which the owner has none left.

        Args:
            contents: SHA-256 of documents that were deleted.
        """
        paths = [path for path in self._folder.glob("*") if path.is_dir()]
        about = {path.name: _asked_about(path) & contents for path in paths}
        if not any(about.values()):
            return
        there = {d.content_sha256 for d in self._library.store.all(include_superseded=True)}
        for name, gone in about.items():
            if gone - there:
                self.delete(name)

    def _listed(self, path: Path) -> Comparison:
        about, job = _About.read(path), self._jobs.get(path.name)
        num_examples = _num_lines(path / "examples.jsonl")
        num_rows = sum(_num_lines(rows, but=b'{"run"') for rows in path.glob("rows*.jsonl"))
        of_rows = num_examples * len(about.arms) if about else None
        changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        found = Comparison(
            name=path.name,
            title=about.title if about else path.name,
            started=about.started if about else f"{changed:%Y-%m-%dT%H:%M:%SZ}",
            arms=about.arms if about else (),
            state="done" if of_rows is None or num_rows >= of_rows else "stopped",
            num_rows=num_rows,
            of_rows=of_rows,
            has_report=(path / "report.html").is_file(),
        )
        if job is None:
            return found
        if not job.is_running:
            return replace(found, problem=job.problem)
        return replace(
            found,
            state="running",
            num_rows=max(job.num_done, num_rows),
            arm=job.arm,
            waiting=job.waiting,
            seconds_left=job.seconds_left(),
            is_stopping=job.stop.is_set(),
        )

    def _path(self, name: str) -> Path:
        path = self._folder / name
        if not _NAME.fullmatch(name) or not path.is_dir():
            raise _nothing(name)
        return path

    def _file(self, name: str, file: str) -> Path:
        path = self._path(name) / file
        if not path.is_file():
            raise _nothing(f"{name}/{file}")
        return path


@dataclass(frozen=True, slots=True)
class _About:
    """What a comparison that was begun in the page is of."""

    title: str
    arms: tuple[str, ...]
    started: str

    @classmethod
    def read(cls, folder: Path) -> _About | None:
        """Return what a folder says; None where `fathom compare` made it."""
        try:
            value = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            return cls(str(value["title"]), tuple(value["arms"]), str(value["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def forget_deleted(fathom: Fathom, documents: Sequence[Document]) -> None:
    """Delete every owner's comparisons that asked about documents which are gone for him."""
    contents = {document.content_sha256 for document in documents}
    for folder in (fathom.settings.home / "comparisons").glob("*"):
        owner = "" if folder.name == NAMELESS else folder.name
        fathom.for_owner(owner).comparisons.forget_deleted(contents)


def _is_comparison(path: Path) -> bool:
    """Whether a folder holds questions to go on with, or a report to open."""
    return any((path / name).is_file() for name in ("examples.jsonl", "report.html"))


def _asked_about(path: Path) -> set[str]:
    """Return the SHA-256 of the documents that a comparison asked about."""
    found: set[str] = set()
    for rows in path.glob("rows*.jsonl"):
        with rows.open("rb") as file:
            for line in file:
                if line.startswith(b'{"run"'):
                    documents: Mapping[str, str] = json.loads(line)["run"]["documents"]
                    found.update(documents.values())
    return found


def _num_lines(path: Path, *, but: bytes = b"") -> int:
    """Return how many whole lines a file has, those that begin with `but` not counted."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    return sum(not (but and line.startswith(but)) for line in lines)


def _nothing(name: str) -> DocumentNotFoundError:
    return DocumentNotFoundError(
        f"there is no comparison {name} of yours", hint="the page lists those there are"
    )


@dataclass(slots=True)
class _Job:
    """A run: its thread, and how far it has come."""

    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    arm: str = ""
    num_done: int = 0
    waiting: int = 0
    problem: str = ""
    _left: dict[str, int] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _answered: dict[str, int] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        """Whether its thread still works."""
        return self.thread is not None and self.thread.is_alive()

    def expect(self, arms: Sequence[str], num_examples: int, done: Sequence[str]) -> None:
        """Learn how many answers of each arm are to come, those that are there left out."""
        self._left = {arm: num_examples - done.count(arm) for arm in arms}
        self.num_done = len(done)
        self._since = time.monotonic()

    def tell(self, arm: str, done: int, total: int) -> None:
        """Learn that so many answers of all are there; see `compare`."""
        now, new = time.monotonic(), done - self.num_done
        if new > 0 and arm == self.arm:
            self._seconds[arm] = self._seconds.get(arm, 0.0) + now - self._since
            self._answered[arm] = self._answered.get(arm, 0) + new
            self._left[arm] = max(0, self._left.get(arm, 0) - new)
        if new > 0 or arm != self.arm:
            self._since = now
        self.arm, self.num_done = arm, max(done, self.num_done)

    def seconds_left(self) -> float | None:
        """Return about how long the rest takes: each arm as fast as it was, the others as slow."""
        each = {arm: self._seconds[arm] / n for arm, n in self._answered.items() if n}
        if not each:
            return None
        slowest = max(each.values())
        return sum(left * each.get(arm, slowest) for arm, left in self._left.items())

    def end(self) -> None:
        """Stop it, and wait until it has.

        Raises:
            ModelError: if it does not stop in time.
        """
        self.stop.set()
        if self.thread is not None:
            self.thread.join(_SECONDS_TO_STOP)
            if self.thread.is_alive():
                raise ModelError(
                    "the comparison does not stop", hint="try again when the model is less busy"
                )
