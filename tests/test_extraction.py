"""Counts and lists with a small model: every sentence that holds what is asked for, all quoted."""

from pathlib import Path
from threading import Event

import pytest

from conftest import HashEmbedder, make_tiny_engine
from rag.answering.extraction import can_extract, extract, matter_of
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.replay import replay
from rag.answering.service import AnswerReady, RouteChosen
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from rag.types import Answer, AnswerMode, Route
from ui.assembly import Fathom

LAMPS = [f"The lamp in shed {n} has the number {4000 + n}." for n in range(7)]
QUESTION = "List all lamp numbers in the text."


@pytest.fixture
def register(settings: Settings, tmp_path: Path) -> Fathom:
    """Return a library with one document far longer than what retrieval shows, of a small model."""
    tiny = make_tiny_engine()
    engine = LocalEngine(tiny._model, tiny._tokenizer._tokenizer, name="smollm2-135m")
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=engine)
    filler = [f"The number {n} tram was late, and the lamp was blamed." for n in range(3)]
    filler += [f"Nobody came to stall {n} of the market that day." for n in range(150)]
    for place, lamp in enumerate(LAMPS):
        filler.insert(3 + 20 * place, lamp)
    path = tmp_path / "register.txt"
    path.write_text("\n\n".join(filler))
    fathom.ingest(path)
    return fathom


def _asked(fathom: Fathom, question: str) -> tuple[list[RouteChosen], Answer]:
    events = list(fathom.service().stream(question))
    assert isinstance(events[-1], AnswerReady)
    return [event for event in events if isinstance(event, RouteChosen)], events[-1].answer


def test_a_small_model_lists_nothing_itself_every_sentence_is_compared(register: Fathom) -> None:
    (chosen,), answer = _asked(register, QUESTION)
    assert (chosen.decision.route, chosen.decision.mode) == (Route.SCAN, AnswerMode.QUOTED)
    assert chosen.read == "every sentence, without the model"
    expected = [f"The number {n} tram was late, and the lamp was blamed." for n in range(3)] + LAMPS
    assert [c.quote for c in answer.citations] == expected  # both words: said, not judged
    assert all(c.verified for c in answer.citations)
    assert answer.answer.startswith("10 sentences hold the words asked for (lamp, numbers)")
    receipt = answer.receipt
    assert receipt.read.tokens == receipt.read.of_tokens
    assert (receipt.read.chunks, receipt.read.not_read) == (receipt.read.of_chunks, "")
    assert "160 sentences were compared with it" in receipt.reason
    assert receipt.scan is not None
    assert receipt.scan.items == 10
    assert receipt.prompt_tokens == 0
    assert register.receipts.load(receipt.id) == answer
    assert replay(receipt.id, register.receipts, register.service()).same_text


def test_how_often_something_is_told_is_told_by_the_sentences_that_tell_it(
    register: Fathom,
) -> None:
    question = "How many times does the text say that nobody came to stall 7?"
    _, answer = _asked(register, question)
    assert answer.answer.startswith("1 sentence holds the words asked for (nobody, came, stall, 7)")
    assert [c.quote for c in answer.citations] == ["Nobody came to stall 7 of the market that day."]


def test_what_the_documents_do_not_speak_of_is_not_found_in_its_neighbours(
    register: Fathom,
) -> None:
    """A word that stands nowhere weighs most; then the model reads, and says so."""
    question = "How many times does the text say that a pelican came to the market?"
    found = extract(question, register.documents(), store=register.store, stop=Event())
    assert found.citations == ()
    assert found.num_compared == 160
    chosen, answer = _asked(register, question)
    assert [c.decision.mode for c in chosen] == [AnswerMode.QUOTED, AnswerMode.WRITTEN]
    assert answer.abstained
    assert answer.answer.startswith(CANNOT_ANSWER)
    (given_up,) = answer.receipt.escalations
    assert given_up.startswith("no sentence holds the words asked for")


def test_a_route_that_is_asked_for_is_read_by_the_model(register: Fathom) -> None:
    documents = register.documents()
    for route in (Route.SCAN, Route.RETRIEVAL):
        decision = register.service().plan(QUESTION, documents, route=route).decision
        assert (decision.route, decision.mode) == (route, AnswerMode.WRITTEN)


def test_a_model_that_may_write_is_asked(register: Fathom) -> None:
    tiny = make_tiny_engine()
    fathom = Fathom(register.settings, embedder=HashEmbedder(), engine=tiny)
    decision = fathom.service().plan(QUESTION, fathom.documents()).decision
    assert decision.mode is AnswerMode.WRITTEN


def test_a_scan_in_which_the_model_finds_nothing_shows_what_stands_there(register: Fathom) -> None:
    answer = register.service().answer(QUESTION, route=Route.SCAN)  # a random model copies nothing
    assert answer.receipt.mode is AnswerMode.WRITTEN
    assert [c.quote for c in answer.citations][-7:] == LAMPS
    assert "the model found nothing in" in answer.receipt.reason
    assert answer.receipt.scan is not None
    assert answer.receipt.scan.items == 0  # of the model


def test_a_stop_says_which_documents_were_left_out(register: Fathom, tmp_path: Path) -> None:
    stop = Event()
    stop.set()
    found = extract(QUESTION, register.documents(), store=register.store, stop=stop)
    assert (found.citations, found.num_compared) == ((), 0)
    assert found.unread == tuple(register.documents())
    events = list(register.service().stream(QUESTION, stop=stop))
    assert isinstance(events[-1], AnswerReady)
    read = events[-1].answer.receipt.read
    assert (read.tokens, read.chunks) == (0, 0)
    assert read.not_read.startswith("it was stopped")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (QUESTION, ["lamp", "numbers"]),
        ("What is the total number of open tickets in this file?", ["open", "tickets"]),
        ("Which rooms does Ann have a key to? Name all of them.", ["rooms", "Ann", "key"]),
        ("List every obligation of the licensee.", ["obligation", "licensee"]),
        ("List all sentences that mention the sample document.", ["sample", "document"]),
    ],
)
def test_the_matter_of_a_question_is_what_it_asks_to_list(question: str, words: list[str]) -> None:
    assert list(matter_of(question).values()) == words
    assert can_extract(question)


@pytest.mark.parametrize(
    "question",
    [
        "List all companies mentioned.",  # one word: few sentences about companies hold it
        "How many chapters and sections does the book have?",  # parts, which are counted
        "List all sailors who did not drown.",
        "List all harbour fees above 30 crowns.",
        "List all ships without a mast.",
        "List everything.",
    ],
)
def test_words_that_do_not_tell_what_is_asked_for_are_not_looked_for(question: str) -> None:
    assert not can_extract(question)
