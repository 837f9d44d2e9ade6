"""The pages in a real browser: each tab, a phone, a keyboard, and nothing that leaves the house."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import HANDBOOK
from served_page import CHROMIUM, DESK, PHONE, TINY, Watched, ask, begin, complaints, served, shoot

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
REPLY = (
    "The harbour fee is 35 crowns a night. Children under ten pay nothing."
    " ![x](http://evil.example/x.png) www.evil.example"
    + " and whoever is late pays a little more" * 6
    + " indeed"
)
QUESTION = "What is the harbour fee?"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a library that holds the handbook, with the tiny model."""
    with served(TINY, tmp_path_factory.mktemp("home"), REPLY) as address:
        yield address


def test_a_foreign_host_name_gets_nothing(url: str) -> None:
    asked = urllib.request.Request(f"{url}/config", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked, timeout=10)
    with caught.value as refused:
        assert refused.code == 400
    own = urllib.request.Request(f"{url}/config", headers={"Host": "localhost:80"})
    with urllib.request.urlopen(own, timeout=10) as answer:
        assert answer.status == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_an_answer_its_receipt_its_places_and_another_route_beside_it(pages: Watched) -> None:
    page = pages.open(DESK)
    shoot(page, "chat-empty")
    assert complaints(page) == []
    page.get_by_label("handbook.md").check()
    ask(page, f"{QUESTION} ![q](http://evil.example/q.png)")
    assert page.locator("#conversation :is(img, a)").count() == 0
    page.get_by_text("![x](http://evil.example/x.png)").first.wait_for()
    page.locator("details.receipt summary").click()
    page.get_by_text("equal to the byte").wait_for()
    page.get_by_text("handbook.md: ").wait_for()

    chip = page.get_by_role("button", name="Citation 1: handbook.md, Fees")
    chip.focus()
    page.keyboard.press("Enter")
    page.locator(".evidence").wait_for()
    assert "35 crowns" in page.locator(".evidence mark").inner_text()
    assert "Children under ten" in page.locator(".evidence").inner_text()
    assert page.evaluate("document.activeElement.textContent") == "Close"
    assert complaints(page) == []
    shoot(page, "chat-evidence")
    page.keyboard.press("Escape")
    page.locator(".evidence").wait_for(state="detached")
    assert chip.evaluate("button => button === document.activeElement")

    page.get_by_role("button", name="retrieval", exact=True).click()
    page.locator(".card").nth(1).locator("details.receipt").wait_for(timeout=60_000)
    assert page.locator(".turn").count() == 1
    assert page.locator("details.receipt").first.evaluate("fold => fold.open")  # it was left open
    first, second = (page.locator(".card").nth(n).bounding_box() for n in (0, 1))
    assert first["y"] == second["y"]
    assert second["x"] > first["x"] + first["width"] - 1
    shoot(page, "chat-side-by-side")


@pytest.mark.parametrize("size", [DESK, PHONE])
def test_a_long_list_of_documents_goes_down_and_not_sideways(
    pages: Watched, size: dict[str, int]
) -> None:
    page = pages.open(size)
    page.get_by_label("handbook.md").wait_for()
    boxes = page.locator("#documents").get_by_test_id("checkbox-group")
    wide, width, tall, height = boxes.evaluate(
        """list => {
            const one = list.querySelector("label");
            const more = Array.from({length: 40}, () => one.cloneNode(true));
            list.append(...more);
            const {scrollWidth, clientWidth, scrollHeight, clientHeight} = list;
            more.forEach(label => label.remove());
            return [scrollWidth, clientWidth, scrollHeight, clientHeight];
        }"""
    )
    assert wide <= width
    assert tall > 2 * height


def test_nothing_moves_while_an_answer_is_written_and_stop_stops(pages: Watched) -> None:
    page = pages.open(DESK)
    ask(page, QUESTION)
    page.evaluate(
        "window.shift = 0; new PerformanceObserver(list => list.getEntries().forEach("
        "e => shift += e.hadRecentInput ? 0 : e.value)).observe({type: 'layout-shift'})"
    )
    begin(page, "How many berths has the quay?")
    page.locator(".turn").nth(1).locator(".answer").wait_for(timeout=60_000)
    place = page.locator(".turn").nth(1).locator(".question").bounding_box()
    composer = page.locator("#question").bounding_box()
    page.evaluate(  # the word may stand for a moment only
        "new MutationObserver(() => { window.said ||= document.querySelector('#stop').innerText })"
        ".observe(document.querySelector('#stop'), {subtree: true, childList: true,"
        " characterData: true})"
    )
    page.get_by_role("button", name="Stop").click()
    page.locator("details.receipt").nth(1).wait_for(timeout=60_000)
    page.locator("#ask").wait_for()
    assert page.evaluate("said") == "Stopping"
    assert "indeed" not in page.locator(".turn").nth(1).locator(".answer").inner_text()
    assert page.locator(".turn").nth(1).locator(".question").bounding_box() == place
    assert page.locator("#question").bounding_box() == composer
    assert page.evaluate("shift") < 0.01


def test_files_are_added_while_an_answer_is_written(pages: Watched, tmp_path: Path) -> None:
    page = pages.open(DESK)
    path = tmp_path / "tides.txt"
    path.write_text("High water is at noon. Low water is at six.\n" * 40)
    begin(page, QUESTION)
    page.locator(".answer").wait_for(timeout=60_000)
    page.locator("#upload input[name=files]").set_input_files(path)
    page.get_by_text("tides.txt: added as document").wait_for(timeout=60_000)
    page.locator("#documents").get_by_text("tides.txt").wait_for()
    page.locator("details.receipt").wait_for(timeout=60_000)
    shoot(page, "chat-uploaded")


def test_conversations_are_found_opened_renamed_saved_and_deleted(pages: Watched) -> None:
    page = pages.open(DESK)
    ask(page, "Where does the pilot boat lie?")
    page.get_by_text("Manage").click()
    page.get_by_label("Title").fill("Pilots & <b>berths</b>")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Pilots & <b>berths</b>").wait_for()
    page.get_by_text("Manage").click()
    shoot(page, "chat-manage")
    assert complaints(page) == []
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save as Markdown").click()
    saved = Path(saving.value.path()).read_text()
    assert saving.value.suggested_filename == "Pilots-b-berths-b.md"
    assert saved.startswith("# Pilots & <b>berths</b>\n\n## Where does the pilot boat lie?")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save as JSON").click()
    exchanges = json.loads(Path(saving.value.path()).read_text())["exchanges"]
    assert exchanges[0]["question"] == "Where does the pilot boat lie?"

    page.set_viewport_size({"width": 1440, "height": 500})  # the list stays below what is above it
    side, past = (page.locator(at).bounding_box() for at in ("#side", "#past"))
    assert past["x"] + past["width"] <= side["x"] + side["width"]
    page.set_viewport_size(DESK)

    page.get_by_role("button", name="New conversation").click()
    page.locator(".empty").wait_for()
    page.locator("#search textarea, #search input").fill("PILOT")
    found = page.locator(".past li button")
    found.get_by_text("Pilots & <b>berths</b>").wait_for()
    page.wait_for_function("document.querySelectorAll('.past li').length === 1")
    found.first.click()
    page.get_by_role("heading", name="Where does the pilot boat lie?").wait_for()
    page.get_by_text("Manage").click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_text("None holds these words.").wait_for()
    page.locator(".empty").wait_for()


def test_the_library_adds_looks_into_checks_and_deletes(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Library").click()
    page.locator(".documents").get_by_role("button", name="handbook.md").wait_for()
    for words in ("The first log.\n", "The second log, a longer one.\n"):  # while that is read
        log = {"name": "log.txt", "mimeType": "text/plain", "buffer": words.encode() * 100}
        empty = {"name": "empty.bin", "mimeType": "text/plain", "buffer": b""}
        page.locator("#library-files input[name=files]").set_input_files([log, empty])
    lots = page.locator("#library-files .note section")  # the latest first
    for words, outcome in (("added as", lots.nth(1)), ("version 2", lots.nth(0))):
        outcome.get_by_text("1 document read, 1 not.").wait_for(timeout=60_000)
        outcome.get_by_text(f"log.txt: {words}").wait_for()
        outcome.get_by_text("empty.bin is empty").wait_for()
    page.locator("#find textarea, #find input").fill("LOG")
    page.wait_for_function("document.querySelectorAll('.documents tbody tr').length === 1")
    page.locator(".documents").get_by_role("button", name="log.txt").click()
    panel = page.locator("figure.document")
    panel.get_by_text("characters 0 to 1,600 of 3,000").wait_for()
    panel.get_by_role("button", name="Later").click()
    panel.get_by_text("characters 1,600 to 3,000 of 3,000").wait_for()
    assert complaints(page) == []
    shoot(page, "library-document")
    panel.get_by_role("button", name="version 1").click()
    panel.get_by_text("The first log.").wait_for()
    for version in ("version 1", "version 2"):
        if version == "version 2":
            page.locator(".documents").get_by_role("button", name="log.txt").click()
        panel.get_by_text("Delete", exact=True).click()
        number = panel.get_by_role("button", name="for good").get_attribute("data-document")
        panel.get_by_role("button", name="for good").click()
        panel.wait_for(state="detached")
        page.get_by_text(f"Document {number} is deleted").wait_for()
    page.get_by_text("documents is called that").wait_for()
    page.locator("#find textarea, #find input").fill("")
    page.locator(".documents").get_by_role("button", name="handbook.md").click()
    panel.get_by_text("Outline: 4 headings").click()
    panel.get_by_role("button", name="Fees").click()
    panel.get_by_text(f"characters {HANDBOOK.index('## Fees')} to").wait_for()
    page.get_by_role("button", name="Check the library").click()
    page.get_by_text("All agrees.").wait_for(timeout=60_000)


def test_an_address_within_the_house_is_not_fetched(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Library").click()
    page.get_by_label("Web address").fill(f"{pages.url}/config")
    page.get_by_role("button", name="Fetch").click()
    page.get_by_text("leads to a private address").wait_for(timeout=30_000)


def test_one_question_goes_every_route(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Compare").click()
    shoot(page, "compare-empty")
    page.locator("#compare-question textarea").fill(QUESTION)
    page.locator("#compared").get_by_label("Documents").click()
    page.get_by_role("option", name="handbook.md").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#comparison details.receipt").nth(2).wait_for(timeout=90_000)
    page.get_by_role("button", name="Compare", exact=True).wait_for()
    names = page.locator("#comparison h3.route").all_inner_texts()
    assert names == ["Full", "Retrieval", "Scan"]
    for number, name in enumerate(names):
        receipt = page.locator("#comparison details.receipt").nth(number)
        assert f"How this was read: {name}" in receipt.inner_text()
    page.locator("#comparison .chip").first.click()
    page.locator(".evidence mark").wait_for()
    assert complaints(page) == []
    shoot(page, "compare")


def test_limits_follow_their_dials(pages: Watched) -> None:
    page = pages.open(DESK)
    page.get_by_role("tab", name="Limits").click()
    page.locator(".fits.passed").wait_for(timeout=60_000)
    assert page.locator(".plot svg").count() >= 1
    assert complaints(page) == []
    page.get_by_label("Device memory, GiB").fill("0.5")
    page.get_by_label("Device memory, GiB").press("Enter")
    page.get_by_text("32,768 tokens does not fit.").wait_for()
    page.locator(".memory .bar.failed").wait_for()
    model = page.get_by_label("Model")
    model.fill("llama-3.1-8b")
    model.press("Enter")
    page.get_by_text("that llama-3.1-8b can read here").wait_for(timeout=60_000)
    page.get_by_label("Device memory, GiB").fill("24")
    page.get_by_label("Device memory, GiB").press("Enter")
    page.get_by_text("4,096.0 MiB").first.wait_for()  # 32 layers, 8 heads of 128, 2 bytes, K and V
    model.fill("no-such-model")
    model.press("Enter")
    page.get_by_text("is neither in the catalog").wait_for()
    shoot(page, "limits-error")


@pytest.mark.parametrize("tab", ["Library", "Compare", "Limits"])
def test_the_other_tabs_fit_a_phone_in_the_dark(pages: Watched, tab: str) -> None:
    page = pages.open(PHONE, dark=True)
    page.get_by_role("tab", name=tab).click()
    shown = {"Library": ".documents", "Compare": ".empty h2", "Limits": ".fits"}[tab]
    page.locator(shown).locator("visible=true").first.wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert complaints(page) == []
    shoot(page, f"phone-dark-{tab.lower()}")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_all_in_one_column(pages: Watched, dark: bool) -> None:
    page = pages.open(PHONE, dark=dark)
    name = "phone-dark" if dark else "phone"
    shoot(page, f"{name}-empty")
    page.get_by_label("handbook.md").check()
    ask(page, QUESTION)
    page.locator("details.receipt summary").click()
    shoot(page, f"{name}-answer")
    assert complaints(page) == []
    page.locator(".chip").first.click()
    page.locator(".evidence").wait_for()
    shoot(page, f"{name}-evidence")
    assert complaints(page) == []
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="retrieval", exact=True).click()
    page.locator(".card").nth(1).locator("details.receipt").wait_for(timeout=60_000)
    first, second = (page.locator(".card").nth(n).bounding_box() for n in (0, 1))
    assert second["y"] > first["y"] + first["height"] - 1
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
