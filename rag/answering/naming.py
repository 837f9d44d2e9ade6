"""A question that names its document in words is asked of that one: "In the handbook, who ...?".

Only what cannot well be meant otherwise narrows what is asked: a file's name; any name after
"according to"; a word for a kind of document ("the contract of 2019") after "in", "from", "does"
and the like. It has to fit one document of those asked about. Where it fits several, or the
question says "not" or "other than", all are asked, and the receipt says so.

Rules on English wording, as those of the question classes. Source: docs/decisions/0031.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from rag.types import Document

# Documents named in the receipt; of more, their number is told.
_LISTED = 3
_LONGEST_NAME_WORDS = 8

_WORD = re.compile(r"[^\W_]+(?:['’]s\b)?")
_EMPTY = frozenset("a an and by for from in of on our my the this that to your".split())
_KINDS = frozenset(
    "act agenda agreement annex appendix article bill book brochure catalogue charter contract"
    " deed directive document essay file filing guide guideline guidelines handbook invoice lease"
    " letter manual memo memorandum minutes notice novel offer pamphlet paper plan policy proposal"
    " prospectus protocol report rules specification standard statement statute study summary"
    " syllabus terms thesis transcript treaty will".split()
)
# Where the name of a document may follow: any name, or one that says what kind it is.
_SOURCE = re.compile(r"\b(?:according to|as per|as stated in|based on)\s+", re.I)
_PLACE = re.compile(
    r"\b(?:in|inside|within|from|of|under|per|by|on|into|at|does|do|did|is|are|about)\s+"
    r"(?:the|our|my|your|this|that)\s+",
    re.I,
)
_OTHERWISE = re.compile(
    r"\b(?:not|n't|except|excluding|besides|outside|unlike|beyond|without|other than|apart from"
    r"|rather than|instead of)\b",
    re.I,
)
_MORE = frozenset("between by dated for from of on with".split())
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")


@dataclass(frozen=True, slots=True)
class Named:
    """Which documents are asked, in their order, and what a receipt says of it.

    `words` is empty where the question names none.
    """

    documents: tuple[Document, ...]
    words: str = ""


def named_documents(question: str, documents: Sequence[Document]) -> Named:
    """Return the documents that a question names, all of them where it names none for sure.

    Args:
        question: in words.
        documents: those asked about.
    """
    everything = Named(tuple(documents))
    if len(documents) < 2:
        return everything
    found = [*_by_file_name(question, documents), *_by_words(question, documents)]
    if not found:
        return everything
    unsure = [(words, fitting) for words, fitting in found if len(fitting) > 1]
    if unsure:
        words, fitting = unsure[0]
        titles = _titles(fitting, "or")
        return Named(
            everything.documents,
            f"“{words}” may mean {titles}: all {len(documents):,} documents were asked",
        )
    if _OTHERWISE.search(question):
        return Named(
            everything.documents,
            f"“{found[0][0]}” may be named as what is not meant: all {len(documents):,} documents"
            " were asked",
        )
    named = {fitting[0].id for _, fitting in found}
    kept = tuple(document for document in documents if document.id in named)
    left_out = [document for document in documents if document.id not in named]
    if not left_out:
        return everything
    words = " and ".join(f"“{words}”" for words in dict.fromkeys(words for words, _ in found))
    return Named(
        kept,
        f"the question names {words}: {_titles(kept, 'and')} asked alone,"
        f" {_titles(left_out, 'and')} left out",
    )


def _by_file_name(
    question: str, documents: Sequence[Document]
) -> Iterator[tuple[str, list[Document]]]:
    """Yield each file name that stands in the question, and the documents of that name."""
    by_name: dict[str, list[Document]] = {}
    for document in documents:
        for name in _file_names(document):
            by_name.setdefault(name.lower(), []).append(document)
    left = question.lower()
    for name in sorted(by_name, key=len, reverse=True):
        standing = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        if match := standing.search(left):
            yield question[match.start() : match.end()], by_name[name]
            left = standing.sub(lambda found: " " * len(found.group()), left)


def _file_names(document: Document) -> set[str]:
    """Return the names that can only be a file's: with a suffix, or joined by a sign."""
    names = set()
    for name in {document.title, _last_part(document.source)}:
        if _SUFFIX.search(name):
            names.add(name)
        stem = _SUFFIX.sub("", name)
        if re.search(r"\w[_-]\w", stem) and re.search(r"_|\d", stem) and " " not in stem:
            names.add(stem)
    return names


def _by_words(question: str, documents: Sequence[Document]) -> Iterator[tuple[str, list[Document]]]:
    """Yield each name in words that fits a document, and all that it fits equally well."""
    own = {document.id: [_words(name) for name in _names(document)] for document in documents}
    places = [(match.end(), False) for match in _PLACE.finditer(question)]
    places += [(match.end(), True) for match in _SOURCE.finditer(question)]
    for place, is_source in sorted(places):
        phrase, said = list(_following(question, place)), list[str]()
        best: tuple[int, list[Document]] | None = None
        for number, match in enumerate(phrase):
            word = match.group().lower().removesuffix("'s").removesuffix("’s")
            if word in _EMPTY:
                continue
            said.append(word)
            fitting = [
                document
                for document in documents
                if any(_fits(said, name, is_source=is_source) for name in own[document.id])
            ]
            if fitting:
                exact = [d for d in fitting if any(set(said) == set(name) for name in own[d.id])]
                best = number, exact or fitting
        if best and not _goes_on(phrase[best[0] + 1 :]):
            yield question[place : phrase[best[0]].end()], best[1]


def _goes_on(rest: Sequence[re.Match[str]]) -> bool:
    """Say whether what comes after a name tells the document from others: "of Rome", "2018"."""
    word = rest[0].group() if rest else ""
    return bool(word) and (word.lower() in _MORE or not word[0].islower())


def _following(question: str, place: int) -> Iterator[re.Match[str]]:
    """Yield the words of a phrase that begins at a place, up to a sign that ends it."""
    end = place
    for match in list(_WORD.finditer(question, place))[:_LONGEST_NAME_WORDS]:
        if re.search(r"[,;:?!]|\.\s", question[end : match.start()]):
            return
        yield match
        end = match.end()


def _fits(said: Sequence[str], name: Sequence[str], *, is_source: bool) -> bool:
    """Say whether words mean a document of this name: some of its words, or all.

    Some will do if they say what kind of document it is, or, of a source, if they are several.
    """
    if not set(said) <= set(name):
        return False
    if not _KINDS.isdisjoint(said):
        return True
    return is_source and (len(said) > 1 or set(said) == set(name))


def _names(document: Document) -> set[str]:
    return {document.title, _last_part(document.source)}


def _words(name: str) -> list[str]:
    return [
        word
        for word in (match.group().lower() for match in _WORD.finditer(_SUFFIX.sub("", name)))
        if word not in _EMPTY
    ]


def _last_part(source: str) -> str:
    return PurePath(source.removeprefix("upload:")).name


def _titles(documents: Sequence[Document], joined: str) -> str:
    titles = [document.title for document in documents]
    more = len(titles) - _LISTED
    if more > 1:
        titles = [*titles[:_LISTED], f"{more:,} others"]
    *before, last = titles
    listed = f"{', '.join(before)} {joined} {last}" if before else last
    is_are = "" if joined == "or" else (" was" if len(documents) == 1 else " were")
    return listed + is_are
