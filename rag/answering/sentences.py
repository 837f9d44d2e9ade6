"""Where the sentences of a text begin and end."""

import re

Span = tuple[int, int]

LONGEST_SENTENCE_CHARS = 600

# The end of a sentence: its sign, what closes quotes and brackets after it, and white space; signs
# of scripts that write no spaces need none. An empty line always ends one, as does a new item.
_END = re.compile(
    r"[.!?…]+[\"'”’)\]]*(?:\[\d{1,3}\])*(?=\s)"
    r"|[。！？]+[」』”’）]*"
    r"|\n[ \t]*\n|\n(?=[ \t]*(?:[-*•#|]|\d+[.)]\s))"
)
# What stands before a full stop that ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|al|approx|ca|cf|Co|Corp|Dr|e\.g|ed|eds|eq|Eq|etc|Fig|fig|Figs|Gen|Gov|i\.e|Inc"
    r"|Jr|Lt|Ltd|Mr|Mrs|Ms|Mt|No|no|nos|op|p|pp|Prof|Rev|Sr|St|Tab|vol|vs|viz)"
    r"|\b(?:[A-Za-z]\.)+[A-Za-z])\.$"
)
_NEXT_WORD = re.compile(r"\s+([^\s])")
# Where a sentence that is too long is cut, best first.
_WEAK_ENDS = (re.compile(r"[;:；：]\s*|\n"), re.compile(r"[,，、]\s*"), re.compile(r"\s+"))


def sentence_spans(text: str) -> list[Span]:
    """Return the `[start, end)` of each sentence, in order, without the white space around it.

    Nothing but white space lies between them. A line break inside a paragraph ends no sentence.
    What is longer than `LONGEST_SENTENCE_CHARS` is cut at a weaker sign.
    """
    spans: list[Span] = []
    start = 0
    for match in _END.finditer(text):
        if match.group().startswith(".") and not _ends_sentence(text, match.start(), match.end()):
            continue
        spans += _pieces(text, start, match.end())
        start = match.end()
    return spans + _pieces(text, start, len(text))


def _ends_sentence(text: str, stop: int, end: int) -> bool:
    following = _NEXT_WORD.match(text, end)
    if following and following.group(1).islower():
        return False
    return not _ABBREVIATION.search(text, max(0, stop - 12), stop + 1)


def _pieces(text: str, start: int, end: int) -> list[Span]:
    """Return the stretch without the white space around it, in pieces that are not too long."""
    stripped = text[start:end].strip()
    if not stripped:
        return []
    start = text.index(stripped[0], start)
    end = start + len(stripped)
    if end - start <= LONGEST_SENTENCE_CHARS:
        return [(start, end)]
    least, most = start + LONGEST_SENTENCE_CHARS // 3, start + LONGEST_SENTENCE_CHARS
    for weak_end in _WEAK_ENDS:
        cuts = [m.end() for m in weak_end.finditer(text, least, most)]
        if cuts:
            return _pieces(text, start, cuts[-1]) + _pieces(text, cuts[-1], end)
    return [(start, most), *_pieces(text, most, end)]
