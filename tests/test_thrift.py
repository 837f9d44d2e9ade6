"""Thrift: what a question is weighed with, and what another one would have led to."""

from pathlib import Path

import pytest

from conftest import HashEmbedder
from eval.thrift import THRIFTS, thrift_curve, thrift_point, weighed
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from rag.types import Route
from ui.assembly import Fathom
from ui.tabs.limits import thrift_html

BUDGET = 200


@pytest.fixture
def ships(settings: Settings, tiny_engine: LocalEngine, tmp_path: Path) -> Fathom:
    """Return a library of one document that is longer than the retrieval budget and fits."""
    changed = settings.model_copy(update={"retrieval_tokens": BUDGET, "escalations": 0})
    library = Fathom(changed, embedder=HashEmbedder(), engine=tiny_engine)
    path = tmp_path / "ships.txt"
    path.write_text("\n\n".join(f"The cook of ship {n} made soup number {n}." for n in range(50)))
    library.ingest(path)
    return library


def test_a_question_is_weighed_with_its_own_thrift_and_its_receipt_says_so(ships: Fathom) -> None:
    service, documents = ships.service(), ships.documents()
    assert service.plan("Who made soup 7?", documents).thrift == ships.settings.thrift
    lavish = service.plan("Who made soup 7?", documents, thrift=0.0).decision.routes
    assert [one.utility for one in lavish] == [one.probability for one in lavish]
    given = service.answer("Who made soup 7?", thrift=1.0)
    assert given.receipt.route is Route.RETRIEVAL
    assert given.receipt.thrift == 1.0
    assert ships.receipts.load(given.receipt.id) == given
    again = service.again("Who made soup 7?", given.receipt, [documents[0].id])
    assert again.receipt.thrift == 1.0
    assert service.answer("Who made soup 7?").receipt.thrift == ships.settings.thrift


def test_what_another_thrift_would_have_led_to_is_reckoned_from_receipts(ships: Fathom) -> None:
    service = ships.service()
    for number in (7, 9):
        service.answer(f"Who made soup {number}?", thrift=1.0)
    service.answer("Who made soup 9?", route=Route.FULL)
    service.answer("How many soups are there?")  # needs everything, or is counted
    receipts = weighed(ships.receipts.newest(100))
    assert len(receipts) == 2  # a question that was asked again counts once

    curve = thrift_curve(receipts, BUDGET)
    assert [point.thrift for point in curve] == list(THRIFTS)
    costs = [point.cost_tokens for point in curve]
    likely = [point.probability for point in curve]
    assert costs == sorted(costs, reverse=True)
    assert likely == sorted(likely, reverse=True)
    for receipt in receipts:
        for thrift in (0.0, 1.0):
            point = thrift_point([receipt], thrift, BUDGET)
            best = max(receipt.routes, key=lambda one: one.probability - thrift * one.cost_tokens)
            assert point.cost_tokens == best.cost_tokens
            assert point.full_share == (best.route is Route.FULL)
    # no longer than the budget of retrieval: read whole, whatever it costs
    assert thrift_point(receipts, 1.0, 10**6).full_share == 1.0
    assert thrift_curve([], BUDGET) == ()


def test_the_page_reckons_from_the_questions_of_its_owner_alone(ships: Fathom) -> None:
    assert "No question so far" in thrift_html(ships, 0.001)
    ships.service().answer("How many soups are there?")
    assert "None of your 1 question so far" in thrift_html(ships, 0.001)
    ships.service().answer("Who made soup 7?", thrift=1.0)
    shown = thrift_html(ships, 1.0)
    assert "Reckoned from 1 question of yours" in shown
    assert "0% read everything" in shown
    assert ships.for_owner("ben").receipts.newest(100) == []
    assert "No question so far" in thrift_html(ships.for_owner("ben"), 0.001)
