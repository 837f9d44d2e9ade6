"""What the page makes of answers and of hostile text, and what it refuses to serve."""

import html
import re
import socket
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from rag.errors import ServeError
from rag.lm.engine import PrefillProgress
from rag.types import (
    Answer,
    Citation,
    Decoding,
    DecodingWay,
    Gate,
    KVBytes,
    QuestionClass,
    ReadExtent,
    Receipt,
    Route,
    Seconds,
)
from ui.answer_html import answer_card, answer_html, citations_html, gates_html, receipt_html
from ui.app import serve
from ui.assembly import Fathom
from ui.formatting import amount, decoding_words, error_html, plain_html, receipt_text
from ui.tabs.evidence import evidence_html
from ui.tabs.parts import offered
from ui.tabs.writing import paced

HOSTILE = [
    "<script>fetch('http://evil.example')</script>",
    "<img src=http://evil.example/x.png onerror=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "</blockquote></li><iframe src=http://evil.example>",
    "<style>body{background:url(http://evil.example)}</style>",
    "![x](http://evil.example/x.png)",
    "[click](http://evil.example) and [script](javascript:alert(1))",
    "![x][r]\r\r[r]: http://evil.example/x.png",
    "text\r\n\r\n![x](http://evil.example/x.png)",
    "http://evil.example www.evil.example <http://evil.example> a@evil.example",
    "# heading\n\n1. item\n- item\n\n    code\n\n`code` **bold** _slant_",
    "| a | b |\n|---|---|\n| 1 | 2 |",
]
# Once more by a Markdown renderer: nothing of these may come of untrusted text.
TAGS = "a img script iframe style h1 h2 pre code strong em ul li table"


def an_answer(text: str, *, quote: str = "Twelve.", title: str = "handbook.md") -> Answer:
    """Return an answer with one citation and a receipt."""
    gates = (
        Gate("tokens", 117532, 32768, "tokens", False, "full"),
        Gate("positions", 1500, None, "positions", True, "retrieval"),
        Gate("kv_bytes", 35 * 2**20, None, "bytes", False, "full"),
    )
    return Answer(
        answer=text,
        abstained=False,
        citations=(Citation(1, 1, title, 2, 7, "Fees", 10, 17, quote, True),),
        receipt=Receipt(
            id="1f2e3d4c5b6a",
            route=Route.RETRIEVAL,
            reason="reading everything fails a gate",
            question_class=QuestionClass.LOOKUP,
            gates=gates,
            read=ReadExtent(1024, 117000, 9, 1200, "1,191 of 1,200 chunks were not shown"),
            prompt_tokens=1508,
            cached_tokens=0,
            new_tokens=24,
            kv_bytes=KVBytes(36700160, 36700160),
            seconds=Seconds(0.02, 3.1, 2.9, 1.5, 4.7),
            escalations=(),
            model=title,
            embedder="all-minilm-l6-v2",
            prompt_sha256="0" * 64,
        ),
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    hostile = an_answer(text, quote=text, title=text)
    for shown in (
        plain_html(text),
        answer_html(hostile),
        _text_of_list(citations_html(hostile)),
        _text_of_list(evidence_html(hostile.citations[0], text, text, text)),
        error_html(text, text),
    ):
        assert "://" not in shown
        assert "www." not in shown
        assert "\r" not in shown
        rendered = MarkdownIt("commonmark").enable("table").render(shown)
        for tag in TAGS.split():
            assert not re.search(rf"<{tag}[\s>/]", rendered), (tag, rendered)
    shown = receipt_html(hostile.receipt)
    assert "://" not in shown
    for tag in set(TAGS.split()) - {"li", "ul"}:
        assert not re.search(rf"<{tag}[\s>/]", shown), (tag, shown)


def test_reading_says_how_long_it_goes_on_once_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([0.0, 0.0, 2.0, 2.0, 10.0, 10.0])  # one look for the words, one for the picture
    monkeypatch.setattr("ui.tabs.writing.time.monotonic", lambda: next(seconds))
    done = [PrefillProgress(tokens, 9_000) for tokens in (1_000, 2_000, 3_000)]
    *cards, _ = paced(iter(done))
    assert ["left" in str(card) for card in cards] == [False, True]
    assert "3,000 of 9,000 tokens, about 0:00:30 left" in html.unescape(str(cards[-1]))


def test_what_is_ticked_while_the_choices_come_stays() -> None:
    choices = [("tides.txt", 1), ("handbook.md", 2)]
    assert "value" not in offered(choices, [])
    assert "value" not in offered(choices, [2])
    assert offered(choices, [2, 3])["value"] == [2]


def test_a_command_in_a_hint_is_shown_as_it_is_typed() -> None:
    shown = html.unescape(error_html("no such model", "fathom models fetch auto"))
    assert ">No such model.<" in shown
    assert "<br>fathom models fetch auto</div>" in shown


def _text_of_list(shown: str) -> str:
    """Return HTML without the list items that are its own."""
    return re.sub(r"</?(li|ol)\b[^>]*>", "", shown)


def test_what_is_shown_is_the_text_itself() -> None:
    text = 'Fees (§ 3): 35 € & more_or_less <5 %, "as is".\n  Wörter, 日本語。'
    shown = plain_html(text).replace("<br>", "\n").replace("&nbsp;", " ")
    assert html.unescape(shown) == text


def test_markers_become_buttons_that_say_their_place_and_unverified_is_said() -> None:
    shown = html.unescape(answer_html(an_answer("35 crowns [1] Whales. [unverified] [9]")))
    assert 'data-receipt="1f2e3d4c5b6a" data-marker="1"' in shown
    assert 'aria-label="Citation 1: handbook.md, version 2, page 7, Fees"' in shown
    assert '<span class="unverified">unverified</span>' in shown
    assert '<sup class="marker">9</sup>' in shown  # there is no such citation: nothing to open
    assert citations_html(replace(an_answer(""), citations=())) == ""


def test_an_abstention_shows_the_nearest_passages_as_what_they_are() -> None:
    shown = citations_html(replace(an_answer(""), abstained=True))
    assert "Nearest passages, which do not hold the answer" in shown


def test_a_strip_says_where_in_the_document_the_citations_lie() -> None:
    one = an_answer("").citations[0]
    starts = (0, 50, 99, 99)
    cited = tuple(replace(one, marker=n, start=start) for n, start in enumerate(starts, 1))
    shown = html.unescape(answer_card(replace(an_answer(""), citations=cited), num_chars={1: 100}))
    assert "handbook.md: 1 at the start, 1 in the middle, 2 at the end" in shown
    assert [f'left="{x}"' in shown for x in ("0.0", "50.0", "99.0")] == [True] * 3
    gone = answer_card(replace(an_answer(""), citations=cited), num_chars={})
    assert "strip" not in gone


def test_gates_are_bars_against_their_limits() -> None:
    shown = gates_html(an_answer("").receipt.gates)
    over, unknown, unlimited = re.findall(r"<li.*?</li>", shown)
    assert 'data-width="100.0"' in over
    assert 'data-left="27.9"' in over  # 32,768 of 117,532
    assert "<b data" not in unlimited
    assert "<b data" not in unknown
    assert ['class="failed"' in item for item in (over, unknown, unlimited)] == [True, True, False]


def test_a_count_shows_its_first_quotations_and_folds_the_rest() -> None:
    one = an_answer("").citations[0]
    many = tuple(replace(one, marker=n) for n in range(1, 103))
    page = citations_html(replace(an_answer(""), citations=many))
    shown, _, folded = page.partition("<details")
    assert shown.count("<li") == 8
    assert folded.count("<li") == 94
    assert "94 more quotations" in folded
    assert "<li value=102>" in folded


def test_a_receipt_says_every_number_with_its_unit() -> None:
    receipt = an_answer("").receipt
    shown = html.unescape(receipt_html(receipt))
    for part in (
        "Reading everything fails a gate.",
        "117,532 of 32,768 tokens",
        "1,500 positions of no limit",
        "35.0 MiB of unknown",
        "1,024 of 117,000 tokens in 9 of 1,200 chunks",
        "1,191 of 1,200 chunks were not shown",
        "equal to the byte",
        "0.02 s retrieving, 3.1 s reading, 1.5 s writing",
    ):
        assert part in shown
    assert shown.count(">35.0 MiB<") == 2  # predicted and actual
    assert shown.count(">2.9 s<") == shown.count(">3.1 s<") == 1
    assert "Written" not in shown
    drafted = Decoding(DecodingWay.DRAFTS, drafted=40, accepted=25)
    words = "several tokens a pass where it copies, 25 of 40 drafted tokens right"
    written = replace(receipt, decoding=drafted)
    assert f"<dt>Written</dt><dd>{words}</dd>" in html.unescape(receipt_html(written))
    assert f"\nwritten {words}\n" in receipt_text(replace(an_answer(""), receipt=written))
    rows = Decoding(DecodingWay.PLAIN, num_rows=4, refused="no recorded step")
    assert decoding_words(rows) == "token by token, 4 answers in step; no recorded step"
    apart = replace(receipt, kv_bytes=KVBytes(36700160, 36701184))
    assert "1,024 bytes apart" in html.unescape(receipt_html(apart))


def test_the_terminal_gets_no_control_sequences() -> None:
    lines = receipt_text(an_answer("red \x1b[31m\r\nnext \x9b2J", quote="\x1b]0;title\x07 a"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lines)
    assert '[1] "' in lines
    assert "handbook.md, version 2, page 7, Fees, characters 10-17" in lines
    assert "FAILED  117,532 tokens of 32,768 tokens" in lines


def test_amounts_have_units() -> None:
    assert amount(35 * 2**20, "bytes") == "35.0 MiB"
    assert amount(117532, "tokens") == "117,532 tokens"
    assert amount(None, "tokens") == "unknown"


def test_a_port_in_use_is_named(small_fathom: Fathom) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port}") as caught:
            serve(small_fathom, "127.0.0.1", port)
    assert "--port" in caught.value.hint


def test_a_public_address_is_refused(small_fathom: Fathom) -> None:
    with pytest.raises(ServeError, match="nobody has to sign in"):
        serve(small_fathom, "0.0.0.0", 0)
