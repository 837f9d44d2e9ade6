"""Limits and thrift, comparisons of tables and their reports, in a real browser."""

from collections.abc import Iterator
from typing import Any

import pytest

from served_page import (
    ARGUMENTS,
    CHROMIUM,
    DESK,
    PHONE,
    TINY,
    Watched,
    ask,
    complaints,
    served,
    shoot,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
REPLY = "The harbour fee is 35 crowns a night. Children under ten pay nothing."
# One model that was measured, one that answers too little to be, by the names that Limits gives.
CALIBRATED = """
from eval.judge_calibration import judge
from eval.synthetic import Task
for name, right in (("qwen2.5-coder-0.5b", 1.0), ("smollm2-135m", 0.0)):
    records = [
        {"tokens": length, "prefill_seconds": 1.0, "predicted_seconds": 1.0, "rows": [
            {"task": Task.LITERAL, "depth": 0.1 + 0.2 * part, "likeliest": None,
             "score": right * float(part != 2 or length < 2048)}
            for part in range(5)
        ] * 4}
        for length in (512, 1024, 2048)
    ]
    library.calibrations.save_effective_length(judge(
        records, model=name, model_id=name, seed=0, filler="own", dtype="16 bits", device="a test"
    ))
serve("""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a library that holds the handbook, with the tiny model and what was calibrated."""
    program = TINY.replace("\nserve(", CALIBRATED)
    with served(program, tmp_path_factory.mktemp("home"), REPLY) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return one browser for all tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def pages(browser: object, url: str) -> Iterator[Watched]:
    """Return pages that may say nothing on the console and ask nobody else."""
    watched = Watched(browser, url)
    yield watched
    watched.close()
    assert watched.problems == []
    assert watched.foreign == []


def test_thrift_is_one_dial_in_two_places_and_the_receipt_names_it(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Limits").click()
    page.locator(".spent h2").wait_for(timeout=60_000)
    page.get_by_text("one that thrift decides").wait_for()
    dial = page.locator("#thrift-limits input[type=range]")
    dial.focus()
    page.keyboard.press("End")
    page.get_by_role("tab", name="Chat").click()
    assert page.locator("#thrift input[type=number]").input_value() == "0.05"
    ask(page, "What is the harbour fee compared with that of the quay?")
    page.locator("details.receipt summary").click()
    page.get_by_text("thrift 0.05", exact=False).wait_for()
    assert complaints(page) == []
    number = page.locator("#thrift input[type=number]")
    number.fill("0.02")
    number.press("Tab")
    page.get_by_role("tab", name="Limits").click()
    page.get_by_text("Reckoned from 1 question of yours").wait_for(timeout=60_000)
    page.get_by_text("At 0.02").wait_for()
    assert complaints(page) == []


@pytest.mark.parametrize(("size", "dark"), [(DESK, False), (PHONE, True)])
def test_a_calibration_is_shown_by_length_and_depth(
    pages: Watched, size: dict[str, int], dark: bool
) -> None:
    page = pages.open(size, dark=dark)
    page.get_by_role("tab", name="Limits").click()
    page.get_by_role("img", name="Lookups right by length").wait_for(timeout=60_000)
    page.get_by_text("As a table").click()
    table = page.locator("table.figures")
    assert table.locator("tbody tr").count() == 5
    assert table.get_by_role("cell", name="0% of 4", exact=True).count() == 1
    assert complaints(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    shoot(page, f"limits-calibrated{'-phone-dark' if dark else ''}")
    model = page.get_by_label("Model")
    for name, said in (
        ("smollm2-135m", "smollm2-135m: effective length not measurable"),
        ("llama-3.1-8b", "not calibrated yet"),
    ):
        model.fill(name)
        model.press("Enter")
        page.get_by_text(said).wait_for(timeout=60_000)
        assert complaints(page) == []
