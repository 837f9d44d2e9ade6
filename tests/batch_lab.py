"""A process of its own that forks batches and lets each die where an answer is being written down.

Started by test_batch.py with a folder that holds `questions.jsonl` and `handbook.md`; prints one
JSON object for each place of death. The only failpoint is a wrapped os.write or os.fsync.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rag.runtime import prepare_process

prepare_process()

from conftest import make_tiny_engine  # noqa: E402
from eval.batch_journal import Journal, journal_path  # noqa: E402
from hash_embedder import HashEmbedder  # noqa: E402
from rag.settings import Settings  # noqa: E402
from ui import cli  # noqa: E402
from ui.assembly import Fathom  # noqa: E402
from ui.verbs import batch  # noqa: E402

DIES_AT_ANSWER = 3


def main(folder: Path) -> None:
    """Run the batch once to its death and once to its end, for each place."""
    engine = make_tiny_engine()

    def open_fathom(settings: Settings) -> Fathom:
        return Fathom(settings, embedder=HashEmbedder(), engine=engine)

    setattr(batch, "open_fathom", open_fathom)  # noqa: B010
    for place, die in DEATHS.items():
        os.environ["FATHOM_HOME"] = str(folder / place)
        output = folder / f"{place}.jsonl"
        in_a_child(lambda: open_fathom(Settings()).ingest(folder / "handbook.md"))
        status = in_a_child(partial(die_in, die, folder, output))
        with Journal(journal_path(output)) as journal:
            before = len(journal)
        again = in_a_child(partial(run, folder, output))
        receipts = open_fathom(Settings()).receipts.since("")
        told = {
            "place": place,
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "written_down": before,
            "again": os.waitstatus_to_exitcode(again),
            "asked": sorted(question for _, question, _ in receipts),
            "receipts": sorted(receipt_id for receipt_id, _, _ in receipts),
        }
        sys.stdout.write(json.dumps(told) + "\n")


def run(folder: Path, output: Path) -> None:
    sys.argv = ["fathom", "batch", str(folder / "questions.jsonl"), "-o", str(output), "--json"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    cli.main()


def die_in(die: Callable[[], None], folder: Path, output: Path) -> None:
    die()
    run(folder, output)


def before_the_line() -> None:
    """Die when the receipt is committed and nothing is in the journal yet."""
    write, seen = os.write, 0

    def wrapped(descriptor: int, data: bytes) -> int:
        nonlocal seen
        seen += data.startswith(b'{"id"')
        if seen == DIES_AT_ANSWER:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = wrapped  # type: ignore[assignment]


def within_the_line() -> None:
    """Die when half the line is written."""
    write, seen = os.write, 0

    def wrapped(descriptor: int, data: bytes) -> int:
        nonlocal seen
        seen += data.startswith(b'{"id"')
        if seen == DIES_AT_ANSWER:
            write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = wrapped  # type: ignore[assignment]


def after_the_line() -> None:
    """Die when the line is written, before it is synced and the row is shown."""
    seen = 0

    def wrapped(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen == DIES_AT_ANSWER + 3:  # after the header's, its folder's and the beginning's
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = wrapped  # type: ignore[assignment]


DEATHS = {
    "before": before_the_line, "within": within_the_line, "after": after_the_line,
}  # fmt: skip


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process and return its status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
