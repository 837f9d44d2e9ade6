"""Tables of questions given to Compare: read, checked, and held until they are asked."""

import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from eval.examples import TABLES, EvalExample, load_examples
from rag.errors import ReadError

KINDS = (*TABLES, ".jsonl", ".json", ".gz")
_LARGEST_TABLE = 32 * 2**20  # bytes
_MOST_HELD = 4  # of each owner, the latest


@dataclass(frozen=True, slots=True)
class GivenTable:
    """A table that was read and has no fault."""

    title: str
    examples: tuple[EvalExample, ...]


class GivenTables:
    """The tables that were given last, by owner; they go with the server."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[str, GivenTable]] = {}
        self._lock = threading.Lock()

    def hold(self, owner: str, table: GivenTable) -> str:
        """Hold a table, in the place of the oldest where there are too many; return its name."""
        name = uuid.uuid4().hex
        with self._lock:
            held = self._held.setdefault(owner, OrderedDict())
            held[name] = table
            while len(held) > _MOST_HELD:
                held.popitem(last=False)
        return name

    def find(self, owner: str, name: str) -> GivenTable | None:
        """Return a table of an owner, None if it is not held any more."""
        with self._lock:
            held = self._held.get(owner)
            return held.get(name) if held else None


def read_questions(path: Path) -> GivenTable:
    """Return the questions of an uploaded table.

    Raises:
        ReadError: naming every faulty row.
    """
    if not path.name.lower().endswith(KINDS):
        raise ReadError(
            f"{path.name} is no table of questions",
            hint=f"expected one of {', '.join(KINDS)}",
        )
    if path.stat().st_size > _LARGEST_TABLE:
        raise ReadError(
            f"{path.name} has {path.stat().st_size / 2**20:,.0f} MiB",
            hint=f"at most {_LARGEST_TABLE / 2**20:,.0f} are taken; fathom compare takes more",
        )
    try:
        return GivenTable(path.name, tuple(load_examples(path, most_bytes=_LARGEST_TABLE)))
    except ReadError as error:  # where it lies meanwhile is nobody's business
        raise ReadError(error.message.replace(f"{path.parent}/", ""), hint=error.hint) from error
