"""What is asked while Gradio's stream of events ends is answered all the same."""

from collections.abc import Iterator

import pytest

from served_page import CHROMIUM, DESK, TINY, Watched, ask, served

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]

# The end of a stream is on its way until the next event has been sent, as on a slow line.
SLOW_LINE = """
import asyncio
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from ui import app as page
class EndsLate:
    def __init__(self, app):
        self._app, self._sent = app, asyncio.Event()
    async def __call__(self, scope, receive, send):
        path = scope.get("path", "")
        async def late(message):
            body = message.get("body", b"")
            if path.endswith("/queue/data") and b'"msg":"close_stream"' in body:
                await self._sent.wait()
                await asyncio.sleep(0.3)
            await send(message)
            if path.endswith("/queue/join") and message["type"] == "http.response.body":
                self._sent.set()
                await asyncio.sleep(0.5)
                self._sent.clear()
        await self._app(scope, receive, late)
build = page.build_app
def build_app(*arguments, **options):
    app = build(*arguments, **options)
    app.add_middleware(EndsLate)
    return app
page.build_app = build_app
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a library that holds the handbook over a line on which ends come late."""
    reply = "The harbour fee is 35 crowns a night."
    with served(SLOW_LINE + TINY, tmp_path_factory.mktemp("home"), reply) as address:
        yield address


def test_what_is_asked_while_the_stream_ends_is_answered(pages: Watched) -> None:
    page = pages.open(DESK)
    for _ in range(2):
        ask(page, "What is the harbour fee?")
    assert page.locator("details.receipt").count() == 2
