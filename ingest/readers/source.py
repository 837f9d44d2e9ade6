"""Source files: the text as it is; top-level definitions are sections."""

import ast
import re
from pathlib import Path

from ingest.readers.text import decode
from rag.types import CanonicalText, Section

_JAVA_LIKE = (
    r"(?:(?:public|private|protected|internal|static|final|abstract|sealed|data|open|partial)\s+)*"
    r"(?:class|interface|enum|record|object|struct|trait|fun|protocol|extension)\s+(?P<name>\w+)"
)
_C_LIKE = (
    r"(?:typedef\s+)?(?:class|struct|enum|union|namespace)\s+(?P<name>\w+)(?!.*;)"
    r"|(?!(?:if|for|while|switch|else|return|using|typedef|extern)\b)[A-Za-z_][\w:<>,*& \t]{0,120}"
    r"[\s*&](?P<function>[A-Za-z_~][\w:~]{0,80})\s?\([^;]{0,200}$"
)
_SCRIPT = (
    r"(?:export\s+)?(?:default\s+)?(?:declare\s+)?(?:abstract\s+)?(?:async\s+)?"
    r"(?:function\*?|class|interface|enum|namespace|type)\s+(?P<name>[\w$]+)"
)
# What starts a definition at the beginning of a line. A language without a cheap, safe sign of one
# has no entry and no sections.
_DEFINITIONS = {
    "javascript": _SCRIPT,
    "typescript": _SCRIPT,
    "c": _C_LIKE,
    "c++": _C_LIKE,
    "csharp": _JAVA_LIKE,
    "java": _JAVA_LIKE,
    "kotlin": _JAVA_LIKE,
    "scala": _JAVA_LIKE.replace("fun|", "def|"),
    "swift": _JAVA_LIKE.replace("fun|", "func|"),
    "go": r"(?:func\s+(?:\([^)\n]*\)\s*)?|type\s+)(?P<name>\w+)",
    "rust": r"(?:pub(?:\([^)\n]*\))?\s+)?(?:(?:async|unsafe|const|default)\s+)*"
    r"(?:fn|struct|enum|trait|mod|union|impl(?:<[^>\n]*>)?|macro_rules!)\s+(?P<name>\w+)",
    "ruby": r"(?:class|module|def)\s+(?P<name>[\w:.?!]+)",
    "php": r"(?:abstract\s+|final\s+)*(?:class|interface|trait|enum|function)\s+(?P<name>\w+)",
    "perl": r"(?:sub|package)\s+(?P<name>[\w:]+)",
    "lua": r"(?:local\s+)?function\s+(?P<name>[\w.:]+)",
    "r": r"(?P<name>[\w.]+)\s*(?:<-|=)\s*function\b",
    "julia": r"(?:function|struct|mutable struct|module|macro)\s+(?P<name>[\w.!]+)",
    "shell": r"(?:function\s+)?(?P<name>[\w-]+)\s*\(\)",
    "sql": r"(?i:create\s+(?:or\s+replace\s+)?(?:\w+\s+)?(?:table|view|function|procedure|index)"
    r"\s+(?:if\s+not\s+exists\s+)?)(?P<name>[\w.\"`]+)",
}


def read_source(path: Path, media_type: str) -> CanonicalText:
    """Read a source file; Python's classes and functions come from its own parser."""
    text, warnings = decode(path.read_bytes())
    language = media_type.removeprefix("text/x-")
    sections = _python(text) if language == "python" else _by_pattern(text, language)
    return CanonicalText(text, media_type, (), sections, warnings)


def _python(text: str) -> tuple[Section, ...]:
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()  # Python 2, a template, or broken: its text can still be read
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    sections: list[Section] = []
    for node in module.body:
        _add_definitions(node, 1, line_starts, sections)
    return tuple(sections)


def _add_definitions(
    node: ast.stmt, level: int, line_starts: list[int], sections: list[Section]
) -> None:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    sections.append(Section(level, node.name, line_starts[line - 1]))
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            _add_definitions(child, level + 1, line_starts, sections)


def _by_pattern(text: str, language: str) -> tuple[Section, ...]:
    pattern = _DEFINITIONS.get(language)
    if pattern is None:
        return ()
    found = re.finditer(rf"^(?:{pattern})", text, re.M)
    return tuple(
        Section(1, match["name"] or match.groupdict().get("function") or "", match.start())
        for match in found
    )
