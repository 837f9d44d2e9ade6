"""From a question to a cited answer with its receipt, with a tiny random model."""

from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from conftest import HANDBOOK, HashEmbedder, make_tiny_engine
from rag.answering.asked import MAX_QUESTION_CHARS
from rag.answering.citations import UNVERIFIED, CitedText, resolve_citations
from rag.answering.conclusions import claim, form_of
from rag.answering.context import full_context, retrieved_context
from rag.answering.prompt import CANNOT_ANSWER, build_messages, is_refusal
from rag.answering.service import AnswerReady, RouteChosen
from rag.errors import DocumentNotFoundError, EmptyLibraryError, ModelError, QuestionError
from rag.lm.engine import GenerationDone, PrefillProgress
from rag.store.receipts import REDACTED
from rag.types import Answer, Decoding, DecodingWay, Route, answer_from_json
from ui.assembly import Fathom
from ui.formatting import receipt_text

QUESTION = "What is the harbour fee?"


def test_a_receipt_tells_what_was_done(small_fathom: Fathom) -> None:
    answer = small_fathom.service().answer(QUESTION)
    receipt = answer.receipt
    assert receipt.route is Route.FULL
    assert receipt.kv_bytes.predicted == receipt.kv_bytes.actual
    assert receipt.kv_bytes.predicted
    assert receipt.read.tokens == receipt.read.of_tokens == len(HANDBOOK.encode())
    assert receipt.read.not_read == ""
    assert receipt.new_tokens <= 16
    assert {gate.gate for gate in receipt.gates} >= {"tokens", "positions", "kv_bytes"}
    assert receipt.seconds.total >= receipt.seconds.prefill + receipt.seconds.decode > 0
    assert receipt.decoding == Decoding(DecodingWay.PLAIN)
    assert small_fathom.receipts.load(receipt.id) == answer
    assert answer_from_json(answer.to_json()) == answer


def test_a_receipt_older_than_a_field_of_it_is_still_read(small_fathom: Fathom) -> None:
    answer = small_fathom.service().answer(QUESTION)
    stored = answer.to_json()
    for name in ("decoding", "named", "thrift", "kv_dtype", "asked_for", "scan", "mode"):
        del stored["receipt"][name]
    old = answer_from_json(stored)
    assert old.receipt.decoding is None
    assert old == replace(
        answer, receipt=replace(answer.receipt, decoding=None, named="", thrift=None)
    )
    assert "written token" not in receipt_text(old)


def test_json_has_exactly_the_keys_of_the_contract(small_fathom: Fathom) -> None:
    value = small_fathom.service().answer(QUESTION).to_json()
    assert list(value) == ["answer", "abstained", "citations", "receipt"]
    assert list(value["receipt"]) == (
        "id route reason question_class gates read prompt_tokens cached_tokens new_tokens kv_bytes"
        " seconds escalations model embedder prompt_sha256 class_reason mode scan"
        " routes standalone_question asked_for breadth kv_dtype thrift named decoding".split()
    )
    assert list(value["receipt"]["read"]) == "tokens of_tokens chunks of_chunks not_read".split()
    gate_keys = {tuple(gate) for gate in value["receipt"]["gates"]}
    assert gate_keys == {("gate", "value", "limit", "unit", "passed", "route", "kv_dtype")}
    timed = "retrieve prefill prefill_predicted decode total".split()
    assert list(value["receipt"]["seconds"]) == timed


def test_a_document_beyond_the_model_is_retrieved_and_the_gate_named(
    small_fathom: Fathom, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(f"Paragraph {n} is about ship {n * 7}." for n in range(600)))
    document = small_fathom.ingest(long).document
    tight = small_fathom.settings.model_copy(update={"retrieval_tokens": 400})
    service = Fathom(tight, embedder=HashEmbedder(), engine=make_tiny_engine()).service()
    answer = service.answer("ship 77", document_ids=[document.id], route=Route.FULL)
    receipt = answer.receipt
    assert receipt.route is Route.RETRIEVAL
    assert "reading everything was asked for but fails a gate: tokens" in receipt.reason
    assert [g.gate for g in receipt.gates if not g.passed] == ["tokens", "positions"]
    assert 0 < receipt.read.chunks < receipt.read.of_chunks
    assert receipt.read.tokens <= 400
    assert "were not shown to the model" in receipt.read.not_read


def test_stream_tells_route_first_and_answer_last(small_fathom: Fathom) -> None:
    events = list(small_fathom.service().stream(QUESTION))
    assert isinstance(events[0], RouteChosen)
    assert isinstance(events[1], PrefillProgress)
    assert isinstance(events[-1], AnswerReady)
    assert not any(isinstance(event, GenerationDone) for event in events)


def test_the_same_question_gives_the_same_answer(small_fathom: Fathom) -> None:
    first, second = (small_fathom.service().answer(QUESTION) for _ in range(2))
    assert first.answer == second.answer
    assert first.receipt.prompt_sha256 == second.receipt.prompt_sha256


def test_an_empty_library_and_an_unknown_document_are_told(library: Fathom) -> None:
    with pytest.raises(EmptyLibraryError) as caught:
        library.service().answer(QUESTION)
    assert "fathom ingest" in caught.value.hint
    with pytest.raises(DocumentNotFoundError):
        library.service().answer(QUESTION, document_ids=[99])


def test_deleting_a_document_takes_its_words_out_of_past_answers(small_fathom: Fathom) -> None:
    document = small_fathom.documents()[0]
    answer = small_fathom.service().answer(QUESTION)
    small_fathom.delete(document.id)
    kept = small_fathom.receipts.load(answer.receipt.id)
    assert kept.answer == REDACTED
    assert kept.receipt == answer.receipt
    with small_fathom.database.read() as connection:
        stored = connection.exec_driver_sql("SELECT question FROM answer").scalar_one()
    assert stored == REDACTED


def test_prompt_has_documents_first_and_question_last(small_fathom: Fathom) -> None:
    context = full_context(small_fathom.documents(), store=small_fathom.store, count_tokens=len)
    messages = build_messages(QUESTION, context.passages)
    assert messages[-1].content.endswith(f"Question: {QUESTION}")
    assert HANDBOOK in messages[-1].content
    assert CANNOT_ANSWER in messages[0].content


def test_refusal_is_recognised_with_words_around_it() -> None:
    assert is_refusal(f"Sorry. {CANNOT_ANSWER.upper()}")
    assert is_refusal("I cannot find this\nin the documents")
    assert not is_refusal("The fee is 35 crowns.")


def test_context_keeps_the_budget_and_the_order_of_the_text(small_fathom: Fathom) -> None:
    documents = small_fathom.documents()
    service = small_fathom.service()
    hits = service._retriever.retrieve("beacon fee berth", documents, num_candidates=10)
    context = retrieved_context(
        hits, documents, store=small_fathom.store, count_tokens=len, token_budget=200
    )
    starts = [p.passage.start for p in context.passages]
    assert starts == sorted(starts)
    assert context.num_tokens <= 200 + 2 * len(context.passages)
    assert [p.marker for p in context.passages] == list(range(1, len(starts) + 1))
    for numbered in context.passages:
        p = numbered.passage
        assert HANDBOOK[p.start : p.end] == p.text


@pytest.mark.parametrize(
    ("question", "answer", "quote"),
    [
        (QUESTION, "The fee is 35 crowns.", "The harbour fee is 35 crowns a night."),
        (QUESTION, "35 crowns a night [1]", "The harbour fee is 35 crowns a night."),
        (
            "What does the north beacon do?",
            "It flashes green. [1]",
            "The north beacon flashes green every four seconds.",
        ),
        (
            "How is a berth booked?",
            "channel 14",
            "A berth is booked by radio on channel 14.",
        ),
        (
            QUESTION,
            "According to the general rules of Tarn Head in this old handbook, it is 35 crowns.",
            "The harbour fee is 35 crowns a night.",
        ),
        ("Summarise it.", "channel 14", "A berth is booked by radio on channel 14."),
    ],
)
def test_statements_are_cited_by_the_sentence_that_supports_them(
    small_fathom: Fathom, question: str, answer: str, quote: str
) -> None:
    context = full_context(small_fathom.documents(), store=small_fathom.store, count_tokens=len)
    cited = resolve_citations(answer, question, context.passages, small_fathom.store)
    (citation,) = cited.citations
    assert citation.quote == quote == HANDBOOK[citation.start : citation.end]
    assert citation.verified
    assert cited.text.endswith("[1]")
    assert cited.num_unverified == 0


def test_words_borrowed_from_beside_the_point_are_no_support(small_fathom: Fathom) -> None:
    context = full_context(small_fathom.documents(), store=small_fathom.store, count_tokens=len)
    cited = resolve_citations("It is green.", QUESTION, context.passages, small_fathom.store)
    assert cited.text == f"It is green. {UNVERIFIED}"


def test_whose_words_they_are_is_a_claim_and_where_they_stand_is_none() -> None:
    form = form_of(QUESTION)
    assert claim("In this report, it is 35 crowns.", form) == "it is 35 crowns."
    for whole in (
        "According to the old captain, it is 35 crowns.",
        "In the winter, it is 35 crowns.",
        "In the contract signed in May 2020, it is 35 crowns.",
        "According to the handbook.",
    ):
        assert claim(whole, form) == whole


def test_statements_without_support_are_marked(small_fathom: Fathom) -> None:
    context = full_context(small_fathom.documents(), store=small_fathom.store, count_tokens=len)
    text = "The fee is 35 crowns. Whales sing in the mountains [1]."
    cited = resolve_citations(text, QUESTION, context.passages, small_fathom.store)
    assert cited.text == f"The fee is 35 crowns. [1] Whales sing in the mountains. {UNVERIFIED}"
    assert len(cited.citations) == cited.num_unverified == 1


def test_a_statement_is_whole_whatever_stops_are_in_it(library: Fathom, tmp_path: Path) -> None:
    """Names, and the numbers of a list, are no statements; a number alone is one."""
    path = tmp_path / "letters.txt"
    text = "Mr. Bennet lives near St. Hyacinth's Church in No. 7. J. K. Bell pays 3.50 crowns."
    path.write_text(text)
    library.ingest(path)
    context = full_context(library.documents(), store=library.store, count_tokens=len)

    def resolve(answer: str) -> CitedText:
        return resolve_citations(
            answer, "Who lives at the church?", context.passages, library.store
        )

    cited = resolve("Mr. Bennet lives near St. Hyacinth's. It is No. 7.")
    assert cited.text == "Mr. Bennet lives near St. Hyacinth's. [1] It is No. 7. [1]"
    assert [citation.quote for citation in cited.citations] == [text[: text.index(" J. K.")]]
    listed = resolve("1. Mr. Bennet lives near it.\n2. Whales do.")
    assert listed.text == f"1. Mr. Bennet lives near it. [1] 2. Whales do. {UNVERIFIED}"
    assert resolve("8. It is near.").text == f"8. {UNVERIFIED} It is near. [1]"


# ---- many questions ----------------------------------------------------------------------------

TABLE = [QUESTION, "What does the north beacon do?", "How is a berth booked?", "Who pays nothing?"]


@pytest.mark.parametrize("route", [Route.FULL, Route.RETRIEVAL])
def test_a_table_of_questions_gets_the_answers_of_each_alone(
    small_fathom: Fathom, route: Route
) -> None:
    service = small_fathom.service()
    alone = [service.answer(question, route=route) for question in TABLE]
    progress: list[tuple[int, int]] = []
    answered = service.answer_many(
        TABLE, route=route, on_progress=lambda done, total: progress.append((done, total))
    )
    found = dict(answered)
    assert sorted(found) == [0, 1, 2, 3]
    assert progress == [(n, 4) for n in (1, 2, 3, 4)]
    reused = set()
    for number, expected in enumerate(alone):
        answer = found[number]
        assert isinstance(answer, Answer)
        assert (answer.answer, answer.citations) == (expected.answer, expected.citations)
        assert answer.receipt.prompt_sha256 == expected.receipt.prompt_sha256
        assert answer.receipt.route is route
        assert small_fathom.receipts.load(answer.receipt.id) == answer
        reused.add(answer.receipt.cached_tokens)
    assert len(reused) == (2 if route is Route.FULL else 1)  # one reads the document for all


def test_a_question_without_an_answer_does_not_take_the_others_with_it(
    small_fathom: Fathom, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(f"Paragraph {n} is about ship {n * 7}." for n in range(600)))
    small_fathom.ingest(long)
    beyond = "ship " * 1200
    found = dict(small_fathom.service().answer_many([QUESTION, beyond, TABLE[1]]))
    assert isinstance(found[1], ModelError)
    assert isinstance(found[0], Answer)
    assert isinstance(found[2], Answer)


def test_a_question_that_says_nothing_or_too_much_is_refused(small_fathom: Fathom) -> None:
    service = small_fathom.service()
    with pytest.raises(QuestionError, match="no word"):
        service.answer(" ?! ")
    with pytest.raises(QuestionError, match="the list of them is empty"):
        service.answer(QUESTION, document_ids=[])
    found = dict(service.answer_many(["...", QUESTION, "a" * (MAX_QUESTION_CHARS + 1)]))
    assert isinstance(found[0], QuestionError)
    assert isinstance(found[1], Answer)
    assert "at most 20,000 are read" in str(found[2])


def test_stop_leaves_the_rest_of_the_table_unanswered(small_fathom: Fathom) -> None:
    stop = Event()
    found = []
    for number, _ in small_fathom.service().answer_many(TABLE * 20, stop=stop):
        found.append(number)
        stop.set()
    assert found
    assert max(found) < 32
    assert list(small_fathom.service().answer_many(TABLE, stop=stop)) == []


def test_no_question_is_no_answer(small_fathom: Fathom) -> None:
    assert list(small_fathom.service().answer_many([])) == []


@pytest.mark.parametrize("kind", ["quoted", "scanned", "written"])
def test_a_table_gets_no_half_answer_after_a_stop(
    small_fathom: Fathom, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stop, engine = Event(), small_fathom.engine
    mode = "quotation" if kind == "quoted" else "free"
    settings = small_fathom.settings.model_copy(update={"answer_mode": mode})
    fathom = Fathom(settings, embedder=small_fathom.embedder, engine=engine)

    def stopping(name: str) -> None:
        original = getattr(engine, name)

        def after_stop(*args: Any, **options: Any) -> Any:  # noqa: ANN401
            stop.set()
            return original(*args, **options)

        monkeypatch.setattr(engine, name, after_stop)

    route = {"scanned": Route.SCAN, "written": Route.RETRIEVAL}.get(kind)
    if kind == "quoted":
        stopping("score")
    elif kind == "scanned":
        stopping("generate_in_strides")
    else:
        stopping("generate_many")
    assert list(fathom.service().answer_many([QUESTION], route=route, stop=stop)) == []
    assert stop.is_set()
    assert fathom.receipts.since("1970-01-01T00:00:00+00:00") == []


# ---- a budget above a small context -------------------------------------------------------------


def small_context(fathom: Fathom, context: int, **settings: int) -> Fathom:
    changed = fathom.settings.model_copy(update={"max_context_tokens": context, **settings})
    return Fathom(changed, embedder=fathom.embedder, engine=fathom.engine)


@pytest.fixture
def ships(small_fathom: Fathom, tmp_path: Path) -> Fathom:
    path = tmp_path / "ships.txt"
    path.write_text("\n\n".join(f"Paragraph {n} is about ship {n * 7}." for n in range(600)))
    small_fathom.ingest(path)
    return small_fathom


def test_a_budget_that_does_not_fit_is_lowered_to_what_does(ships: Fathom) -> None:
    answer = small_context(ships, 1500, retrieval_tokens=3000).service().answer("ship 77")
    receipt = answer.receipt
    assert receipt.route is Route.RETRIEVAL
    assert "the retrieval budget of 3,000 tokens does not fit (tokens" in receipt.reason
    assert f"so {receipt.read.tokens:,} tokens were retrieved" in receipt.reason
    assert receipt.prompt_tokens + ships.settings.max_new_tokens <= 1500
    assert receipt.read.tokens > 0
    assert all(gate.passed for gate in receipt.gates if gate.route is Route.RETRIEVAL)
    # No chunk more would have fitted.
    roomy = small_context(ships, 4000, retrieval_tokens=receipt.read.tokens).service()
    same = roomy.answer("ship 77", route=Route.RETRIEVAL)
    assert same.receipt.read == receipt.read
    assert "does not fit" not in same.receipt.reason


def test_a_context_without_room_for_one_passage_is_an_error(ships: Fathom) -> None:
    with pytest.raises(ModelError, match="even the retrieved passages do not fit") as raised:
        small_context(ships, 560, retrieval_tokens=3000).service().answer("ship 77")
    assert "FATHOM_MAX_NEW_TOKENS" in (raised.value.hint or "")
