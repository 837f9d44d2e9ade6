"""Files and tables given to the page in a real browser: queued, by folder, dropped, in batches."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from served_page import (
    CHROMIUM,
    DESK,
    PHONE,
    TINY,
    Watched,
    begin,
    complaints,
    served,
    shoot,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
REPLY = "The harbour fee is 35 crowns a night." + " And whoever is late pays more" * 10


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a library that holds the handbook, with the tiny model."""
    with served(TINY, tmp_path_factory.mktemp("home"), REPLY) as address:
        yield address


def test_files_given_while_others_are_read_are_read_too(pages: Watched, tmp_path: Path) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Library").click()
    page.locator(".documents").get_by_role("button", name="handbook.md").wait_for()
    names = [f"notes-{number}.txt" for number in range(4)]
    for number, name in enumerate(names):
        path = tmp_path / name
        path.write_text(f"Note {number} on the berths of the quay.\n" * 4_000)
        page.locator("#library-files input[name=files]").set_input_files(path)
    for name in names:
        page.locator(".documents").get_by_role("button", name=name).wait_for(timeout=60_000)


def test_a_folder_keeps_its_paths_and_a_second_upload_makes_versions(
    pages: Watched, tmp_path: Path
) -> None:
    for name, words in (("docs", "berths"), ("src", "pilots"), (".git", "hidden")):
        inner = tmp_path / "harbour" / name
        inner.mkdir(parents=True)
        (inner / "README.md").write_text(f"# {name}\n\nAll about {words}.\n")
    page = pages.open(DESK)
    page.get_by_role("tab", name="Library").click()
    page.locator("#into textarea, #into input").fill("harbours")
    folder = page.locator("#library-files input[name=folder]")
    lots = page.locator("#library-files .note section")
    folder.set_input_files(tmp_path / "harbour")
    lots.get_by_text("2 documents read.").wait_for(timeout=60_000)
    (tmp_path / "harbour" / "src" / "README.md").write_text("# src\n\nAll about moorings.\n")
    folder.set_input_files(tmp_path / "harbour")
    lots.get_by_text("harbour/src/README.md: version 2").wait_for(timeout=60_000)
    page.locator("#find textarea, #find input").fill("harbours readme")
    page.wait_for_function("document.querySelectorAll('.documents tbody tr').length === 2")
    rows = [
        (row.locator("button").inner_text(), row.locator("td").nth(4).inner_text())
        for row in page.locator(".documents tbody tr").all()
    ]
    assert sorted(rows) == [("harbour/docs/README.md", "1"), ("harbour/src/README.md", "2")]


def test_a_folder_dropped_from_outside_keeps_its_paths(pages: Watched, tmp_path: Path) -> None:
    """Chromium is told of a drag from the desktop: the page gets real entries of real folders."""
    log = tmp_path / "ship" / "log"
    log.mkdir(parents=True)
    (tmp_path / "ship" / ".git").mkdir()
    for name in ("ship/crew.md", "ship/log/crew.md", "ship/.git/crew.md", "alone.md"):
        (tmp_path / name).write_text(f"# {name}\n\nAll about the crew of {name}.\n")
    for number in range(120):  # a folder is listed in pieces of 100
        (log / f"day-{number}.txt").write_text(f"Day {number}: nothing new.\n")
    page = pages.open(DESK)
    page.get_by_role("tab", name="Library").click()
    page.locator(".documents").get_by_role("button", name="handbook.md").wait_for()
    devtools = page.context.new_cdp_session(page)
    dropped = [str(tmp_path / "ship"), str(tmp_path / "alone.md")]
    drag = {"items": [], "files": dropped, "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 700, "y": 400, "data": drag}
        devtools.send("Input.dispatchDragEvent", event)
        if kind == "dragEnter":
            page.locator(".veil").wait_for()
    page.locator(".veil").wait_for(state="hidden")
    lots = page.locator("#library-files .note section")
    page.wait_for_function(
        "[...document.querySelectorAll('#library-files .note [role=status]')]"
        ".map(told => parseInt(told.innerText)).reduce((a, b) => a + b, 0) === 123",
        timeout=120_000,
    )
    for name in ("ship/crew.md", "ship/log/crew.md", "ship/log/day-119.txt", "alone.md"):
        lots.get_by_text(f"{name}: added as document").wait_for(state="attached")
    assert lots.get_by_text(".git").count() == 0


def test_files_dropped_anywhere_while_an_answer_is_written(pages: Watched) -> None:
    page = pages.open(DESK)
    begin(page, "What is the harbour fee?")
    page.locator(".answer").wait_for(timeout=60_000)
    page.evaluate(
        """() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(["Ebb is at six.\\n".repeat(40)], "ebb.txt"));
          const send = (target, kind) => target.dispatchEvent(
            new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: transfer }));
          window.drag = (kind, selector) => send(document.querySelector(selector), kind);
          drag("dragenter", "#conversation");
        }"""
    )
    page.get_by_text("Drop to add").wait_for()
    shoot(page, "chat-drop")
    page.evaluate("drag('drop', '.veil')")
    page.locator(".veil").wait_for(state="hidden")
    page.get_by_text("ebb.txt: added as document").wait_for(timeout=60_000)
    page.locator("#documents").get_by_text("ebb.txt").wait_for()
    page.locator("details.receipt").wait_for(timeout=60_000)
    assert "pays more" in page.locator(".answer").inner_text()


def test_a_table_is_checked_asked_left_alone_stopped_gone_on_with_saved_and_deleted(
    pages: Watched, tmp_path: Path
) -> None:
    path = tmp_path / "due diligence.csv"
    path.write_text(
        "id,question,document\n"
        "fee,What is the harbour fee?,handbook.md\n"
        "lost,Where is the log?,no-such-file.pdf\n"
        + "".join(f"fee-{n},What is the fee of quay {n}?,handbook.md\n" for n in range(118))
    )
    page = pages.open(DESK)
    page.get_by_role("tab", name="Batch").click()
    page.get_by_role("heading", name="A table of questions").wait_for()
    assert complaints(page) == []
    shoot(page, "batch-empty")
    given = page.locator("#batch-table input[name=table]")
    given.set_input_files({"name": "x.csv", "mimeType": "text/csv", "buffer": b"a,b\n1,2\n"})
    page.locator("#batch-table").get_by_text("no column 'question'").wait_for()
    given.set_input_files(path)
    shown = page.locator("#batch-shown")
    shown.get_by_text("Not started; 120 rows; 1 cannot be asked").wait_for(timeout=60_000)
    shown.get_by_text("No document 'no-such-file.pdf'").wait_for()
    assert complaints(page) == []
    shoot(page, "batch-checked")
    page.get_by_role("button", name="Start").click()
    answered = shown.get_by_text(re.compile(r"[1-9]\d* of 120 rows answered; .* left"))
    answered.wait_for(timeout=60_000)
    assert complaints(page) == []
    shoot(page, "batch-running")

    page.close()  # it goes on without a page, and is shown again
    page = pages.open(DESK)
    page.get_by_role("tab", name="Batch").click()
    shown = page.locator("#batch-shown")
    answered = shown.get_by_text(re.compile(r"[1-9]\d* of 120 rows answered; .* left"))
    for again in (True, False):
        answered.wait_for(timeout=60_000)
        page.get_by_role("button", name="Stop", exact=True).click()
        shown.get_by_text("Stopped; 120 rows; 1 with a fault").wait_for(timeout=60_000)
        if again:
            page.get_by_role("button", name="Go on").click()
    for kind, suffix in (("XLSX, with links", "xlsx"), ("CSV", "csv"), ("JSON Lines", "jsonl")):
        with page.expect_download() as saving:
            page.get_by_role("button", name=f"Save as {kind}").click()
        assert saving.value.suggested_filename == f"due diligence-answers.{suffix}"
        saved = Path(saving.value.path()).read_bytes()
        assert saved.startswith(b"PK") if suffix == "xlsx" else b"35 crowns" in saved
    shown.get_by_text("Delete", exact=True).click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_role("heading", name="A table of questions").wait_for()
    assert page.locator("#batch .past button").count() == 0


@pytest.mark.parametrize(("size", "dark"), [(PHONE, True), (PHONE, False), (DESK, True)])
def test_the_batches_fit_a_phone_and_need_no_mouse(
    pages: Watched, size: dict[str, int], dark: bool
) -> None:
    page = pages.open(size, dark=dark)
    page.get_by_role("tab", name="Batch").click()
    page.get_by_role("heading", name="A table of questions").wait_for()
    lines = "".join(f'{{"question": "What is fee {n}?", "route": "fast"}}\n' for n in range(3))
    table = {"name": "q.jsonl", "mimeType": "application/jsonl", "buffer": lines.encode()}
    page.locator("#batch-table input[name=table]").set_input_files(table)
    page.get_by_text("Not started; 3 rows; 3 cannot be asked").wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert complaints(page) == []
    shoot(page, f"{'phone' if size is PHONE else 'desk'}-{'dark' if dark else 'light'}-batch")
    page.locator("#batch-table input[name=table]").focus()
    outline = "getComputedStyle(document.querySelector('#batch-table .drop')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.get_by_role("button", name="Start").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Done; 3 rows; 3 with a fault").wait_for(timeout=60_000)
    assert complaints(page) == []
    page.locator("#batch-shown").get_by_text("Delete", exact=True).click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_role("heading", name="A table of questions").wait_for()
