"""HTML to canonical text: kreuzberg's Markdown, whose headings become sections."""

import re
from pathlib import Path

from kreuzberg import (  # type: ignore[attr-defined]  # its stubs lack OutputFormat
    ExtractionConfig,
    OutputFormat,
    extract_file_sync,
)

from ingest.readers.text import decode, markdown_headings
from rag.types import CanonicalText

# kreuzberg puts the page's metadata before its text; the title comes out as a heading
_FRONT_MATTER = re.compile(r"\A---\n(?:[\w-]+: [^\n]*\n|\n)*(?:---|## title: [^\n]*)\n+")


def read_html(path: Path) -> CanonicalText:
    """Read an HTML file; hidden elements are dropped, tables become Markdown tables."""
    result = extract_file_sync(
        str(path), "text/html", config=ExtractionConfig(output_format=OutputFormat.MARKDOWN)
    )
    text, _ = decode(_FRONT_MATTER.sub("", result.content).encode())
    return CanonicalText(text, "text/html", sections=markdown_headings(text))
