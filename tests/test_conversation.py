"""Follow-ups stand alone before anything is read, and the person sees how they were asked."""

from threading import Event

import pytest

from conftest import make_tiny_engine
from rag.answering.conversation import HISTORY_TOKENS, Turn, is_faithful, leans_on, stand_alone
from rag.answering.service import QuestionRewritten
from ui.assembly import Fathom

FEE = Turn("What is the harbour fee?", "35 crowns a night. [1]")


@pytest.mark.parametrize(
    "question",
    [
        "Who collects it?",
        "And for the winter?",
        "What about 2020?",
        "Why?",
        "What is her budget?",
        "How many people live there?",
        "Does it apply to tenants as well?",
        "When was that?",
    ],
)
def test_a_follow_up_leans_on_what_was_said(question: str) -> None:
    assert leans_on(question)


@pytest.mark.parametrize(
    "question",
    [
        "What is the harbour fee?",
        "Is it possible to terminate the lease early?",
        "What did the company say about its revenue?",
        "Which clause says that rent is due on the first?",
        "How long does it take to register a ship?",
        "What does this document say about rent?",
    ],
)
def test_a_question_that_names_its_matter_stands_alone(question: str) -> None:
    assert not leans_on(question)
    assert stand_alone(
        question, [FEE], engine=make_tiny_engine(), may_write=True, stop=Event()
    ) == (question)


def test_a_rewriting_keeps_the_words_and_adds_only_what_was_said() -> None:
    asked = "Who collects it?"
    assert is_faithful("Who collects the harbour fee?", asked, [FEE])
    assert not is_faithful("Who pays the harbour fee?", asked, [FEE])  # another question
    assert not is_faithful("Who collects the harbour tax?", asked, [FEE])  # never said
    assert not is_faithful(asked, asked, [FEE])  # nothing replaced
    assert not is_faithful("The harbour master collects it.", asked, [FEE])


def test_a_rewriting_that_says_something_else_is_not_asked() -> None:
    """The tiny model writes noise: the question before stands beside the follow-up."""
    found = stand_alone(
        "Who collects it?", [FEE], engine=make_tiny_engine(), may_write=True, stop=Event()
    )
    assert found == "Who collects it? (asked after: What is the harbour fee?)"


def test_a_chain_of_follow_ups_does_not_grow() -> None:
    engine = make_tiny_engine()
    turns = [FEE]
    for _ in range(20):
        found = stand_alone("Who collects it?", turns, engine=engine, may_write=False, stop=Event())
        turns.append(Turn(found, "The harbour master."))
    assert found == ("Who collects it? (asked after: What is the harbour fee? Who collects it?)")


def test_a_long_history_is_cut_to_its_budget_not_the_evidence(small_fathom: Fathom) -> None:
    """However long the chat, the prompt that answers is as long as for the question alone."""
    service = small_fathom.service()
    long = [Turn(f"What of ship {n}?", "It lies there. " * 200) for n in range(50)]
    events = list(service.stream("And when does it leave?", history=long))
    assert isinstance(events[0], QuestionRewritten)
    answer = events[-1].answer  # type: ignore[union-attr]
    assert answer.receipt.standalone_question == events[0].question
    alone = service.answer(events[0].question)
    assert alone.receipt.prompt_sha256 == answer.receipt.prompt_sha256
    assert alone.receipt.standalone_question is None
    assert small_fathom.settings.retrieval_tokens > HISTORY_TOKENS


def test_replay_asks_what_was_asked(small_fathom: Fathom) -> None:
    from rag.answering.replay import replay

    service = small_fathom.service()
    before = service.answer("And when does it leave?", history=[Turn("What of ship 3?", "Yes.")])
    found = replay(before.receipt.id, small_fathom.receipts, service)
    assert found.same_text
    assert found.now.receipt.prompt_sha256 == before.receipt.prompt_sha256


def test_deleting_a_document_takes_the_rewritten_question_too(small_fathom: Fathom) -> None:
    service = small_fathom.service()
    before = service.answer("And when does it leave?", history=[Turn("What of ship 3?", "Yes.")])
    small_fathom.delete(*(document.id for document in small_fathom.documents()))
    after = small_fathom.receipts.load(before.receipt.id)
    assert "ship 3" not in str(after.to_json())
