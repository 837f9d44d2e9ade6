"""Two people in real browsers, and a page that asks nothing of anybody else, whatever it shows."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from conftest import HANDBOOK, HashEmbedder
from rag.settings import Settings
from served_page import ARGUMENTS, CHROMIUM, served
from ui.assembly import Fathom

PASSWORD = "correct horse battery"
EVIL = "http://evil.example"
# What a document or a model may say to have a browser fetch, run, go or send something.
PAYLOADS = [
    f"![x]({EVIL}/1.png)",
    f"![x][r]\n\n[r]: {EVIL}/2.png",
    f"![x]({EVIL}/3.png 'title' =100x100)",
    f"[click]({EVIL}/4) <{EVIL}/5> {EVIL}/6 //evil.example/7",
    "[x](javascript:document.title='owned')",
    "[x](java\tscript:document.title='owned') [y](JAVASCRIPT&colon;document.title='owned')",
    "[x](data:text/html,<script>document.title='owned'</script>)",
    f"<img src={EVIL}/8.png onerror=document.title='owned'>",
    "<img src=x onerror=\"document.title='owned'\">",
    f"<svg onload=document.title='owned'><image href={EVIL}/9.svg /></svg>",
    f"<svg><use href='{EVIL}/10.svg#x'/></svg><math href='{EVIL}/11'>x</math>",
    f'<iframe src={EVIL}/12></iframe><iframe srcdoc="<img src={EVIL}/13>"></iframe>',
    f"<object data={EVIL}/14></object><embed src={EVIL}/15>",
    f'<meta http-equiv="refresh" content="0;url={EVIL}/16">',
    f"<base href={EVIL}/17><link rel=stylesheet href={EVIL}/18.css>",
    f"<link rel=prefetch href={EVIL}/19><link rel=preconnect href={EVIL}>",
    f"<style>@import '{EVIL}/20.css'; body {{ background: url({EVIL}/21.png) }}</style>",
    f'<p style="background:url({EVIL}/22.png);position:fixed;inset:0">x</p>',
    f"<form action={EVIL}/23><button autofocus onfocus=this.form.submit()>x</button></form>",
    f"<video src={EVIL}/24.mp4 autoplay></video><audio src={EVIL}/25.mp3 autoplay></audio>",
    "<script>document.title='owned'</script><details open ontoggle=document.title='owned'>x",
    "</blockquote></details></div></figure><h1 id=conversation>x</h1>",
    "\u202e<script>document.title='owned'</script>\u202c \u200b<\u200bscript>x",
    "＜script＞document.title='owned'＜/script＞ \ufeff<script>document.title='owned'</script>",
    "&lt;script&gt;document.title='owned'&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    f"$$\\href{{{EVIL}/26}}{{x}}$$ \\includegraphics{{{EVIL}/27.png}} $\\url{{{EVIL}/28}}$",
    f"```html\n<img src={EVIL}/29.png>\n```\n\n~~~\n</code></pre><img src={EVIL}/30.png>\n~~~",
    f"| ![x]({EVIL}/31.png) | <img src={EVIL}/32.png> |\n|---|---|\n| a | b |",
    f"<a href={EVIL}/33 ping={EVIL}/34>x</a><a href=x style=animation-name:x>y</a>",
    "[[1]](javascript:document.title='owned') [unverified](x) [2]<img src=x>",
]
_SERVER = """
import sys, time
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
                for line in self._reply.splitlines(True):
                    yield TextPiece(line)
                    time.sleep(0.01)
            if not isinstance(step, TextPiece):
                yield step
settings = Settings(home=Path(sys.argv[3]), max_new_tokens=16, kv_reserve_bytes=0)
engine = Scripted(make_tiny_engine(), Path(sys.argv[5]).read_text())
serve(Fathom(settings, embedder=HashEmbedder(), engine=engine), "127.0.0.1", int(sys.argv[4]))
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def fathom(tmp_path_factory: pytest.TempPathFactory) -> Fathom:
    """Return a library in which anna and ben have accounts and documents."""
    settings = Settings(home=tmp_path_factory.mktemp("access"))
    library = Fathom(settings, embedder=HashEmbedder())
    for name, text in (("anna", HANDBOOK), ("ben", HANDBOOK.replace("harbour", "airport"))):
        library.accounts.add(name, PASSWORD)
        path = settings.home / "tmp" / f"{name}s-own.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        library.for_owner(name).ingest(path, source=f"upload:{path.name}")
        path.unlink()
    return library


@pytest.fixture(scope="module")
def url(fathom: Fathom) -> Iterator[str]:
    """Serve the whole application; the model says every payload, then a line that is true."""
    reply = fathom.settings.home / "reply.txt"
    reply.write_text("\n\n".join([*PAYLOADS, "The harbour fee is 35 crowns a night."]))
    with served(_SERVER, fathom.settings.home, str(reply)) as address:
        yield address


@pytest.fixture
def browser() -> Iterator[Any]:
    """Return a running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield running
        running.close()


class Visitor:
    """One person's browser: every request of it elsewhere, every window and dialog is kept."""

    def __init__(self, browser: Any, url: str) -> None:  # noqa: ANN401 - a Playwright browser
        self.url = url
        self.context = browser.new_context(viewport={"width": 1440, "height": 900})
        self.page = self.context.new_page()
        self.foreign: list[str] = []
        self.problems: list[str] = []
        own = (url, "data:", "blob:")
        self.context.on(
            "request", lambda r: None if r.url.startswith(own) else self.foreign.append(r.url)
        )
        self.context.on("page", lambda page: self.problems.append(f"opened {page.url}"))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def sign_in(self, name: str, password: str = PASSWORD) -> None:
        """Go to the page, and fill in the form that is shown instead."""
        self.page.goto(self.url)
        assert self.page.url == f"{self.url}/login"
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Sign in").click()

    def ask(self, question: str) -> None:
        """Ask, and wait for the receipt."""
        box = self.page.locator("#question textarea")
        box.wait_for()
        box.fill(question)
        box.press("Enter")
        self.page.locator("details.receipt").first.wait_for(timeout=90_000)


def test_two_people_sign_in_and_see_what_is_theirs(
    url: str,
    browser: Any,  # noqa: ANN401
    fathom: Fathom,
) -> None:
    anna, ben = Visitor(browser, url), Visitor(browser, url)
    anna.sign_in("anna", "not her password")
    anna.page.get_by_role("alert").wait_for()
    assert "Name or password is wrong" in anna.page.content()
    assert anna.context.cookies() == []
    for visitor, name, other in ((anna, "anna", "ben"), (ben, "ben", "anna")):
        visitor.sign_in(name)
        visitor.page.locator("#documents").get_by_text(f"{name}s-own.md").wait_for()
        assert f"{other}s-own.md" not in visitor.page.content()
        (cookie,) = visitor.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
        assert visitor.page.evaluate("document.cookie") == ""
    anna.ask("What is the harbour fee?")
    assert "35 crowns" in anna.page.locator("ol.citations").inner_text()
    receipts = [r for _, r in _receipts(fathom)]
    assert receipts == ["anna"]

    # what anna's page asks for is not given to ben, even by its exact address
    (hers,) = fathom.for_owner("anna").documents()
    (receipt_id,) = [r for r, _ in _receipts(fathom)]
    for path in (f"/v1/documents/{hers.id}/text", f"/v1/receipts/{receipt_id}"):
        assert anna.context.request.get(f"{url}{path}").status == 200
        assert ben.context.request.get(f"{url}{path}").status == 404

    # what the command line or the API is reading lies where Gradio gives nothing out
    reading = fathom.settings.home / "tmp" / "upload-x" / "0"
    reading.parent.mkdir(parents=True)
    reading.write_text("half read")
    for file in (reading, fathom.settings.home / "fathom.sqlite"):
        assert ben.context.request.get(f"{url}/gradio_api/file={file}").status == 403

    # nor do her conversations stand in his list
    ben.page.reload()
    ben.page.locator("#account").get_by_text("ben").wait_for()
    ben.page.locator("#documents").get_by_text("bens-own.md").wait_for()
    assert "harbour" not in ben.page.content()
    assert len(fathom.for_owner("anna").conversations.all()) == 1
    assert fathom.for_owner("ben").conversations.all() == fathom.conversations.all() == []

    # signing out and losing the account end the session at once
    anna.page.get_by_role("button", name="Sign out").click()
    anna.page.get_by_label("Password").wait_for()
    assert anna.page.url == f"{url}/login"
    assert anna.context.request.get(f"{url}/v1/documents").status == 401
    fathom.accounts.remove("ben")
    ben.page.goto(url)
    assert ben.page.url == f"{url}/login"
    assert ben.context.request.get(f"{url}/v1/documents").status == 401
    assert anna.foreign == ben.foreign == []
    assert anna.problems == ben.problems == []


def test_whatever_is_said_no_request_leaves_and_nothing_runs(
    url: str,
    browser: Any,  # noqa: ANN401
    fathom: Fathom,
) -> None:
    key = fathom.accounts.make_key("anna")
    for number, payload in enumerate(PAYLOADS):
        # in the text, and as far as a file name can hold it, in the title
        name = f"{number} {payload}".replace("/", "∕").replace("\n", " ")[:120] + ".txt"
        sent = httpx.post(
            f"{url}/v1/documents",
            files=[("files", (name, f"{payload}\n\nThe harbour fee is {number} crowns.\n"))],
            data={"collection": payload.replace("\n", " ").replace("\t", " ")[:100]}
            if payload.isprintable()
            else {},
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert sent.status_code == 201, sent.text
    anna = Visitor(browser, url)
    anna.sign_in("anna")
    page = anna.page
    page.locator("#documents label").nth(len(PAYLOADS)).wait_for()
    title = page.title()
    anna.ask(f"What is the harbour fee? {PAYLOADS[0]} {PAYLOADS[7]}")
    # every payload stands there, as text
    shown = page.locator("#conversation").inner_text()
    assert "document.title='owned'" in shown
    page.get_by_role("button", name="Ask").first.wait_for()
    if page.locator("#places label").count():
        page.locator("#places label").first.click()
        page.locator("figure.evidence").wait_for()
    for tab in page.get_by_role("tab").all():
        tab.click()
        page.wait_for_timeout(300)
    page.get_by_role("tab").first.click()
    page.wait_for_timeout(1_000)
    dangerous = (
        "img:not([src^='/documents/']), a[href], iframe, object, embed, form, svg use, script"
    )
    inside = page.locator(f"#conversation :is({dangerous}), #documents :is({dangerous})")
    assert [element.evaluate("e => e.outerHTML") for element in inside.all()] == []
    assert (
        page.locator("[onerror], [onload], [onfocus], [ontoggle], meta[http-equiv=refresh]").count()
        == 0
    )
    assert page.title() == title
    assert page.url.startswith(url)
    assert anna.foreign == []
    assert anna.problems == []


def _receipts(fathom: Fathom) -> list[tuple[str, str]]:
    """Return the id and the owner of every answer."""
    with fathom.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT id, owner FROM answer")
        return [(row.id, row.owner) for row in rows]
