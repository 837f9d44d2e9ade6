"""The page in a real browser, and what it makes of hostile text."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rag.errors import ServeError
from rag.types import Answer
from ui.app import serve
from ui.assembly import Fathom
from ui.formatting import amount, answer_html, citations_html, error_html, evidence_html, plain_html

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = [
    "<script>fetch('http://evil.example')</script>",
    "<img src=http://evil.example/x.png onerror=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "</blockquote></li><iframe src=http://evil.example>",
    "<style>body{background:url(http://evil.example)}</style>",
]
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


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(small_fathom: Fathom, text: str) -> None:
    given = small_fathom.service().answer("fee")
    hostile = replace(given, answer=text)
    for shown in (
        plain_html(text),
        answer_html(hostile),
        evidence_html(text, text, text),
        error_html(text, text),
    ):
        for tag in ("<script", "<img", "<a ", "<iframe", "<style"):
            assert tag not in shown


def test_markers_become_superscripts_and_unverified_is_said(small_fathom: Fathom) -> None:
    given: Answer = small_fathom.service().answer("fee")
    shown = answer_html(replace(given, answer="35 crowns [1] Whales. [unverified]"))
    assert '<sup class="marker">1</sup>' in shown
    assert '<span class="unverified">unverified</span>' in shown
    assert citations_html(replace(given, citations=())) == ""


def test_amounts_have_units() -> None:
    assert amount(35 * 2**20, "bytes") == "35.0 MiB"
    assert amount(117532, "tokens") == "117,532 tokens"
    assert amount(None, "tokens") == "unknown"


def test_a_public_address_is_refused(small_fathom: Fathom) -> None:
    with pytest.raises(ServeError, match="no login"):
        serve(small_fathom, "0.0.0.0", 0)


_SERVER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from conftest import HashEmbedder, make_tiny_engine
from rag.settings import Settings
from ui.app import serve
from ui.assembly import Fathom
settings = Settings(home=Path(sys.argv[3]), max_new_tokens=16, kv_reserve_bytes=0)
library = Fathom(settings, embedder=HashEmbedder(), engine=make_tiny_engine())
serve(library, "127.0.0.1", int(sys.argv[4]))
"""


@pytest.fixture
def page_url(small_fathom: Fathom) -> Iterator[str]:
    """Serve the real application in a process of its own on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).resolve().parent
    arguments = [str(here.parent), str(here), str(small_fathom.settings.home), str(port)]
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
        question.fill("What is the harbour fee? <img src=http://evil.example/q.png>")
        question.press("Enter")
        page.locator("details.receipt").wait_for(timeout=60_000)
        page.locator("details.receipt summary").click()
        page.get_by_text("kv bytes").first.wait_for()
        page.screenshot(path=str(tmp_path / "wide.png"))
        page.get_by_role("tab", name="Library").click()
        page.get_by_text("characters").first.wait_for()

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
