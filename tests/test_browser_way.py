"""The whole way in a real browser, with a real model and a real PDF."""

from collections.abc import Iterator
from typing import Any

import pytest

from conftest import INGEST_DOCS
from rag.lm.catalog import fetched_models
from rag.settings import Settings
from served_page import ARGUMENTS, CHROMIUM, DESK, Watched, begin, complaints, served, shoot

PDF = INGEST_DOCS / "gao-23-106826-malformed-structure.pdf"
MODEL = "smollm2-135m"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.model,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
    pytest.mark.skipif(not PDF.exists(), reason="no shared data beside the project"),
    pytest.mark.skipif(
        not {MODEL, "all-minilm-l6-v2"} <= {m.name for m in fetched_models(Settings())},
        reason="the models are not fetched: make test",
    ),
]
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from rag.runtime import prepare_process
prepare_process()
from rag.settings import Settings
from ui.app import serve
from ui.assembly import Fathom
settings = Settings(home=Path(sys.argv[3]), model=sys.argv[5], answer_mode="free",
                    max_new_tokens=64, kv_reserve_bytes=0, prefill_deadline_seconds=1e9)
serve(Fathom(settings), "127.0.0.1", int(sys.argv[4]))
"""


@pytest.fixture
def pages(tmp_path: Any) -> Iterator[Watched]:  # noqa: ANN401
    """Return pages of an empty library, which may complain of nothing and ask nobody else."""
    from playwright.sync_api import sync_playwright

    with served(PROGRAM, tmp_path / "home", MODEL) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        watched = Watched(browser, url)
        yield watched
        watched.close()
        browser.close()
    assert watched.problems == []
    assert watched.foreign == []


def test_from_an_empty_library_to_a_page_with_the_cited_words_marked(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_text("No document yet").wait_for()
    shoot(page, "way-1-empty")

    # a real PDF, whose structure is damaged
    page.locator("#upload input[name=files]").set_input_files(PDF)
    page.get_by_text("added as document 1").wait_for(timeout=120_000)
    page.locator("#documents").get_by_text("(2 pages)").wait_for()

    # asked, streamed, cited
    begin(page, "Who can carry out cyberattacks against critical infrastructure?")
    page.locator("details.receipt").wait_for(timeout=240_000)
    page.locator("#ask").wait_for()
    place = page.locator("ol.citations button.place").first
    assert "page" in place.inner_text()

    # the citation opens its page, with the words marked where they stand
    place.click()
    page.locator(".page img").wait_for()
    page.wait_for_function("document.querySelector('.page img').naturalWidth > 600")
    frame = page.locator(".page").bounding_box()
    for box in page.locator(".page .box").all():
        mark = box.bounding_box()
        assert mark is not None
        assert (
            frame["x"] <= mark["x"] < mark["x"] + mark["width"] <= frame["x"] + frame["width"] + 1
        )
        assert frame["y"] <= mark["y"] < frame["y"] + frame["height"]
    assert page.locator(".page .box").count() >= 1
    assert complaints(page) == []
    shoot(page, "way-2-page")
    page.keyboard.press("Escape")

    # another route, stopped
    page.locator("button[data-event=again]").first.click()
    page.get_by_role("button", name="Stop").click()
    page.locator(".card").nth(1).locator("details.receipt").wait_for(timeout=240_000)
    page.locator("#ask").wait_for()
    shoot(page, "way-3-stopped")

    # deleted: no word of it is left in the conversation
    page.get_by_role("tab", name="Library").click()
    page.locator(".documents td button").first.click()
    page.locator("figure.document").get_by_text("Delete", exact=True).click()
    page.get_by_role("button", name="Delete document 1 for good").click()
    page.get_by_text("Document 1 is deleted.").wait_for(timeout=30_000)
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("heading", name="[deleted with its document]").first.wait_for()
    assert "cyberattack" not in page.locator("#conversation").inner_text()
    assert page.locator("button[data-event=again]").count() == 0
    shoot(page, "way-4-deleted")
