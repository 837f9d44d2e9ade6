"""A long document that every Python carries: its language reference."""

from pathlib import Path

SAMPLE_TITLE = "python-language-reference.txt"


def write_sample(folder: Path) -> Path:
    """Write the 79 topics of `pydoc_data` into one text file in `folder`; return its path.

    The topics carry underlined titles, so each becomes a section with its subsections.
    """
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SAMPLE_TITLE
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics))
    path.write_text(text + "\n", encoding="utf-8")
    return path
