"""All structures of one document, by its media type."""

from collections.abc import Sequence
from dataclasses import replace

from rag.answering.structures import lists, tables
from rag.answering.structures.item import GENERIC_NAMES, Structure, fill
from rag.answering.structures.labelled import DIVISIONS, labelled_structures
from rag.types import Page, Section

_DELIMITED = frozenset({"text/csv", "text/tab-separated-values"})
_JSON = frozenset({"application/json", "application/jsonl"})


def find_structures(
    text: str,
    media_type: str,
    title: str,
    *,
    pages: Sequence[Page] = (),
    sections: Sequence[Section] = (),
) -> list[Structure]:
    """Return what repeats in a text, recognised from the text and its outline alone.

    Args:
        text: the canonical text.
        media_type: of the document.
        title: its file name, whose last word may say what a row is.
        pages: its pages.
        sections: its headings.
    """
    if media_type in _DELIMITED:
        return tables.delimited_rows(text, media_type, title)
    if media_type in _JSON and (found := tables.json_items(text, media_type, title)):
        return found
    conversation = lists.turns(text)
    if conversation:
        return conversation + lists.pages_and_slides(text, media_type, pages)
    found = [
        *_records(labelled_structures(text, sections), text),
        *tables.field_blocks(text, title),
        *tables.piped_tables(text, sections, title),
        *lists.lists(text, sections),
        *lists.mails(text),
        *lists.definitions(text, media_type, sections),
        *lists.headings(text, sections),
        *lists.pages_and_slides(text, media_type, pages),
        *lists.paragraphs(text, sections),
    ]
    return [structure for structure in found if structure.items]


def _records(found: list[Structure], text: str) -> list[Structure]:
    """Let the items that the file is made of also be called records; chapters are none."""
    large = [structure for structure in found if fill(structure.items, text)]
    if len(large) != 1 or large[0].names & (DIVISIONS - GENERIC_NAMES):
        return found
    (only,) = large
    return [*found, replace(only, names=GENERIC_NAMES - only.names, rank=2)]
