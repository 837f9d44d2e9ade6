"""A text of any size that every Python carries: its language reference and its docstrings."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SHORTEST_CHARS = 100  # of a docstring
_FILE_CHARS = 25_000
# Asked of it: some of what both parts say, some of what neither does.
QUESTIONS = (
    "How does the with statement call the context manager's exit method?",
    "What is the precedence of the await expression?",
    "How does asyncio schedule callbacks?",
    "How are ZIP archives opened for writing?",
    "What happens when a generator is closed before it is exhausted?",
    "Which exceptions does int() raise?",
    "How is the method resolution order computed?",
    "What does a metaclass do?",
    "When is a finally clause executed?",
    "How long may a tenant stay after the notice?",
)


def python_texts(num_chars: int) -> list[str]:
    """Return texts of `num_chars` characters together: the language reference, then docstrings."""
    texts: list[str] = []
    left = num_chars
    for text in _texts():
        texts.append(text[:left])
        left -= len(texts[-1])
        if left == 0:
            return texts
    raise ValueError(f"this Python has {num_chars - left:,} characters of text, not {num_chars:,}")


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[name].strip("\n") for name in sorted(topics))
    held: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        held += _docstrings(path)
        if sum(map(len, held)) > _FILE_CHARS:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # the standard library holds files that are broken on purpose
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented))
    return [text for text in found if text and len(text) >= _SHORTEST_CHARS]
