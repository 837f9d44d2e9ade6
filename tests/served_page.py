"""The real application in a process of its own, and a browser that minds what the page does."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

ROOT = Path(__file__).resolve().parents[1]
ARTEFACTS = ROOT / "artefacts"
CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
WCAG_AA = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

# The tiny model reads and writes, but what it says is given, word by word and not too fast.
TINY = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from conftest import HANDBOOK, HashEmbedder, make_tiny_engine
from rag.lm.engine import GenerationDone, TextPiece
from rag.settings import Settings
from ui.app import serve
from ui.assembly import Fathom
class Scripted:
    def __init__(self, engine, reply):
        self._engine, self._reply = engine, reply
    def __getattr__(self, name):
        return getattr(self._engine, name)
    def generate(self, *arguments, stop, **options):
        steps = list(self._engine.generate(*arguments, stop=stop, **options))
        yield from (step for step in steps if not isinstance(step, (TextPiece, GenerationDone)))
        for word in self._reply.split(" "):
            if stop.is_set():
                break
            time.sleep(0.02)
            yield TextPiece(word + " ")
        yield steps[-1]
settings = Settings(home=Path(sys.argv[3]), max_new_tokens=16, kv_reserve_bytes=0)
engine = Scripted(make_tiny_engine(), sys.argv[5])
library = Fathom(settings, embedder=HashEmbedder(), engine=engine)
handbook = settings.home / "handbook.md"
handbook.parent.mkdir(parents=True, exist_ok=True)
handbook.write_text(HANDBOOK)
library.ingest(handbook, source="upload:handbook.md")
serve(library, "127.0.0.1", int(sys.argv[4]))
"""


@contextmanager
def served(program: str, home: Path, *more: str) -> Iterator[str]:
    """Run a program that serves the page; yield its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(ROOT), str(ROOT / "tests"), str(home), str(port), *more]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments])
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            try:
                with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
                    assert answer.read() == b'{"ok":true}'
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        else:
            pytest.fail("the server did not answer")
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Watched:
    """Pages of one browser; every complaint of theirs and every request elsewhere is kept."""

    def __init__(self, browser: Any, url: str) -> None:  # noqa: ANN401 - a Playwright browser
        self._browser, self.url = browser, url
        self._contexts: list[Any] = []
        self.problems: list[str] = []
        self.foreign: list[str] = []

    def open(self, size: dict[str, int], *, dark: bool = False) -> Any:  # noqa: ANN401 - a Playwright page
        """Return a new page at the application, in a session of its own."""
        context = self._browser.new_context(
            viewport=size, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        own = (self.url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else self.foreign.append(r.url))
        page.goto(f"{self.url}/?__theme={'dark' if dark else 'light'}")
        page.locator("#question textarea").wait_for()
        page.locator("#documents label, .empty").first.wait_for()
        return page

    def _heard(self, message: Any) -> None:  # noqa: ANN401 - a Playwright message
        if message.type == "error":
            self.problems.append(message.text)

    def tell(self, name: str) -> None:
        """Print and keep what the pages of a failed test show."""
        shown = [page for context in self._contexts for page in context.pages]
        for number, page in enumerate(shown):
            shoot(page, f"failed-{name}-{number}")
            sys.stdout.write(f"{page.url}\n{page.locator('body').inner_text()}\n")
        sys.stdout.write("\n".join(self.problems))

    def close(self) -> None:
        """Close what was opened."""
        for context in self._contexts:
            context.close()


def ask(page: Any, question: str) -> None:  # noqa: ANN401 - a Playwright page
    """Ask, and wait until the answer is whole."""
    before = page.locator("details.receipt").count()
    begin(page, question)
    page.locator("details.receipt").nth(before).wait_for(timeout=90_000)
    page.locator("#ask").wait_for()


def begin(page: Any, question: str) -> None:  # noqa: ANN401 - a Playwright page
    """Ask, and wait for nothing."""
    box = page.locator("#question textarea")
    box.fill(question)
    box.press("Enter")


def complaints(page: Any) -> list[str]:  # noqa: ANN401 - a Playwright page
    """Return what axe-core finds against WCAG A and AA on the page as it is."""
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": WCAG_AA}})
    return [
        f"{violation['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
        for violation in found.response["violations"]
        for node in violation["nodes"]
    ]


def shoot(page: Any, name: str) -> None:  # noqa: ANN401 - a Playwright page
    """Keep a picture for people to look at."""
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=str(ARTEFACTS / f"{name}.png"))
