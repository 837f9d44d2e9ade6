"""Conversations keep their order, their owner, and no word of what was deleted."""

import json
from pathlib import Path

import pytest

from rag.errors import DocumentNotFoundError
from rag.store.conversations import ConversationStore
from rag.store.database import Database
from rag.store.receipts import REDACTED, ReceiptStore
from rag.types import Answer
from test_app import an_answer
from ui.assembly import Fathom
from ui.tabs.conversations import exported, list_html, tools_html

SECRET = "harbour fee is 35 crowns"


@pytest.fixture
def asked(small_fathom: Fathom) -> tuple[Fathom, Answer, Answer]:
    """Return a library with two answers that belong to no conversation yet."""
    service = small_fathom.service()
    first = service.answer("What is the harbour fee?")
    return small_fathom, first, service.answer("Which berth is the pilot boat's?")


def test_answers_stand_in_order_and_beside_the_one_they_repeat(
    asked: tuple[Fathom, Answer, Answer],
) -> None:
    library, first, second = asked
    store = library.conversations
    number = store.add(first.receipt.id)
    store.add(second.receipt.id, number)
    again = library.service().answer("What is the harbour fee?", route=first.receipt.route)
    store.add(again.receipt.id, number, again=first.receipt.id)
    exchanges = store.exchanges(number)
    assert [exchange.question for exchange in exchanges] == [
        "What is the harbour fee?",
        "Which berth is the pilot boat's?",
    ]
    assert [len(exchange.answers) for exchange in exchanges] == [2, 1]
    assert exchanges[0].answers == (first, again)
    (listed,) = store.all()
    assert (listed.id, listed.title, listed.num_questions) == (number, exchanges[0].question, 2)


def test_they_are_found_by_their_words_renamed_and_deleted_with_their_receipts(
    asked: tuple[Fathom, Answer, Answer],
) -> None:
    library, first, second = asked
    store = library.conversations
    one, two = store.add(first.receipt.id), store.add(second.receipt.id)
    assert [c.id for c in store.all()] == [two, one]
    assert [c.id for c in store.all("PILOT")] == [two]
    store.rename(one, "  Gebühren der Häfen ")
    assert [c.title for c in store.all("HÄFEN")] == ["Gebühren der Häfen"]
    store.rename(one, " ")
    assert store.all("crown fee nobody said") == []
    store.delete(one)
    assert [c.id for c in store.all()] == [two]
    with pytest.raises(DocumentNotFoundError, match="no receipt"):
        library.receipts.load(first.receipt.id)
    with pytest.raises(DocumentNotFoundError, match="no longer there"):
        store.exchanges(one)
    assert library.receipts.load(second.receipt.id) == second


def test_a_deleted_document_leaves_no_word_in_them(asked: tuple[Fathom, Answer, Answer]) -> None:
    library, first, second = asked
    store = library.conversations
    number = store.add(first.receipt.id)
    store.add(second.receipt.id, number)
    store.rename(number, f"the {SECRET}")
    library.delete(1)
    library.database.close()
    (listed,) = store.all()
    assert listed.title == REDACTED
    shown = exported(listed, store.exchanges(number), "json")
    assert [e["question"] for e in json.loads(json.loads(shown)["text"])["exchanges"]] == [
        REDACTED
    ] * 2
    home: Path = library.settings.home
    assert not [p for p in home.glob("fathom.sqlite*") if SECRET.encode() in p.read_bytes()]


def test_what_another_owns_is_not_there(database_url: str) -> None:
    database = Database(database_url)
    mine, others = ConversationStore(database, "ann"), ConversationStore(database, "ben")
    number = _begin(database, mine)
    assert [c.id for c in mine.all()] == [number]
    assert others.all() == []
    for forbidden in (
        lambda: others.exchanges(number),
        lambda: others.rename(number, "mine now"),
        lambda: others.delete(number),
        lambda: others.add("r", number),
    ):
        with pytest.raises(DocumentNotFoundError):
            forbidden()
    database.close()


def _begin(database: Database, store: ConversationStore) -> str:
    """Return the id of a conversation of one answer."""
    given = an_answer("Twelve. [1]")
    ReceiptStore(database).save("How many berths?", given, [])
    return store.add(given.receipt.id)


def test_exports_hold_words_places_and_receipts(asked: tuple[Fathom, Answer, Answer]) -> None:
    library, first, _ = asked
    number = library.conversations.add(first.receipt.id)
    (listed,) = library.conversations.all()
    exchanges = library.conversations.exchanges(number)
    saved = json.loads(exported(listed, exchanges, "md"))
    assert saved["name"] == "What-is-the-harbour-fee.md"
    assert "## What is the harbour fee?" in saved["text"]
    assert first.receipt.id in saved["text"]
    assert all(c.quote.splitlines()[0] in saved["text"] for c in first.citations)
    saved = json.loads(exported(listed, exchanges, "json"))
    assert json.loads(saved["text"])["exchanges"][0]["answers"][0]["answer"] == first.answer


def test_titles_are_inert_wherever_they_are_shown(asked: tuple[Fathom, Answer, Answer]) -> None:
    library, first, _ = asked
    number = library.conversations.add(first.receipt.id)
    library.conversations.rename(number, '"><img src=x onerror=alert(1)>')
    (listed,) = library.conversations.all()
    assert "<img" not in list_html([listed], number) + tools_html(listed)
    assert '""' not in tools_html(listed)
