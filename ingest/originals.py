"""Who is copying originals now: a file that no document has yet is no stray meanwhile."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from rag.settings import Settings


@contextmanager
def ingesting(settings: Settings) -> Iterator[None]:
    """Tell other processes that files may be on their way into the library; any number may."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "ingest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def is_ingesting(settings: Settings) -> bool:
    """Return whether a process is inside `ingesting`; a killed one is not."""
    try:
        with (settings.home / "ingest.lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
