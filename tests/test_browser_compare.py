"""Limits and thrift, comparisons of tables and their reports, in a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from served_page import (
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


def test_thrift_is_one_dial_in_two_places_and_the_receipt_names_it(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Limits").click()
    page.locator(".spent h2").wait_for(timeout=60_000)
    page.get_by_text("one that thrift decides").wait_for()
    dial = page.locator("#thrift-limits input[type=range]")
    dial.focus()
    page.keyboard.press("End")
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#thrift input[type=number]")).to_have_value("0.05")
    ask(page, "What is the harbour fee compared with that of the quay?")
    page.locator("details.receipt summary").click()
    page.get_by_text("thrift 0.05", exact=False).wait_for()
    assert complaints(page) == []
    number = page.locator("#thrift input[type=number]")
    number.fill("0.02")
    number.press("Tab")
    page.get_by_role("tab", name="Limits").click()
    page.get_by_text("Reckoned from 1 question of yours").wait_for(timeout=60_000)
    page.get_by_text("At 0.02").wait_for(timeout=60_000)
    assert complaints(page) == []
    page = _another(page)
    expect(page.locator("#thrift input[type=number]")).to_have_value("0.02", timeout=60_000)
    page.get_by_role("tab", name="Limits").click()
    expect(page.locator("#thrift-limits input[type=number]")).to_have_value("0.02", timeout=60_000)
    page.get_by_text("At 0.02").wait_for(timeout=60_000)
    kept = "localStorage.setItem('fathom x', '%s'), fathom.kept('x', 0.001, 0.05)"
    found = [page.evaluate(kept % value) for value in ("0.04", "0", "", "much", "7", "-1")]
    assert found == [0.04, 0, 0.001, 0.001, 0.001, 0.001]


@pytest.mark.parametrize("size", [DESK, PHONE])
@pytest.mark.parametrize("dark", [False, True])
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
    name = f"{'phone' if size is PHONE else 'desk'}-{'dark' if dark else 'light'}"
    shoot(page, f"{name}-limits-calibrated")
    model = page.get_by_label("Model")
    for name, said in (
        ("smollm2-135m", "smollm2-135m: effective length not measurable"),
        ("llama-3.1-8b", "not calibrated yet"),
    ):
        model.fill(name)
        model.press("Enter")
        page.get_by_text(said).wait_for(timeout=60_000)
        assert complaints(page) == []


def test_a_table_of_questions_is_compared_stopped_and_its_report_opens(
    pages: Watched, tmp_path: Path
) -> None:
    page = pages.open(DESK)
    _to_the_table(page)
    page.locator(".comparisons .empty").wait_for()
    assert complaints(page) == []
    shoot(page, "compare-table-empty")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save a template").click()
    template = Path(saving.value.path()).read_text()
    assert template.startswith("id,question,document,answers,answerable")
    assert "handbook.md" in template

    # every fault is named, and nothing begins
    upload = page.locator("#questions input[type=file]")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("id,question,document\na,,x\na,Who?,x\n")
    upload.set_input_files(wrong)
    page.locator(".faults").get_by_text("line 3: id").wait_for()
    assert page.get_by_role("button", name="Compare them all").is_disabled()
    assert complaints(page) == []
    shoot(page, "compare-table-faults")

    # a long one: stopped, gone on with, deleted
    upload.set_input_files(_table(tmp_path / "long.csv", 120))
    page.get_by_text("120 questions about 1 document").wait_for()
    go = page.get_by_role("button", name="Compare them all")
    go.focus()
    page.keyboard.press("Enter")
    page.get_by_role("progressbar").wait_for()
    shoot(page, "compare-table-running")
    assert complaints(page) == []
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped after").wait_for(timeout=60_000)
    go.wait_for()
    page.get_by_role("button", name="Go on with long.csv").click()
    page.get_by_role("progressbar").wait_for()
    page.close()  # it goes on without the page
    page = pages.open(DESK)
    upload = page.locator("#questions input[type=file]")
    go = page.get_by_role("button", name="Compare them all")
    _to_the_table(page)
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped after").wait_for(timeout=60_000)
    page.get_by_label("Delete long.csv").click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_text("The comparison is deleted.").wait_for()

    # a short one, to its report
    upload.set_input_files(_table(tmp_path / "short.csv", 2))
    page.get_by_text("2 questions about 1 document").wait_for()
    go.click()
    page.get_by_role("progressbar").wait_for()
    opening = page.get_by_role("button", name="Open the report of short.csv")
    page.get_by_role("progressbar").wait_for(state="detached", timeout=120_000)
    opening.focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Verdict").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Close"
    page.wait_for_function(
        "[...document.querySelectorAll('.report img')].every(i => i.naturalWidth > 300)"
    )
    assert page.locator(".report img").count() >= 1
    assert page.locator(".report a").count() == 0
    assert complaints(page) == []
    shoot(page, "compare-report")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save as JSON").click()
    assert json.loads(Path(saving.value.path()).read_text())["num_examples"] == 2
    page.get_by_role("button", name="Where they disagree").click()
    page.get_by_role("heading", name="where the ways to answer disagree").wait_for()
    page.get_by_text("questions that some arms answered rightly").wait_for()
    assert page.locator(".report :is(a, script)").count() == 0
    assert complaints(page) == []
    shoot(page, "compare-failures")
    page.get_by_role("button", name="Back to the report").click()
    page.get_by_role("heading", name="Verdict").wait_for()
    page.keyboard.press("Escape")
    page.locator(".report").wait_for(state="detached")
    assert opening.evaluate("button => button === document.activeElement")

    for size, dark in ((PHONE, True), (PHONE, False), (DESK, True)):
        page = pages.open(size, dark=dark)
        _to_the_table(page)
        opening = page.get_by_role("button", name="Open the report of short.csv")
        opening.wait_for()
        assert complaints(page) == []
        opening.click()
        page.get_by_role("heading", name="Verdict").wait_for()
        assert complaints(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        name = f"{'phone' if size is PHONE else 'desk'}-{'dark' if dark else 'light'}"
        shoot(page, f"{name}-report")
        page.get_by_role("button", name="Where they disagree").click()
        page.get_by_role("heading", name="where the ways to answer disagree").wait_for()
        assert complaints(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        shoot(page, f"{name}-failures")


def test_a_table_dropped_on_compare_finds_its_place(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-question textarea").wait_for()
    for number in (1, 2):  # from the other part of the tab, and from its own
        page.evaluate(
            """(number) => {
              const transfer = new DataTransfer();
              const rows = Array(number).fill().map((_, n) => `q${n},What is it?,handbook.md,it`);
              const table = ["id,question,document,answers", ...rows].join("\\n");
              transfer.items.add(new File([table], `dropped-${number}.csv`));
              for (const [kind, at] of [["dragenter", "#compare-kinds"], ["drop", ".veil"]]) {
                document.querySelector(at).dispatchEvent(new DragEvent(
                  kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
              }
            }""",
            number,
        )
        page.get_by_text(f"dropped-{number}.csv: {number} question").wait_for()
        expect(page.get_by_role("button", name="Compare them all")).to_be_enabled(timeout=60_000)
    page.get_by_role("tab", name="One question").click()
    page.locator("#compare-question").wait_for()


def _another(page: Any) -> Any:  # noqa: ANN401 - Playwright pages
    """Return a new page in the same browser."""
    another = page.context.new_page()
    another.goto(page.url)
    another.locator("#question textarea").wait_for()
    return another


def _to_the_table(page: Any) -> None:  # noqa: ANN401 - a Playwright page
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("tab", name="A table of questions").click()


def _table(path: Path, num_questions: int) -> Path:
    rows = [
        f"q{n},What is fee {n} of the harbour?,handbook.md,35 crowns" for n in range(num_questions)
    ]
    path.write_text("\n".join(["id,question,document,answers", *rows]))
    return path
