"""Where the sentences of a text begin and end: the one place that knows an abbreviation's stop.

A row of a table is a sentence: a line whose cells stand between tabs or ` | `, as the readers write
them, or between commas or semicolons, as in CSV. Prose has those, too, but white space behind them
and not as many in each line; so it is told by them only where three lines or more agree.
"""

import re
from collections.abc import Iterator
from itertools import groupby

Span = tuple[int, int]

LONGEST_SENTENCE_CHARS = 600

# The end of a sentence: its sign, what closes quotes and brackets after it, and white space; signs
# of scripts that write no spaces need none. An empty line always ends one, as does a new item.
_END = re.compile(
    r"[.!?…]+[\"'”’)\]]*(?:\[\d{1,3}\])*(?=\s)"
    r"|[。！？]+[」』”’）]*"
    r"|\n[ \t]*\n|\n(?=[ \t]*(?:[-*•#|{]|\d+[.)]\s))"
)
# A line break inside a paragraph: neither a stop stands before it, nor an item's number behind it.
_SOFT_BREAK = re.compile(r"(?<=[^\n.!?:;])\n(?=[a-z0-9(\"'])(?!(?:\d+|[a-z])[.)]\s)")
_LINE = re.compile(r"[^\n]+")
_NOT_SPACE = re.compile(r"\S")
_SIGNS = ".!?…"
_CLOSING_QUOTES = "\"'”’"

# What stands before a full stop that may end no sentence, and what stands behind it.
_WORD_BEFORE = re.compile(r"(?<![\w.'’])(?<!\w-)\w[\w.]*$")
_WORD_AFTER = re.compile(r"\s+(?:\[\w+\]\s+)*[\"'“‘(\[]*(\w+\.?|\S)")
_LOOK_BACK = 12  # characters; no abbreviation is longer

# Behind these the sentence goes on, with a name or whatever they introduce, ...
_BEFORE_MORE = frozenset(
    "Adm Capt Cmdr Col Cpl Det Dr Gen Gov Hon Insp Lt Maj Messrs Mlle Mme Mr Mrs Ms Mt Mx Pres"
    " Prof Rep Rev Sen Sgt Supt DR MR MRS MS"
    " Approx approx ca Cf cf E.g e.g eg ed eds esp I.e i.e ie incl resp v viz Vs vs".split()
)
# ... behind these, small or capital, with a number, ...
_BEFORE_NUMBERS = frozenset(
    "c no nos p pp jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
# ... or with a letter in its place; ...
_BEFORE_NUMERALS = frozenset(
    "app art arts ch cl eq eqs ex fig figs para paras ref refs sch sec secs sect tab ver vol"
    " vols".split()
)
_NUMBERED = _BEFORE_NUMBERS | _BEFORE_NUMERALS
# ... and behind these and initials, unless the word that follows often begins one, and is no name.
_MAY_END = frozenset(
    "al ave bros blvd co corp dept esq inc jr ltd ph.d plc pte rd sr st univ".split()
)
_BEGINNERS = frozenset(
    "a after all also although an and another any are as at because before both but by can did do"
    " does during each either every few finally first for from furthermore had has have he her here"
    " his how however i if in instead is it its later many most moreover my neither no not now of"
    " on once one only or other our over please she since so some such than that the their then"
    " there therefore these they this those thus to today under unless until upon was we were what"
    " when where whether which while who why with without yes yet you your".split()
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]|[A-ZÀ-ÖØ-Þ]")
_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"[IVXLC]+\.?|[A-Z]\.?")
# A number or letter that stands where a sentence or an item begins: "4.", "Sec. 4.2.", "b.".
_LABEL = re.compile(
    r"(?:^|\n|[.!?:;|\"”)\]]\s)\s*(?:[-*•#>]+\s+)?"
    r"(?:(?:(?:Sec|Art|Ch)\.|Section|Article|Chapter|Clause|Part|Item|Step|§+)\s*)?"
    r"(?:\d{1,3}(?:\.\d{1,3})*|[A-Za-z]|[IVXivx]{1,5})\.$"
)
_LABEL_LOOK_BACK = 32  # characters
# What parts the cells of a row. What stands in quotation marks parts none, and the commas of a
# number (" 1,200") prove none: "77,Boat 77,231" has them in the place of both.
_ROW_SIGN = re.compile(r"\t| \||[,;]\S")
_QUOTED, _NUMBER = r'"[^"\n]*"', r"(?<![\w.,;/-])\d{1,3}(?:,\d{3})+(?![\w,;])"
_SURE = r"(?P<sure>(?<=\S) *\t[ \t]*(?=\S)|(?<=\S) \|(?: |$))"
_SEPARATOR = re.compile(rf"{_QUOTED}|{_SURE}|[,;](?! )")
_COMMA = re.compile(rf"{_QUOTED}|{_NUMBER}|(?P<found>[,;](?=[^\s'’”]))")
_ROW_LINE = re.compile(r"^[^\n]*$", re.M)
_LEAST_ROWS = 3
# Where a sentence that is too long is cut, best first.
_WEAK_ENDS = (re.compile(r"[;:；：]\s*|\n"), re.compile(r"[,，、]\s*"), re.compile(r"\s+"))


def sentence_spans(text: str) -> list[Span]:
    """Return the `[start, end)` of each sentence, in order, without the white space around it.

    Nothing but white space lies between them. A line break inside a paragraph ends no sentence,
    but a row is one. What is longer than `LONGEST_SENTENCE_CHARS` is cut at a weaker sign.
    """
    return [
        span
        for start, end, is_row in _stretches(text)
        for span in (_row(text, start, end) if is_row else _sentences(text, start, end))
    ]


def line_sentence_spans(text: str) -> list[Span]:
    """Return the sentences as `sentence_spans` does, but where a line ends, one ends, too.

    So list items and headings stand alone. A line that goes on in lower case, as wrapped text does,
    goes on.
    """
    joined = _SOFT_BREAK.sub(" ", text)
    spans: list[Span] = []
    for start, end, is_row in _stretches(text):
        if is_row:
            spans += _row(text, start, end)
            continue
        for line in _LINE.finditer(joined, start, end):
            spans += _sentences(joined, line.start(), line.end())
    return spans


def row_spans(text: str) -> list[Span]:
    """Return the `[start, end)` of each line that is a row of a table, in order."""
    if not _ROW_SIGN.search(text):
        return []
    rows = []
    lines = [(line.start(), line.end(), _parted(line[0])) for line in _ROW_LINE.finditer(text)]
    for (_, is_sure), group in groupby(lines, key=lambda line: line[2]):
        alike = list(group)
        if is_sure or (is_sure is not None and len(alike) >= _LEAST_ROWS):
            rows += [(start, end) for start, end, _ in alike]
    return rows


def cell_spans(row: str) -> list[Span]:
    """Return the `[start, end)` of each cell of a row, between what parts them."""
    cells, start = [], 0
    is_sure = _parted(row)[1]
    for match in _SEPARATOR.finditer(row):
        if match[0][0] != '"' and (match["sure"] is not None) is bool(is_sure):
            cells.append((start, match.start()))
            start = match.end()
    return [*cells, (start, len(row))]


def ends_sentence(text: str, stop: int, end: int) -> bool:
    """Say whether a sign that may end a sentence does.

    A full stop does not after an abbreviation, an initial or an item's number, nor does it where
    lower case follows, or another sign within a quotation. It is told by the word before and the
    first letters behind, of English alone.

    Args:
        text: what it stands in.
        stop: its offset, the first of them where there are several.
        end: the offset behind it, and behind what closes quotes and brackets after it.
    """
    following = _WORD_AFTER.match(text, end)
    after = following[1] if following else ""
    if after[:1].islower():
        return text[stop] != "." and text[end - 1] not in _CLOSING_QUOTES
    found = _WORD_BEFORE.search(text, max(0, stop - _LOOK_BACK), stop)
    if text[stop] != "." or text[stop + 1 : stop + 2] == "." or found is None:
        return True
    word = found[0]
    lower = word.lower() if len(word) > 1 else word  # "p. 5", but P. Smith
    if word in _BEFORE_MORE or _is_label(text, stop):
        return False
    if lower in _NUMBERED:
        may_be_letter = lower in _BEFORE_NUMERALS and word[0].isupper()
        return not (_DIGIT.search(after) or (may_be_letter and _LETTER.fullmatch(after)))
    if lower in _MAY_END or _INITIALS.fullmatch(word):
        return after.lower() in _BEGINNERS
    return True


def _is_label(text: str, stop: int) -> bool:
    """Say whether what stands before a full stop numbers the sentence or the item it begins."""
    found = _LABEL.search(text, max(0, stop - _LABEL_LOOK_BACK), stop + 1)
    if found is None or found[0][0] != ".":
        return found is not None
    # "Fig. 2. It shows": the number is what Fig. stands before
    before = _WORD_BEFORE.search(text, max(0, found.start() - _LOOK_BACK), found.start())
    return before is None or before[0].lower() not in _NUMBERED


def _stretches(text: str) -> Iterator[tuple[int, int, bool]]:
    """Yield the `[start, end)` of each row and of what stands between rows, and which it is."""
    last = 0
    for start, end in row_spans(text):
        if last < start:
            yield last, start, False
        yield start, end, True
        last = end
    if last < len(text):
        yield last, len(text), False


def _parted(line: str) -> tuple[int, bool | None]:
    """Return the number of a line's separators, and whether it is a row for sure; None: it is not.

    Rows of ` | ` differ in number, since empty cells at their end are not written.
    """
    if not _ROW_SIGN.search(line):
        return 0, None
    separators = [match for match in _SEPARATOR.finditer(line) if match[0][0] != '"']
    if any(match["sure"] for match in separators):
        return 0, True
    if any(match["found"] for match in _COMMA.finditer(line)):
        return len(separators), False
    return 0, None


def _row(text: str, start: int, end: int) -> list[Span]:
    """Return a row whole, and the sentences of one that is too long."""
    if end - start > LONGEST_SENTENCE_CHARS:
        return _sentences(text, start, end)
    return _pieces(text, start, end)


def _sentences(text: str, start: int, end: int) -> list[Span]:
    """Return the sentences of a stretch without rows."""
    spans: list[Span] = []
    for match in _END.finditer(text, start, end):
        if match[0][0] in _SIGNS and not ends_sentence(text, match.start(), match.end()):
            continue
        spans += _pieces(text, start, match.end())
        start = match.end()
    return spans + _pieces(text, start, end)


def _pieces(text: str, start: int, end: int) -> list[Span]:
    """Return the stretch without the white space around it, in pieces that are not too long."""
    pieces = []
    end = start + len(text[start:end].rstrip())
    while found := _NOT_SPACE.search(text, start, end):
        start = found.start()
        cut = end if end - start <= LONGEST_SENTENCE_CHARS else _weak_end(text, start)
        pieces.append((start, start + len(text[start:cut].rstrip())))
        start = cut
    return pieces


def _weak_end(text: str, start: int) -> int:
    """Return where a sentence that begins at `start`, and is too long, is best cut."""
    least, most = start + LONGEST_SENTENCE_CHARS // 3, start + LONGEST_SENTENCE_CHARS
    for weak_end in _WEAK_ENDS:
        cuts = [match.end() for match in weak_end.finditer(text, least, most)]
        if cuts:
            return cuts[-1]
    return most
