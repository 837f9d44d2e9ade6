"""Where nothing is found more is read, twice at most; then it is said that nothing is there."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest

from conftest import HashEmbedder, make_tiny_engine
from eval.fit_router import fit_router, pairs_from_answers
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.replay import replay
from rag.answering.service import AnswerReady, RouteChosen
from rag.errors import TooFewPairsError
from rag.lm.engine import DocumentPrefix, GenerationDone, GenerationStep, Prompt, TextPiece
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from rag.types import Answer, Route
from ui.assembly import Fathom

QUESTION = "Which cook tasted the soup?"
# It shares no word with the question: only who reads everything can find it.
HIDDEN = "Ambrose sampled all that was ladled out."
REFUSAL = CANNOT_ANSWER
INVENTED = "Zebedee juggled purple marmalade yesterday."


class FindingEngine(LocalEngine):
    """The tiny model, read for real; it answers with the hidden sentence where it was shown it.

    A random model finds nothing. This one says `otherwise` where its prompt does not hold it.
    """

    otherwise = REFUSAL

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[tuple[int, GenerationStep]]:
        for number, step in super().generate_many(
            prompts, max_new_tokens=2, stop=stop, prefix=prefix
        ):
            if isinstance(step, GenerationDone):
                shown = HIDDEN in prompts[number].messages[-1].content
                yield number, TextPiece(HIDDEN if shown else self.otherwise)
            if not isinstance(step, TextPiece):
                yield number, step


def _library(folder: Path, *, hidden: bool, **settings: object) -> tuple[Fathom, FindingEngine]:
    """Return a library of one document longer than the retrieval budget, twice over."""
    sentences = [f"The cook of ship {n} made soup number {n} for all who came." for n in range(42)]
    if hidden:
        sentences.insert(30, HIDDEN)
    path = folder / "log.txt"
    path.write_text("\n\n".join(sentences))
    tiny = make_tiny_engine()
    engine = FindingEngine(tiny._model, tiny._tokenizer._tokenizer, name="finding")
    values = {"retrieval_tokens": 200, "chunk_tokens": 32, "thrift": 1.0, "max_new_tokens": 16}
    chosen = Settings(home=folder / "home", **(values | settings))  # type: ignore[arg-type]
    fathom = Fathom(chosen, embedder=HashEmbedder(), engine=engine)
    fathom.ingest(path)
    return fathom, engine


def _asked(fathom: Fathom, route: Route | None = None) -> tuple[list[Route], Answer]:
    events = list(fathom.service().stream(QUESTION, route=route))
    routes = [event.decision.route for event in events if isinstance(event, RouteChosen)]
    assert isinstance(events[-1], AnswerReady)
    return routes, events[-1].answer


def test_what_retrieval_does_not_show_is_found_by_reading_everything(tmp_path: Path) -> None:
    fathom, _ = _library(tmp_path, hidden=True)
    routes, answer = _asked(fathom)
    assert routes == [Route.RETRIEVAL, Route.RETRIEVAL, Route.FULL]
    assert not answer.abstained
    assert [citation.quote for citation in answer.citations] == [HIDDEN]
    receipt = answer.receipt
    assert receipt.route is Route.FULL
    assert receipt.read.tokens == receipt.read.of_tokens
    said = [re.match(r"the nearest (\d+) tokens gave no", words) for words in receipt.escalations]
    first, second = (int(match[1]) for match in said if match)
    assert 100 < first <= 200 < second <= 400  # what was read, no more than the budgets
    assert fathom.receipts.load(receipt.id) == answer


@pytest.mark.parametrize("says", [REFUSAL, INVENTED])
def test_what_is_nowhere_is_said_not_to_be_found(tmp_path: Path, says: str) -> None:
    """Words without support are not shown; a refusal is believed once everything was read."""
    fathom, engine = _library(tmp_path, hidden=False)
    engine.otherwise = says
    routes, answer = _asked(fathom)
    assert routes == [Route.RETRIEVAL, Route.RETRIEVAL, Route.FULL]
    assert answer.abstained
    assert answer.answer.startswith(CANNOT_ANSWER)
    assert "Zebedee" not in answer.answer
    assert len(answer.receipt.escalations) == 2
    for citation in answer.citations:  # the nearest sentence
        assert citation.verified
        assert "cook" in citation.quote


def test_a_second_budget_is_enough_where_it_shows_the_sentence(tmp_path: Path) -> None:
    fathom, _ = _library(tmp_path, hidden=False)
    first = fathom.service().plan(QUESTION, fathom.documents())
    shown = first.context.passages[0].passage.text
    service, documents = fathom.service(), fathom.documents()
    read = service._planner.read_extent(first, documents)
    wider = service._escalation.further(QUESTION, documents, first, read)[0]
    assert wider is not None
    assert wider.context.num_tokens > first.context.num_tokens
    assert wider.context.num_tokens <= 400
    texts = " ".join(passage.passage.text for passage in wider.context.passages)
    assert shown.split(".")[0] in texts


@pytest.mark.parametrize(("num_chunks", "said"), [(1, ["1 of 1"]), (20, ["12 of 20", "20 of 20"])])
def test_the_receipt_of_a_quotation_tells_what_was_compared(
    tmp_path: Path, num_chunks: int, said: list[str]
) -> None:
    lines = [f"The cook of ship {n} made soup for all who came aboard." for n in range(num_chunks)]
    path = tmp_path / "log.md"
    path.write_text("\n\n".join(f"# Ship {n}\n\n{line}" for n, line in enumerate(lines)))
    settings = Settings(home=tmp_path / "home", answer_mode="quotation", num_candidates=40)
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=make_tiny_engine())
    assert fathom.ingest(path).document.num_chunks == num_chunks
    receipt = fathom.service().answer("When did Zebedee not juggle 7 marmalades in 1909?").receipt
    told = [receipt.reason, *receipt.escalations]
    found = {n: None for words in told for n in re.findall(r"chunks \((.+?)\) seem", words)}
    assert sorted(found) == sorted(said)
    assert receipt.read.chunks == num_chunks


def test_reading_everything_needs_its_gates(tmp_path: Path) -> None:
    fathom, _ = _library(tmp_path, hidden=True, prefill_deadline_seconds=1e-6)
    routes, answer = _asked(fathom)
    assert routes == [Route.RETRIEVAL, Route.RETRIEVAL]
    assert answer.abstained
    assert "everything was not read: prefill_seconds" in answer.receipt.reason
    assert answer.receipt.read.not_read


def test_a_route_asked_for_is_the_only_one(tmp_path: Path) -> None:
    fathom, engine = _library(tmp_path, hidden=True)
    engine.otherwise = INVENTED
    routes, answer = _asked(fathom, Route.RETRIEVAL)
    assert routes == [Route.RETRIEVAL]
    assert "[unverified]" in answer.answer  # shown, and marked: the person chose what is read
    assert answer.receipt.asked_for is Route.RETRIEVAL


@pytest.mark.parametrize("most", [0, 1])
def test_the_number_of_escalations_is_a_setting(tmp_path: Path, most: int) -> None:
    fathom, _ = _library(tmp_path, hidden=True, escalations=most)
    routes, answer = _asked(fathom)
    assert len(routes) == 1 + most
    assert answer.abstained


def test_a_table_of_questions_is_escalated_like_one(tmp_path: Path) -> None:
    fathom, _ = _library(tmp_path, hidden=True)
    outcomes = dict(fathom.service().answer_many([QUESTION, "Who made soup number 7?", QUESTION]))
    for number in (0, 2):
        answer = outcomes[number]
        assert isinstance(answer, Answer)
        assert answer.receipt.route is Route.FULL
        assert HIDDEN in answer.citations[0].quote


def test_an_escalated_answer_is_replayed_by_its_last_plan(tmp_path: Path) -> None:
    fathom, engine = _library(tmp_path, hidden=False, prefill_deadline_seconds=1e-6)
    engine.otherwise = INVENTED
    _, before = _asked(fathom)
    assert before.receipt.breadth == 2
    found = replay(before.receipt.id, fathom.receipts, fathom.service())
    assert found.same_text
    assert found.now.receipt.prompt_sha256 == before.receipt.prompt_sha256


def test_the_receipt_weighs_the_routes(tmp_path: Path) -> None:
    fathom, _ = _library(tmp_path, hidden=True)
    decision = fathom.service().plan(QUESTION, fathom.documents()).decision
    assert decision.route is Route.RETRIEVAL  # a thrift of 1: the cheaper one
    assert [estimate.route for estimate in decision.routes] == [Route.RETRIEVAL, Route.FULL]
    assert "retrieval is worth more: likely right" in decision.reason
    (tmp_path / "lavish").mkdir()
    lavish, _ = _library(tmp_path / "lavish", hidden=True, thrift=0.0)
    again = lavish.service().plan(QUESTION, lavish.documents()).decision
    likelier = max(again.routes, key=lambda estimate: estimate.probability)
    assert again.route is likelier.route


def test_asking_again_by_another_route_is_a_label(tmp_path: Path) -> None:
    fathom, _ = _library(tmp_path, hidden=True, escalations=0)
    service = fathom.service()
    other = "Who made soup number 7?"
    for route in (Route.RETRIEVAL, Route.FULL):  # side by side: nobody was overruled
        service.answer(other, route=route)
    assert service.answer(QUESTION).receipt.route is Route.RETRIEVAL
    assert pairs_from_answers(fathom.receipts, service) == []  # one route alone says nothing
    service.answer(QUESTION, route=Route.FULL)
    (pair,) = pairs_from_answers(fathom.receipts, service)
    assert (pair.full, pair.retrieval, pair.model) == (1.0, 0.0, "finding")
    assert pair.features == service.features(QUESTION, fathom.documents())
    with pytest.raises(TooFewPairsError, match="1 labelled pairs"):
        fit_router([pair], fitted_on="one")
    fathom.delete(fathom.documents()[0].id)
    assert pairs_from_answers(fathom.receipts, service) == []
