"""Counts and lists that the text itself proves, without a model: the number, and every item quoted.

A question is taken only if it is simple (what is counted, and at most one literal filter) and if
one structure of the document is clearly what it speaks of. What was counted is said in the answer.
For anything else there is no count here, and the question goes its usual way.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rag.answering.citations import without_markers
from rag.answering.context import page_at, section_at
from rag.answering.structures.finder import find_structures
from rag.answering.structures.item import Item, Structure, singulars, words_of
from rag.answering.structures.tables import fields_within
from rag.store.documents import DocumentStore
from rag.types import Citation, Document

# More would make the receipt a second copy of the document; the answer says how many are quoted.
MOST_CITATIONS = 1_000
_SHOWN_CHARS = 160
_CONTEXT_CHARS = 60

_DOCUMENT_NOUNS = frozenset(
    "file document text book novel manual treaty contract agreement report paper policy handbook"
    " guide act law statute constitution charter convention regulation directive list table"
    " spreadsheet workbook sheet log chat conversation transcript meeting dataset data database csv"
    " json jsonl page deck presentation module program script code source mailbox inbox archive"
    " library collection story play thesis notebook pdf tsv thread channel".split()
)
_SCOPE_WORDS = frozenset(
    "this that the these those my our its it there whole entire given here".split()
)
_EMPTY_ADJECTIVES = frozenset(
    "total individual numbered separate the all every each of different main top level".split()
)
_VERBS = r"(?:have|has|contain|contains|include|includes|hold|holds|list|lists|comprise|got)"
_BE = r"(?:are|is|were|was)"

_NOUN = r"(?P<noun>[^\W\d_][\w'’-]*(?: [^\W\d_][\w'’-]*){0,2}?)"
_VALUE = r"[\"“'‘]?(?P<value>[^\"”?]+?)[\"”'’]?"
_FILTERS = (
    rf" (?:that |which )?(?:mention|mentions|mentioning|contain|contains|containing) "
    rf"(?:the (?:word|name|term|phrase) )?{_VALUE.replace('value', 'mention')}",
    rf" (?:did|does|has|have) {_VALUE.replace('value', 'speaker')}"
    r" (?:send|sent|write|written|post|posted|say|said|make|made)",
    rf" (?:by|from|sent by|written by) {_VALUE.replace('value', 'author')}",
    r" (?:(?:that |which )?(?:have|has)|with|whose|where)(?: the| an?)?"
    rf" (?P<field>[\w -]+?)(?: is| are|:| =| ==| of| equal to| set to)? {_VALUE}",
)
_SCOPE = (
    rf"(?: (?:{_BE} )?(?:there|listed|given|recorded|included|contained|present))?"
    r"(?: (?:are )?(?:in|of|on|within|across) (?P<scope>[^?]+?))?(?: in total| in all)?"
)
_COUNT_FORMS = tuple(
    re.compile(rf"^(?:please )?{form}[?.! ]*$", re.I)
    for form in (
        rf"(?:how many|count(?: how many)?(?: all| every| each)?(?: the)?) {_NOUN}"
        rf"(?: (?:do|does|did) (?P<holder>[^?]+?) {_VERBS})",
        *(
            rf"(?:how many|count(?: how many)?(?: all| every| each)?(?: of)?(?: the)?|"
            rf"what is the (?:total )?number of|(?:give me |tell me )?the number of) {_NOUN}"
            rf"(?: {_BE}| {_BE} there)?{condition}{_SCOPE}"
            for condition in (*_FILTERS, "")
        ),
    )
)
_LIST_FORMS = tuple(
    re.compile(rf"^(?:please )?{form}[?.! ]*$", re.I)
    for form in (
        rf"(?:list|enumerate|name|give me|show(?: me)?|what are)(?: all| every| each)?(?: of)?"
        rf"(?: the)? {_NOUN}{condition}{_SCOPE}"
        for condition in (*_FILTERS, "")
    )
)
_MENTIONS = tuple(
    re.compile(rf"^{form}[?.! ]*$", re.I)
    for form in (
        rf"how (?:often|many times) (?:is|are|was|were|does|do) "
        rf"(?:the (?:exact )?(?:word|term|name|phrase|string)s? )?{_VALUE} "
        rf"(?:mentioned|named|occur|occurs|appear|appears|used|repeated|stand)"
        r"(?: in (?P<scope>[^?]+?))?",
        rf"how many (?:mentions|occurrences) of "
        rf"(?:the (?:exact )?(?:word|term|name|phrase|string)s? )?{_VALUE} {_BE} there"
        r"(?: in (?P<scope>[^?]+?))?",
    )
)


@dataclass(frozen=True, slots=True)
class CountQuestion:
    """What is to be counted: a noun with at most one filter, or the mentions of some words.

    `holder` and `scope` say where, in the question's words. `wants_list` asks for the items.
    """

    noun: str
    wants_list: bool = False
    scope: str = ""
    mention: str = ""
    speaker: str = ""
    field: str = ""
    value: str = ""

    @property
    def is_filtered(self) -> bool:
        """Whether some of the items may be left out."""
        return bool(self.mention or self.speaker or self.value)


@dataclass(frozen=True, slots=True)
class Counted:
    """A count with its proof: the answer in words, one citation an item, the reason in short."""

    answer: str
    citations: tuple[Citation, ...]
    num_items: int
    reason: str


def count_from_text(
    question: str, documents: Sequence[Document], store: DocumentStore
) -> Counted | None:
    """Return the count that a question asks for, None where the text does not prove one.

    Args:
        question: in words.
        documents: those asked about; each must have the structure, the numbers add up.
        store: where texts, pages and headings lie.
    """
    asked = count_question(question)
    if asked is None:
        return None
    counts = []
    for document in documents:
        if not _is_about(asked.scope, document):
            return None
        count = _count_in(asked, document, store)
        if count is None:
            return None
        counts.append(count)
    return _answer(asked, counts, store) if counts else None


def count_question(question: str) -> CountQuestion | None:
    """Return what a question wants counted or listed, None if it is not simply that."""
    question = " ".join(question.split())
    for form in _MENTIONS:
        if (match := form.match(question)) and (said := match["value"].strip(" \"“”'‘’")):
            return CountQuestion("mention", scope=match["scope"] or "", mention=said)
    for forms, wants_list in ((_COUNT_FORMS, False), (_LIST_FORMS, True)):
        for form in forms:
            if match := form.match(question):
                parts = {name: (part or "").strip() for name, part in match.groupdict().items()}
                return CountQuestion(
                    noun=parts["noun"],
                    wants_list=wants_list,
                    scope=parts.get("holder") or parts.get("scope", ""),
                    mention=parts.get("mention", ""),
                    speaker=parts.get("speaker") or parts.get("author", ""),
                    field=parts.get("field", "").lower(),
                    value=parts.get("value", ""),
                )
    return None


@dataclass(frozen=True, slots=True)
class _Count:
    document: Document
    text: str
    items: tuple[Item, ...]
    described: str


def _count_in(asked: CountQuestion, document: Document, store: DocumentStore) -> _Count | None:
    text = store.text(document.id)
    if asked.noun == "mention":
        items = tuple(_mentions(asked.mention, text))
        words = f"places where “{asked.mention}” stands as whole words, in capitals or not"
        return _Count(document, text, items, words)
    structures = find_structures(
        text,
        document.media_type,
        document.title,
        pages=store.pages(document.id),
        sections=store.sections(document.id),
    )
    chosen = _meant(asked.noun, structures)
    if chosen is None:
        return None
    structure, adjectives = chosen
    found = _filtered(asked, adjectives, structure, text)
    if found is None:
        return None
    items, condition = found
    described = structure.description
    if condition:
        described = f"of {len(structure.items):,} {structure.description}, {condition}"
    if structure.notes:
        described += "; " + "; ".join(structure.notes)
    return _Count(document, text, items, described)


def _meant(noun: str, structures: list[Structure]) -> tuple[Structure, list[str]] | None:
    """Return the one structure that a noun means, and the words before it that limit it."""
    words = noun.lower().split()
    for first in range(len(words)):
        called = singulars(" ".join(words[first:]))
        fitting = [structure for structure in structures if called & structure.names]
        if not fitting:
            continue
        best = min(structure.rank for structure in fitting)
        fitting = [structure for structure in fitting if structure.rank == best]
        if len({tuple(item.start for item in s.items) for s in fitting}) > 1:
            return None
        return fitting[0], [word for word in words[:first] if word not in _EMPTY_ADJECTIVES]
    return None


def _filtered(
    asked: CountQuestion, adjectives: list[str], structure: Structure, text: str
) -> tuple[tuple[Item, ...], str] | None:
    """Return the items that pass the question's filter, and the filter in words.

    None if the filter is not one that can be read off the text.
    """
    if adjectives:
        if len(adjectives) > 1 or asked.is_filtered:
            return None
        return _by_value(adjectives[0], structure, text)
    if asked.mention:
        pattern = _whole_words(asked.mention)
        items = [item for item in structure.items if pattern.search(text, item.start, item.until)]
        return tuple(items), f"those that mention “{asked.mention}”"
    if asked.speaker:
        return _by_speaker(asked.speaker, structure)
    if asked.value:
        return _by_field(asked.field, asked.value, structure, text)
    return structure.items, ""


def _by_value(value: str, structure: Structure, text: str) -> tuple[tuple[Item, ...], str] | None:
    """Filter by a word that stands in exactly one column: `open tickets`."""
    columns = {
        name
        for item in structure.items
        for name, cell in _fields(item, text).items()
        if cell.casefold() == value.casefold()
    }
    return _by_field(columns.pop(), value, structure, text) if len(columns) == 1 else None


def _by_field(
    field: str, value: str, structure: Structure, text: str
) -> tuple[tuple[Item, ...], str] | None:
    fields = [_fields(item, text) for item in structure.items]
    if not any(field in known for known in fields):
        return None
    items = [
        item
        for item, known in zip(structure.items, fields, strict=True)
        if known.get(field, "").casefold() == value.casefold()
    ]
    return tuple(items), f"those whose “{field}” is “{value}”"


def _by_speaker(speaker: str, structure: Structure) -> tuple[tuple[Item, ...], str] | None:
    """Filter by who speaks; a first name will do if only one speaker has it."""
    speakers = {item.fields.get("speaker", "") for item in structure.items} - {""}
    wanted = speaker.casefold()
    same = {s for s in speakers if s.casefold() == wanted}
    same = same or {s for s in speakers if wanted in s.casefold().split()}
    if len(same) != 1:
        return None
    (name,) = same
    items = [item for item in structure.items if item.fields.get("speaker") == name]
    return tuple(items), f"those of {name}"


def _fields(item: Item, text: str) -> dict[str, str]:
    return {**fields_within(text, item), **item.fields}


def _mentions(said: str, text: str) -> Iterator[Item]:
    """Yield each place where the words stand, quoted with some of its line."""
    for match in _whole_words(said).finditer(text):
        start = text.rfind("\n", max(0, match.start() - _CONTEXT_CHARS), match.start()) + 1
        if not start:  # the line begins further up: from a space on
            start = max(0, match.start() - _CONTEXT_CHARS)
            space = text.find(" ", start, match.start())
            start = match.start() if start and space < 0 else (space + 1 if start else 0)
        end = text.find("\n", match.end(), match.end() + _CONTEXT_CHARS)
        if end < 0:
            far = min(len(text), match.end() + _CONTEXT_CHARS)
            end = far if far == len(text) else max(text.rfind(" ", match.end(), far), match.end())
        yield Item(start, end, end)


def _whole_words(said: str) -> re.Pattern[str]:
    between = r"\s+".join(map(re.escape, said.split()))
    return re.compile(rf"(?<!\w){between}(?!\w)", re.I)


def _is_about(scope: str, document: Document) -> bool:
    """Say whether the place that a question names is the whole of this document."""
    words = [word for word in re.findall(r"\w+", scope.lower()) if word not in _SCOPE_WORDS]
    if not words:
        return True
    if any(word.isdecimal() for word in words):
        return set(words) <= set(re.findall(r"\w+", document.title.lower()))
    title = set(words_of(document.title.replace("_", " ").replace("-", " ").replace(".", " ")))
    known = [w for w in words if singulars(w) & _DOCUMENT_NOUNS or w in title]
    return len(known) == len(words) or (
        len(words) <= 3 and bool(singulars(words[-1]) & _DOCUMENT_NOUNS)
    )


def _answer(asked: CountQuestion, counts: list[_Count], store: DocumentStore) -> Counted:
    total = sum(len(count.items) for count in counts)
    noun = asked.noun if asked.noun != "mention" else "mentions"
    if total == 1 and asked.noun != "mention":
        noun = noun.removesuffix("s")
    citations: list[Citation] = []
    for count in counts:
        first = len(citations) + 1
        citations += cite_items(count.document, count.text, count.items, store, first=first)
    lines = [f"{total:,} {noun}."]
    for count in counts:
        where = f" in {count.document.title}" if len(counts) > 1 else ""
        lines.append(
            f"Counted from the text itself{where}: {len(count.items):,} {count.described}."
        )
    if total > MOST_CITATIONS:
        lines.append(f"The first {len(citations):,} are quoted.")
    elif len(citations) < total:
        lines.append(f"{len(citations):,} of them are quoted.")
    head = " ".join(lines)
    if asked.wants_list:
        shown = "\n".join(f"{without_markers(_shortened(c.quote))} [{c.marker}]" for c in citations)
        answer = f"{head}\n{shown}" if shown else head
    else:
        answer = head + _marker_range(len(citations))
    return Counted(answer, tuple(citations), total, f"{total:,} {noun}")


def _marker_range(num_citations: int) -> str:
    if num_citations == 0:
        return ""
    if num_citations <= 3:
        return " " + " ".join(f"[{n}]" for n in range(1, num_citations + 1))
    return f" [1] to [{num_citations}]"


def cite_items(
    document: Document, text: str, items: Sequence[Item], store: DocumentStore, *, first: int
) -> list[Citation]:
    """Return one citation an item, each compared with the stored text, which is read again.

    Args:
        document: that the items stand in.
        text: of it, from which they are quoted.
        items: in order; an empty one, such as a page without text, is not quoted.
        store: where text, pages and headings lie.
        first: the marker of the first; none goes beyond MOST_CITATIONS.
    """
    stored = store.text(document.id)
    pages, sections = store.pages(document.id), store.sections(document.id)
    quoted = [item for item in items if item.end > item.start]
    return [
        Citation(
            marker=marker,
            document=document.id,
            title=document.title,
            version=document.version,
            page=page_at(pages, item.start),
            section=section_at(sections, item.start),
            start=item.start,
            end=item.end,
            quote=text[item.start : item.end],
            verified=stored[item.start : item.end] == text[item.start : item.end],
        )
        for marker, item in enumerate(quoted[: max(0, MOST_CITATIONS - first + 1)], first)
    ]


def _shortened(quote: str) -> str:
    line = " ".join(quote.split())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 3] + "..."
