"""Numbered passages within a token budget, in document order: one type for every route."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rag.retrieval.retriever import Hit
from rag.store.documents import HEADING_SEPARATOR, DocumentStore, StoredChunk
from rag.types import ContextPassage, Document, Page, Passage, Section


@dataclass(frozen=True, slots=True)
class Context:
    """What goes into the prompt: passages numbered from 1, and their length.

    `num_tokens` counts the passages' text in the language model's tokens.
    """

    passages: tuple[ContextPassage, ...]
    num_tokens: int
    num_chunks: int


def retrieved_context(
    hits: Sequence[Hit],
    documents: Sequence[Document],
    *,
    store: DocumentStore,
    count_tokens: Callable[[str], int],
    token_budget: int,
) -> Context:
    """Take the best chunks that fit the budget, join neighbours, and put them in reading order.

    Documents keep the order in which they were given. A chunk that does not fit is passed over
    for a shorter one below it.
    """
    by_id = {document.id: document for document in documents}
    order = {document.id: position for position, document in enumerate(documents)}
    taken: list[Hit] = []
    used = 0
    for hit in hits:
        num_tokens = count_tokens(hit.chunk.chunk.text)
        if used + num_tokens <= token_budget:
            taken.append(hit)
            used += num_tokens
    taken.sort(key=lambda h: (order[h.chunk.document_id], h.chunk.chunk.ordinal))
    groups: list[list[Hit]] = []
    for hit in taken:
        last = groups[-1][-1].chunk if groups else None
        if (
            last
            and last.document_id == hit.chunk.document_id
            and last.chunk.ordinal + 1 == hit.chunk.chunk.ordinal
            and last.chunk.heading_path == hit.chunk.chunk.heading_path
        ):
            groups[-1].append(hit)
        else:
            groups.append([hit])
    passages = [_joined(group, by_id, store) for group in groups]
    return _numbered(passages, count_tokens, num_chunks=len(taken))


def nearest_passages(
    hits: Sequence[Hit], documents: Sequence[Document], *, store: DocumentStore
) -> Iterator[Passage]:
    """Yield each hit with the chunk before and the chunk after it, best first.

    What is small enough to be found is often too small to be read. No chunk stands in two
    passages, and a hit that an earlier passage already shows yields none.
    """
    by_id = {document.id: document for document in documents}
    unread: dict[int, dict[int, StoredChunk]] = {}
    for hit in hits:
        document_id, middle = hit.chunk.document_id, hit.chunk.chunk.ordinal
        if document_id not in unread:
            unread[document_id] = {c.chunk.ordinal: c for c in store.chunks_of(document_id)}
        left = unread[document_id]
        if middle in left:
            around = [n for n in (middle - 1, middle, middle + 1) if n in left]
            group = [replace(hit, chunk=left.pop(n)) for n in around]
            yield _joined(group, by_id, store)


def full_context(
    documents: Sequence[Document],
    *,
    store: DocumentStore,
    count_tokens: Callable[[str], int],
) -> Context:
    """Return the whole of every document, one passage each.

    The passage is the canonical text, not its chunks: nothing is left out or repeated.
    """
    passages = []
    for document in documents:
        text = store.text(document.id)
        passages.append(Passage(document, 0, len(text), text, None, None))
    return _numbered(passages, count_tokens, num_chunks=sum(d.num_chunks for d in documents))


def page_at(pages: Sequence[Page], offset: int) -> int | None:
    """Return the number of the page that holds a character, None without pages."""
    at = bisect_right(pages, offset, key=lambda page: page.start) - 1
    return pages[max(at, 0)].number if pages else None


def section_at(sections: Sequence[Section], offset: int) -> str | None:
    """Return the innermost heading above a character, None without headings."""
    at = bisect_right(sections, offset, key=lambda section: section.start) - 1
    return sections[at].title if at >= 0 else None


def _joined(group: list[Hit], by_id: dict[int, Document], store: DocumentStore) -> Passage:
    first, last = group[0].chunk, group[-1].chunk
    start, end = first.chunk.start, last.chunk.end
    return Passage(
        document=by_id[first.document_id],
        start=start,
        end=end,
        text=first.chunk.text if len(group) == 1 else store.text(first.document_id, start, end),
        page=first.chunk.page_first,
        section=HEADING_SEPARATOR.join(first.chunk.heading_path) or None,
        score=max(hit.score for hit in group),
        chunk_ordinals=tuple(hit.chunk.chunk.ordinal for hit in group),
    )


def _numbered(
    passages: list[Passage], count_tokens: Callable[[str], int], *, num_chunks: int
) -> Context:
    numbered = tuple(ContextPassage(n, p) for n, p in enumerate(passages, start=1))
    return Context(numbered, sum(count_tokens(p.text) for p in passages), num_chunks)
