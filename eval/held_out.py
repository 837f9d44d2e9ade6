"""How often held-out questions were looked at: every comparison on a `test` split is written down.

Who looks at them often enough tunes on them, knowingly or not. The log is the person's, whatever
the library: JSON Lines in the data folder, one line a comparison that was begun.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

LOG = "held_out.jsonl"
# The split that nothing may be tuned on.
HELD_OUT = "test"


@dataclass(frozen=True, slots=True)
class Look:
    """One comparison on held-out questions: of which set, when (ISO 8601, UTC), by which command.

    `examples_sha256` is the checksum of the questions' file.
    """

    data: str
    examples_sha256: str
    started: str
    command: str


def looks_at(home: Path, examples_sha256: str) -> list[Look]:
    """Return the looks at a set so far, oldest first; a line that is none is passed over."""
    try:
        lines = (home / LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    looks = []
    for line in lines:
        try:
            looks.append(Look(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # cut short as the process was killed
    return [look for look in looks if look.examples_sha256 == examples_sha256]


def write_down(home: Path, look: Look) -> None:
    """Add a look to the log; it is on the disk when this returns."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOG).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(asdict(look), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def in_words(looks: list[Look]) -> str:
    """Return what a person should know before the results: which look at a set this is.

    Args:
        looks: all of them, this one last.
    """
    *before, now = looks
    if not before:
        return f"{now.data}: looked at for the first time here"
    days = ", ".join(dict.fromkeys(look.started[:10] for look in before))
    return (
        f"{now.data}: look {len(looks):,} at these held-out questions here (before: {days});"
        " what is tuned after a look is no longer measured by them"
    )
