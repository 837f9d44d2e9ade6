"""The text read once in windows: every part is read, findings are the text's own words."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest

from conftest import HashEmbedder, fail_to_allocate_once, make_tiny_engine
from rag.answering.scan import (
    FINDING_TOKENS,
    Window,
    cut_windows,
    finding_lines,
    locate,
    named_in,
    window_messages,
)
from rag.answering.service import AnswerReady, RouteChosen
from rag.errors import UnsupportedModelError
from rag.lm.engine import (
    DocumentPrefix,
    GenerationDone,
    GenerationStep,
    PrefillProgress,
    Prompt,
    TextPiece,
)
from rag.lm.local_engine import LocalEngine
from rag.lm.strides import take_apart
from rag.settings import Settings
from rag.types import Document, QuestionClass, Route
from ui.assembly import Fathom

NUM_PARAGRAPHS = 110
QUESTION = "List all ships that carry salt."


def _paragraph(n: int) -> str:
    cargo = "salt" if n % 25 == 7 else "rope"
    return (
        f"The ship number {n} lay at quay {n % 9} for a night. Its cargo was {cargo} of port {n}."
    )


class CopyingEngine(LocalEngine):
    """The tiny model, read for real; what it would write is replaced by lines of its prompt.

    A random model copies nothing. This one copies the sentences that hold a word, invents one that
    stands nowhere in every window, and repeats its first.
    """

    word = "salt"
    is_windowed = True

    def generate_in_strides(
        self,
        prompts: Sequence[Prompt],
        frames: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
    ) -> Iterator[tuple[int, GenerationStep]]:
        if not self.is_windowed:
            raise UnsupportedModelError("a window cannot be fitted", hint="a test")
        steps = super().generate_in_strides(prompts, frames, max_new_tokens=3, stop=stop)
        for number, step in steps:
            if isinstance(step, GenerationDone) and not step.stopped:
                yield number, TextPiece(self._copied(prompts[number]))
            if not isinstance(step, TextPiece):
                yield number, step

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[GenerationStep]:
        steps = super().generate(prompt, max_new_tokens=3, stop=stop, prefix=prefix)
        for step in steps:
            if isinstance(step, GenerationDone) and not step.stopped:
                yield TextPiece(self._copied(prompt))
            if not isinstance(step, TextPiece):
                yield step

    def _copied(self, prompt: Prompt) -> str:
        text = prompt.messages[-1].content.partition("Text:\n\n")[2]
        text = text.partition("\n\n(end of this part)")[0]
        sentences = [s.strip() + "." for s in text.replace("\n", " ").split(".")]
        lines = [f"- {s}" for s in sentences if self.word in s]
        return "\n".join(["The moon is made of cheese tonight.", *lines, *lines[:1]]) or "none"


@pytest.fixture
def copying() -> CopyingEngine:
    tiny = make_tiny_engine()
    return CopyingEngine(tiny._model, tiny._tokenizer._tokenizer, name="copying")


@pytest.fixture
def ships(settings: Settings, tmp_path: Path, copying: CopyingEngine) -> Fathom:
    """Return a library with one document of many windows."""
    path = tmp_path / "ships.txt"
    path.write_text("\n\n".join(_paragraph(n) for n in range(NUM_PARAGRAPHS)))
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=copying)
    fathom.ingest(path)
    return fathom


@pytest.mark.parametrize("is_windowed", [True, False])
def test_a_scan_that_runs_out_of_memory_reads_passages_instead_and_says_so(
    ships: Fathom, copying: CopyingEngine, is_windowed: bool
) -> None:
    copying.is_windowed = is_windowed
    events: list[object] = []
    for event in ships.service().stream(QUESTION):
        if not events:  # the plan is made, the reading begins
            fail_to_allocate_once(copying._model)
        events.append(event)
    routes = [event.decision.route for event in events if isinstance(event, RouteChosen)]
    assert routes == [Route.SCAN, Route.RETRIEVAL]
    assert isinstance(events[-1], AnswerReady)
    receipt = events[-1].answer.receipt
    assert receipt.route is Route.RETRIEVAL
    (said,) = receipt.escalations
    assert said.startswith("memory ran out")
    assert ships.service().answer(QUESTION).receipt.route is Route.SCAN  # the service lives on


@pytest.mark.parametrize("is_windowed", [True, False])
def test_every_token_is_read_once_and_every_finding_is_in_the_text(
    ships: Fathom, copying: CopyingEngine, is_windowed: bool
) -> None:
    copying.is_windowed = is_windowed
    events = list(ships.service().stream(QUESTION))
    assert isinstance(events[0], RouteChosen)
    assert events[0].decision.route is Route.SCAN
    assert "s" in events[0].read.split("about ")[1]
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert [p.done for p in progress] == sorted(p.done for p in progress)
    assert progress[-1].done == progress[-1].total
    assert isinstance(events[-1], AnswerReady)
    answer = events[-1].answer
    expected = [f"Its cargo was salt of port {n}." for n in range(NUM_PARAGRAPHS) if n % 25 == 7]
    assert [c.quote for c in answer.citations] == expected
    assert all(c.verified for c in answer.citations)
    assert answer.answer.startswith(f"{len(expected)} places were found by the model")
    receipt = answer.receipt
    assert receipt.read.tokens == receipt.read.of_tokens
    assert receipt.read.not_read == ""
    assert receipt.scan is not None
    assert receipt.scan.windows > 5
    assert receipt.scan.items == len(expected)
    assert receipt.scan.dropped_unverified == receipt.scan.windows  # the cheese
    assert receipt.scan.dropped_repeats == len(expected)
    assert receipt.kv_bytes.predicted == receipt.kv_bytes.actual
    assert ships.receipts.load(receipt.id) == answer


def test_the_cache_of_a_scan_is_bounded_and_much_smaller_than_the_text(ships: Fathom) -> None:
    receipt = ships.service().answer(QUESTION).receipt
    gates = {g.gate: g for g in receipt.gates if g.route == "scan"}
    assert receipt.kv_bytes.actual is not None
    assert gates["kv_bytes"].value is not None
    assert 0 < receipt.kv_bytes.actual <= gates["kv_bytes"].value
    full = next(g for g in receipt.gates if (g.route, g.gate) == ("full", "kv_bytes"))
    assert full.value is not None
    assert receipt.kv_bytes.actual < full.value / 2
    assert gates["prefill_seconds"].limit is None
    assert gates["prefill_seconds"].passed


def test_a_summary_is_written_from_the_findings(ships: Fathom, copying: CopyingEngine) -> None:
    answer = ships.service().answer("Summarise the document.")
    assert answer.receipt.question_class is QuestionClass.SUMMARY
    assert answer.receipt.route is Route.SCAN
    assert all("salt" in c.quote for c in answer.citations)
    assert answer.receipt.scan is not None
    assert answer.receipt.scan.items == 5


def test_nothing_found_is_said(ships: Fathom, copying: CopyingEngine) -> None:
    copying.word = "gold"
    answer = ships.service().answer(QUESTION)
    assert answer.abstained
    assert answer.citations == ()
    assert answer.receipt.read.not_read == ""


def test_a_scan_that_is_stopped_says_what_it_did_not_read(ships: Fathom) -> None:
    stop = Event()
    seen = 0
    answer = None
    for event in ships.service().stream(QUESTION, stop=stop):
        if isinstance(event, PrefillProgress):
            seen += 1
            if seen == 5:
                stop.set()
        if isinstance(event, AnswerReady):
            answer = event.answer
    assert answer is not None
    read = answer.receipt.read
    assert 0 < read.tokens < read.of_tokens
    assert "stopped after" in read.not_read


@pytest.mark.parametrize(
    ("question", "route", "expected"),
    [
        (QUESTION, None, Route.SCAN),
        (QUESTION, Route.RETRIEVAL, Route.RETRIEVAL),
        ("What was the cargo of ship number 7?", None, Route.RETRIEVAL),
        ("What was the cargo of ship number 7?", Route.SCAN, Route.SCAN),
        ("Summarise the document.", Route.FULL, Route.SCAN),
        ("How does ship 1 differ from ship 2?", None, Route.RETRIEVAL),
    ],
)
def test_the_router_scans_what_needs_everything(
    ships: Fathom, question: str, route: Route | None, expected: Route
) -> None:
    documents = ships.documents()
    plan = ships.service().plan(question, documents, route=route)
    assert plan.decision.route is expected


def test_a_document_that_fits_is_read_in_one_piece(small_fathom: Fathom) -> None:
    plan = small_fathom.service().plan("List all fees.", small_fathom.documents())
    assert plan.decision.route is Route.FULL


def test_windows_are_all_of_the_text(ships: Fathom) -> None:
    documents = ships.documents()
    windows = list(cut_windows(documents, ships.store, len, 500, Event()))
    assert "".join(window.text for window in windows) == ships.store.text(documents[0].id)
    assert all(a.end == b.start for a, b in pairwise(windows))
    assert max(len(window.text) for window in windows) <= 500

    stop, counted = Event(), []

    def count(piece: str) -> int:
        counted.append(piece)
        if len(counted) == 7:
            stop.set()
        return len(piece)

    windows = list(cut_windows(documents, ships.store, count, 500, stop))
    assert len(counted) < 20  # what is left is neither counted nor cut
    assert "".join(window.text for window in windows) == ships.store.text(documents[0].id)


def test_a_scan_that_is_stopped_before_it_reads_says_so(
    ships: Fathom, copying: CopyingEngine
) -> None:
    stop, passes = Event(), []
    hook = copying._model.register_forward_pre_hook(lambda *_: passes.append(1))
    for event in ships.service().stream(QUESTION, stop=stop):
        if isinstance(event, RouteChosen):
            passes.clear()  # the rate was measured before
            stop.set()
    hook.remove()
    assert isinstance(event, AnswerReady)
    assert passes == []
    read = event.answer.receipt.read
    assert (read.tokens, read.chunks) == (0, 0)
    assert read.not_read.startswith("it was stopped before the first window; about ")
    assert ships.receipts.load(event.answer.receipt.id) == event.answer


def test_prompts_come_apart_where_the_text_begins_and_ends(tiny_engine: LocalEngine) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tiny_engine.encode_chat(window_messages(QUESTION, QuestionClass.AGGREGATE, text)).ids

    texts = ["Record one.", "Record two.", "Record three is longer."]
    strides = take_apart([ids(t) for t in texts], [ids("A"), ids("1")])
    spelled = [
        bytes(m).decode("latin-1") for m in strides.middles
    ]  # ids are not bytes, lengths are
    assert [len(m) for m in spelled] == [len(t) for t in texts]
    assert all(
        strides.front + m + strides.back == ids(t)
        for m, t in zip(strides.middles, texts, strict=True)
    )
    assert strides.window(FINDING_TOKENS) > 2 * max(map(len, texts))


def test_only_what_stands_in_sight_is_a_finding(small_fathom: Fathom) -> None:
    document: Document = small_fathom.documents()[0]
    text = "The harbour fee is 35 crowns\na night. Children pay nothing at all."
    window = Window(document, 100, 100 + len(text), text)
    found = locate("the harbour fee is 35 crowns a night", window, [])
    assert found is not None
    assert (found.start, found.quote) == (100, "The harbour fee is 35 crowns\na night")
    close = locate("Children they pay nothing at all", window, [])
    assert close is not None
    assert close.quote == "Children pay nothing at all."
    priced = Window(document, 0, 43, "A berth, says Mr. Bell, is 3.50 crowns. Go.")
    near = locate("A berth is 3.50 crowns says Bell here", priced, [])
    assert near is not None
    assert near.quote == "A berth, says Mr. Bell, is 3.50 crowns."
    assert locate("The harbour fee is 36 dollars a week there", window, []) is None
    after = Window(document, window.end, window.end + 5, "Next.")
    last = Window(document, after.end, after.end + 5, "Last.")
    line = "Children pay nothing at all."
    here = locate(line, window, [])
    assert locate(line, after, [window]) == here
    assert locate(line, last, [window, after]) == here  # however long ago it was read
    assert locate("The fee, fee, fee, the fee, the fee", window, []) is None


def test_lines_of_a_reply() -> None:
    reply = '1. "The first sentence."\n- Another one here\n\nnone\nNo sentence helps.\nshort'
    assert finding_lines(reply) == ["The first sentence.", "Another one here"]
    assert finding_lines("7236\nB\n7\nTundra") == ["7236", "Tundra"]


@pytest.mark.parametrize(
    ("line", "quotes"),
    [
        ("7236, 4423, 7236", ["Ann has the key 7236.", "A key of Ann is 4423."]),
        ("4423", ["A key of Ann is 4423."]),
        ("7236 and 250,000.", ["Ann has the key 7236."]),
        ("442", []),  # no whole word
        ("5000", []),  # beside nothing that was asked for
        ("Ann holds many others", []),
    ],
)
def test_values_that_a_model_names_are_found_in_the_sentences_that_hold_them(
    small_fathom: Fathom, line: str, quotes: list[str]
) -> None:
    text = "Ann has the key 7236. A lamp costs 5000. A key of Ann is 4423."
    window = Window(small_fathom.documents()[0], 50, 50 + len(text), text)
    found = named_in(line, "List all keys that Ann has.", [window])
    assert [finding.quote for finding in found] == quotes
    assert all(text[f.start - 50 : f.end - 50] == f.quote for f in found)


@pytest.mark.parametrize("text", ["", "(((((", "a" * 5000, "\\d+[", "word " * 2000])
def test_any_reply_is_safe_to_look_for(small_fathom: Fathom, text: str) -> None:
    window = Window(small_fathom.documents()[0], 0, 5, "Words")
    for line in finding_lines(text):
        assert locate(line, window, []) is None
