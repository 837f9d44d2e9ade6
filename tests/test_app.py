"""The page in a real browser, and what it makes of hostile text."""

import html
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from rag.errors import ServeError
from rag.types import (
    Answer,
    Citation,
    Gate,
    KVBytes,
    QuestionClass,
    ReadExtent,
    Receipt,
    Route,
    Seconds,
)
from ui.app import serve
from ui.assembly import Fathom
from ui.formatting import (
    amount,
    answer_html,
    citations_html,
    error_html,
    evidence_html,
    plain_html,
    receipt_html,
    receipt_text,
)

CHROMIUM = Path("/usr/bin/chromium")
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
TAGS = "a img script iframe style h1 h2 pre code strong em ul li table".split()
REPLY = "The harbour fee is 35 crowns a night. ![x](http://evil.example/x.png) www.evil.example"
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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
        citations_html(hostile).replace("<li value=1>", "").replace("</li>", ""),
        evidence_html(text, text, text, text),
        error_html(text, text),
    ):
        assert "://" not in shown
        assert "www." not in shown
        assert "\r" not in shown
        rendered = MarkdownIt("commonmark").enable("table").render(shown)
        for tag in TAGS:
            assert not re.search(rf"<{tag}[\s>/]", rendered), (tag, rendered)
    assert "<table>" not in receipt_html(hostile.receipt).split("</table>")[1]
    assert "://" not in receipt_html(hostile.receipt)


def test_what_is_shown_is_the_text_itself() -> None:
    text = 'Fees (§ 3): 35 € & more_or_less <5 %, "as is".\n  Wörter, 日本語。'
    shown = plain_html(text).replace("<br>", "\n").replace("&nbsp;", " ")
    assert html.unescape(shown) == text


def test_markers_become_superscripts_and_unverified_is_said() -> None:
    shown = answer_html(an_answer("35 crowns [1] Whales. [unverified]"))
    assert '<sup class="marker">1</sup>' in shown
    assert '<span class="unverified">unverified</span>' in shown
    assert citations_html(replace(an_answer(""), citations=())) == ""


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
        "<td>117,532 tokens</td><td>32,768 tokens</td><td>failed</td>",
        "<td>1,500 positions</td><td>no limit</td><td>passed</td>",
        "<td>KV cache</td><td>35.0 MiB</td><td>unknown</td><td>failed</td>",
        "1,024 of 117,000 tokens in 9 of 1,200 chunks",
        "1,191 of 1,200 chunks were not shown",
        "35.0 MiB predicted, 35.0 MiB actual, equal to the byte",
    ):
        assert part in shown
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


_SERVER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from conftest import HashEmbedder, make_tiny_engine
from rag.lm.engine import GenerationDone, TextPiece
from rag.settings import Settings
from ui.app import serve
from ui.assembly import Fathom
class Scripted:
    # the tiny model reads and writes, but what it says is given
    def __init__(self, engine, reply):
        self._engine, self._reply = engine, reply
    def __getattr__(self, name):
        return getattr(self._engine, name)
    def generate(self, *arguments, **options):
        for step in self._engine.generate(*arguments, **options):
            if isinstance(step, GenerationDone):
                yield TextPiece(self._reply)
            if not isinstance(step, TextPiece):
                yield step
settings = Settings(home=Path(sys.argv[3]), max_new_tokens=16, kv_reserve_bytes=0)
engine = Scripted(make_tiny_engine(), sys.argv[5])
library = Fathom(settings, embedder=HashEmbedder(), engine=engine)
serve(library, "127.0.0.1", int(sys.argv[4]))
"""


@pytest.fixture
def page_url(small_fathom: Fathom) -> Iterator[str]:
    """Serve the real application in a process of its own on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).resolve().parent
    arguments = [str(here.parent), str(here), str(small_fathom.settings.home), str(port), REPLY]
    process = subprocess.Popen([sys.executable, "-c", _SERVER, *arguments])
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/healthz", timeout=1) as answer:
                    assert answer.read() == b'{"ok":true}'
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_a_foreign_host_name_gets_nothing(page_url: str) -> None:
    asked = urllib.request.Request(f"{page_url}/config", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked, timeout=10)
    with caught.value as refused:
        assert refused.code == 400
    own = urllib.request.Request(f"{page_url}/config", headers={"Host": "localhost:80"})
    with urllib.request.urlopen(own, timeout=10) as answer:
        assert answer.status == 200


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed")
def test_a_question_in_the_browser_gets_answer_and_receipt(page_url: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    foreign: list[str] = []

    def watch(page: Any) -> None:  # noqa: ANN401 - a Playwright page
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        own = (page_url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else foreign.append(r.url))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        watch(page)
        response = page.goto(page_url)
        assert response is not None
        assert "default-src 'self'" in response.headers["content-security-policy"]
        page.get_by_text("handbook.md").first.wait_for()
        question = page.locator("#question textarea")
        question.fill("What is the harbour fee? ![q](http://evil.example/q.png)")
        question.press("Enter")
        page.locator("details.receipt").wait_for(timeout=60_000)
        page.locator("details.receipt summary").click()
        page.get_by_text("equal to the byte").wait_for()
        assert page.locator("#conversation :is(img, a)").count() == 0
        page.get_by_text("![x](http://evil.example/x.png)").first.wait_for()
        page.locator("ol.citations li").first.wait_for()
        page.locator("#places label").first.click()
        assert "35 crowns" in page.locator("figure.evidence mark").inner_text()
        page.get_by_role("button", name="Ask").wait_for()
        page.screenshot(path=str(tmp_path / "wide.png"))
        page.get_by_role("tab", name="Library").click()
        page.get_by_role("columnheader", name="characters").first.wait_for()
        page.get_by_role("gridcell", name="362").first.wait_for()

        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        watch(phone)
        phone.goto(f"{page_url}/?__theme=dark")
        phone.locator("#question textarea").wait_for()
        width = phone.evaluate("document.documentElement.scrollWidth")
        phone.screenshot(path=str(tmp_path / "phone.png"))
        browser.close()
    assert width <= 390
    assert problems == []
    assert foreign == []
    assert (tmp_path / "wide.png").stat().st_size > 10_000
