"""Verbatim answers: always a stretch of the text, whatever the text and the model."""

from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import HANDBOOK, fail_to_allocate_once, make_tiny_engine
from eval.bench.quotation import QuotedRow as Row
from eval.bench.quotation import spread, summarise
from eval.evidence_sets import EvidenceDocument, EvidenceQuestion, EvidenceSet
from eval.fit_quotation import conditional_logit, fit_answerable
from rag.answering.answerable import (
    EVIDENCE,
    answer_probability,
    evidence,
    likeliest_sentences,
)
from rag.answering.citations import verified_citation
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.quotation import (
    NUM_SENTENCES,
    SPAN_FEATURES,
    candidate_spans,
    quotation_prompt,
    quote,
    sentence_beside,
)
from rag.answering.replay import replay
from rag.answering.sentence_choice import (
    FEATURES,
    Sentence,
    holds_kind,
    kind_asked_for,
    rank_sentences,
    weights,
)
from rag.lm.catalog import fetched_models, load_catalog
from rag.lm.local_engine import LocalEngine
from rag.retrieval.lexical_score import stems
from rag.settings import Settings
from rag.types import Answer, AnswerMode, Document, Route, answer_from_json
from ui.answer_html import citations_html
from ui.assembly import Fathom

QUESTION = "What is the harbour fee?"

needs_models = pytest.mark.skipif(
    any(
        name not in {model.name for model in fetched_models(Settings())}
        for name in ("smollm2-135m", "all-minilm-l6-v2")
    ),
    reason="the models have not been fetched",
)


def document(number: int = 1) -> Document:
    """Return a document's record; its text is nowhere."""
    return Document(number, "t", "t", 1, True, "0", "text/plain", 1, 1, 0, 1, (), "now")


def sentences(*texts: str, documents: tuple[int, ...] = ()) -> list[Sentence]:
    """Return sentences one after the other, the likeliest first."""
    found, start = [], 0
    for number, text in enumerate(texts):
        of = documents[number] if documents else 1
        found.append(
            Sentence(document(of), start, start + len(text), text, 0.0, 0.5 / 2**number, 0.5, 0.5)
        )
        start += len(text) + 1
    return found


def test_what_a_question_asks_for_is_seen_and_found() -> None:
    assert kind_asked_for("In which year was it built?") == "date"
    assert kind_asked_for("How many berths are there?") == "number"
    assert kind_asked_for("Whom did they elect?") == "who"
    assert kind_asked_for("Which city is it in?") == "where"
    assert kind_asked_for("港はどこですか") is None
    asked = frozenset(stems("When was the Berlin fair of 1936 closed?"))
    assert holds_kind("date", "It closed in 1938.", asked)
    assert not holds_kind("date", "The fair of 1936 was large.", asked)


def test_the_shipped_weights_are_those_of_the_features() -> None:
    assert set(weights()["sentence"]) == set(FEATURES)
    assert set(weights()["span"]) == set(SPAN_FEATURES)
    assert set(weights()["answerable"]) == {*EVIDENCE, "intercept"}


def test_what_the_best_sentence_lacks_speaks_against_an_answer() -> None:
    """A name, a number or a "not" changed: the words as near as before, the answer gone."""
    ranked = sentences("In 1804 the harbour was dredged by Anna.", "It did not freeze.")

    def lacks(question: str) -> tuple[float, float]:
        known = dict(zip(EVIDENCE, evidence(question, ranked), strict=True))
        return known["denied"], known["names_missing"]

    assert lacks("When was the harbour dredged by Anna?") == (0, 0)
    assert lacks("Was the harbour dredged by Bruno in 1905?") == (0, 2)
    assert lacks("When was the harbour not dredged by Anna?") == (1, 0)
    assert lacks("Who? (asked after: What was dredged by Anna?)") == (0, 0)
    told = answer_probability("When was the harbour dredged by Anna?", ranked)
    for question in ("When was it dredged by Bruno?", "When wasn't it dredged by Anna?"):
        assert answer_probability(question, ranked) < told
    ranked.reverse()  # the best sentence denies, too
    assert lacks("Why did it not freeze?") == (0, 0)
    assert all(0 <= answer_probability(q, ranked) <= 1 for q in ("", "?", "A1 " * 9_000))


def test_the_sentence_that_answers_comes_first(small_fathom: Fathom) -> None:
    service, documents = small_fathom.service(), small_fathom.documents()
    retriever = service._retriever
    for question, text in (
        (QUESTION, "The harbour fee is 35 crowns a night."),
        ("On which channel is a berth booked?", "A berth is booked by radio on channel 14."),
        ("How often does the north beacon flash?", "The north beacon flashes green every four"),
    ):
        hits = retriever.retrieve(question, documents, num_candidates=20)
        ranked = rank_sentences(
            question,
            hits,
            documents,
            store=small_fathom.store,
            similarities=retriever.similarities,
        )
        assert ranked[0].text.startswith(text)
        assert sum(sentence.probability for sentence in ranked) == pytest.approx(1)
        for sentence in ranked:
            assert HANDBOOK[sentence.start : sentence.end] == sentence.text


@given(
    texts=st.lists(
        st.text(alphabet=st.sampled_from("aé 漢字かな12.,;\n\"'<eos>$%"), min_size=1, max_size=80),
        min_size=1,
        max_size=5,
    )
)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_quotation_is_always_a_stretch_of_one_sentence(
    tiny_engine: LocalEngine, texts: list[str]
) -> None:
    ranked = sentences(*texts, documents=(1, 2, 1, 2, 1)[: len(texts)])
    found = quote("Where is 12?", ranked, tiny_engine, max_prompt_tokens=2000, stop=Event())
    assert found is not None
    sentence = found.sentence
    assert sentence in ranked
    assert sentence.start <= found.start < found.end <= sentence.end
    assert found.text == sentence.text[found.start - sentence.start : found.end - sentence.start]
    assert found.beside is None or found.beside in ranked


def test_every_span_is_scored_as_the_prompt_and_its_tokens_are(tiny_engine: LocalEngine) -> None:
    ranked = sentences("The fee is 35 crowns.", "漢字です。")
    read = candidate_spans(QUESTION, ranked, tiny_engine, max_prompt_tokens=2000, stop=Event())
    assert read is not None
    spans, prompt_ids = read.spans, read.prompt_ids
    assert prompt_ids == quotation_prompt(QUESTION, ranked, tiny_engine)
    texts = {s.sentence.text[s.start - s.sentence.start : s.end - s.sentence.start] for s in spans}
    # signs of a script without spaces are words of their own; a full stop is none
    assert texts <= {
        *("The", "The fee", "The fee is", "The fee is 35", "The fee is 35 crowns"),
        *("fee", "fee is", "fee is 35", "fee is 35 crowns", "is", "is 35", "is 35 crowns"),
        *("35", "35 crowns", "crowns", "漢", "漢字", "漢字で", "漢字です", "字", "字で", "字です"),
        *("で", "です", "す"),
    }  # fmt: skip
    assert len(texts) >= 6
    assert all(span.features[0] < 0 for span in spans)


def test_sentences_that_do_not_fit_the_prompt_are_left_out_and_one_alone_is_quoted_whole(
    tiny_engine: LocalEngine,
) -> None:
    ranked = sentences(*("word " * 60 + str(n) for n in range(5)))
    whole = len(quotation_prompt(QUESTION, ranked[:NUM_SENTENCES], tiny_engine))
    one = len(quotation_prompt(QUESTION, ranked[:1], tiny_engine))
    fits = quote(QUESTION, ranked, tiny_engine, max_prompt_tokens=whole - 1, stop=Event())
    assert fits is not None
    assert one <= len(fits.prompt_ids) < whole
    unread = quote(QUESTION, ranked, tiny_engine, max_prompt_tokens=50, stop=Event())
    assert unread is not None
    assert unread.text == ranked[0].text
    assert unread.prompt_ids == ()


def test_nothing_to_quote_and_a_stop(tiny_engine: LocalEngine) -> None:
    assert quote(QUESTION, [], tiny_engine, max_prompt_tokens=2000, stop=Event()) is None
    stop = Event()
    stop.set()
    ranked = sentences("The fee is 35 crowns.")
    assert quote(QUESTION, ranked, tiny_engine, max_prompt_tokens=2000, stop=stop) is None


def test_another_sentence_stands_beside_one_that_is_not_sure() -> None:
    first, second, third = sentences("a", "b", "c")
    assert sentence_beside(first, [first, second, third]) is second
    assert sentence_beside(third, [first, second, third]) is first
    sure = Sentence(document(), 0, 1, "a", 0.0, 0.9, 0.5, 0.5)
    assert sentence_beside(sure, [sure, second]) is None


@pytest.mark.parametrize(
    "text", ["fee", "港の使用料は一泊三十五クローネです。", "?!\n\n...", "fee " * 9000]
)
def test_documents_of_any_kind_are_quoted_or_declined(
    library: Fathom, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "odd.txt"
    path.write_text(text, encoding="utf-8")
    stored = library.ingest(path).document
    answer = library.service().answer(QUESTION, mode=AnswerMode.QUOTED)
    check_verbatim(library, stored.id, answer)


def test_a_row_of_a_table_is_quoted_alone_and_a_cell_of_it_is_the_answer(
    library: Fathom, tmp_path: Path
) -> None:
    """What names the columns is shown to the model, wherever in the table the row stands."""
    path = tmp_path / "fees.csv"
    path.write_text("id,name,fee\n" + "".join(f"{n},Boat {n},{3 * n}\n" for n in range(300)))
    stored = library.ingest(path).document
    question = "What is the fee of Boat 277?"
    answer = library.service().answer(question, mode=AnswerMode.QUOTED)
    check_verbatim(library, stored.id, answer)
    rows = path.read_text().splitlines()
    assert all(citation.quote in rows for citation in answer.citations)
    service = library.service()
    hits = service._retriever.retrieve(question, [stored], num_candidates=20)
    ranked = rank_sentences(
        question,
        hits,
        [stored],
        store=library.store,
        similarities=service._retriever.similarities,
    )
    (row,) = [sentence for sentence in ranked if sentence.text == "277,Boat 277,831"]
    assert row in ranked[:NUM_SENTENCES]
    assert {sentence.columns for sentence in ranked} == {"id,name,fee"}
    engine = library.engine
    unnamed = quotation_prompt(question, [replace(row, columns="")], engine)
    named = quotation_prompt(question, [row], engine)
    assert len(named) - len(unnamed) == len(engine.encode("id,name,fee\n"))
    read = candidate_spans(question, [row], engine, max_prompt_tokens=2000, stop=Event())
    assert read is not None
    texts = {row.text[s.start - row.start : s.end - row.start] for s in read.spans}
    assert texts <= {"277", "Boat", "Boat 277", "831"}
    assert "831" in texts


@pytest.mark.parametrize(
    ("text", "question", "first"),
    [
        ("# The harbour fee is 35 crowns\n", QUESTION, "# The harbour fee is 35 crowns"),
        (HANDBOOK, QUESTION, "The harbour fee is 35 crowns a night."),
        (
            "# Changes\n\n## 2.0.0 (2023-11-20)\n\n- New engine\n\n## 1.0.0 (2020-01-15)\n\n- One",
            "When was 2.0.0 published?",
            "## 2.0.0 (2023-11-20)",
        ),
    ],
)
def test_a_heading_is_quoted_where_no_sentence_holds_the_answer(
    library: Fathom, tmp_path: Path, text: str, question: str, first: str
) -> None:
    path = tmp_path / "text.md"
    path.write_text(text)
    stored = library.ingest(path).document
    retriever = library.service()._retriever
    hits = retriever.retrieve(question, [stored], num_candidates=20)
    ranked = likeliest_sentences(
        question, hits, [stored], store=library.store, similarities=retriever.similarities
    )
    assert ranked[0].text == first
    has_headings = any(sentence.text.startswith("#") for sentence in ranked)
    assert has_headings == first.startswith("#")
    answer = library.service().answer(question, mode=AnswerMode.QUOTED)
    check_verbatim(library, stored.id, answer)
    assert answer.citations[0].quote == first


def test_deleting_a_document_drops_the_prompt_that_quoted_it(small_fathom: Fathom) -> None:
    engine = small_fathom.engine
    assert isinstance(engine, LocalEngine)
    answer = small_fathom.service().answer(QUESTION, mode=AnswerMode.QUOTED)
    assert engine._scorer.holds_prompt
    small_fathom.delete(answer.citations[0].document)
    assert not engine._scorer.holds_prompt


def test_without_memory_for_the_model_the_likeliest_sentence_is_quoted_unread(
    small_fathom: Fathom,
) -> None:
    service = small_fathom.service()
    fail_to_allocate_once(small_fathom.engine._model)  # type: ignore[attr-defined]
    answer = service.answer(QUESTION, mode=AnswerMode.QUOTED)
    check_verbatim(small_fathom, answer.citations[0].document, answer)
    (said,) = answer.receipt.escalations
    assert said.startswith("memory ran out")
    assert said.endswith("quoted whole, unread by the model")
    again = service.answer(QUESTION, mode=AnswerMode.QUOTED)
    assert again.receipt.escalations == ()
    assert again.receipt.prompt_tokens > 0


def check_verbatim(fathom: Fathom, document_id: int, answer: Answer) -> None:
    """Check that what an answer shows stands in the document where it says."""
    assert answer.receipt.mode is AnswerMode.QUOTED
    assert answer.receipt.route is Route.RETRIEVAL
    assert answer.receipt.new_tokens == 0
    kv_bytes = answer.receipt.kv_bytes
    assert kv_bytes.predicted == kv_bytes.actual
    assert bool(kv_bytes.actual) == (answer.receipt.prompt_tokens > 0)
    for citation in answer.citations:
        assert citation.document == document_id
        assert citation.verified
        assert fathom.text(document_id, citation.start, citation.end) == citation.quote
    if answer.abstained:
        assert answer.answer.startswith(CANNOT_ANSWER)
    else:
        first = answer.citations[0]
        assert first.answer_start is not None
        assert first.answer_end is not None
        assert first.start <= first.answer_start < first.answer_end <= first.end
        stretch = fathom.text(document_id, first.answer_start, first.answer_end)
        assert answer.answer.startswith(f"{' '.join(stretch.split())}: ")
    assert fathom.receipts.load(answer.receipt.id) == answer
    assert answer_from_json(answer.to_json()) == answer


def test_quotations_never_mix_documents(library: Fathom, tmp_path: Path) -> None:
    numbers = {}
    for name, fee in (("a", 35), ("b", 70)):
        path = tmp_path / f"{name}.txt"
        path.write_text(f"The harbour fee in port {name} is {fee} crowns. Ask the pilot.")
        numbers[name] = library.ingest(path).document.id
    for name, number in numbers.items():
        answer = library.service().answer(QUESTION, document_ids=[number], mode=AnswerMode.QUOTED)
        check_verbatim(library, number, answer)
        assert f"port {name}" in answer.answer


def test_the_mode_and_the_catalog_decide_who_is_quoted(
    small_fathom: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode_of(mode: str, model: str, question: str = QUESTION) -> AnswerMode:
        engine = make_tiny_engine()
        monkeypatch.setattr(engine, "_name", model)
        changed = small_fathom.settings.model_copy(update={"answer_mode": mode})
        fathom = Fathom(changed, embedder=small_fathom.embedder, engine=engine)
        return fathom.service().answer(question).receipt.mode

    assert mode_of("auto", "smollm2-135m") is AnswerMode.QUOTED
    assert mode_of("auto", "smollm2-135m", "Summarise the handbook.") is AnswerMode.WRITTEN
    assert mode_of("auto", "qwen2.5-coder-1.5b") is AnswerMode.WRITTEN
    assert mode_of("auto", "tiny-llama") is AnswerMode.WRITTEN
    assert mode_of("quotation", "tiny-llama") is AnswerMode.QUOTED
    assert mode_of("free", "smollm2-135m") is AnswerMode.WRITTEN


def test_a_quotation_can_be_asked_for_again(small_fathom: Fathom) -> None:
    answer = small_fathom.service().answer(QUESTION, mode=AnswerMode.QUOTED)
    again = replay(answer.receipt.id, small_fathom.receipts, small_fathom.service())
    assert again.differences == ()
    assert again.same_text


def test_the_page_marks_the_answer_in_its_sentence(small_fathom: Fathom) -> None:
    start = HANDBOOK.index("The harbour fee is")
    text = "The harbour fee is 35 crowns a night."
    stored = small_fathom.documents()[0]
    citation = verified_citation(1, stored, start, start + len(text), text, small_fathom.store)
    assert citation.verified
    answer = small_fathom.service().answer(QUESTION)
    marked = replace(citation, answer_start=start + 19, answer_end=start + 28)
    page = citations_html(replace(answer, citations=(marked,)))
    assert "<mark>&#51;5 crowns</mark>&nbsp;a night" in page


def test_the_report_counts_what_was_shown_and_declined() -> None:
    asked = [
        Row(f"q{n}", f"d{n % 2}", True, n != 0, n > 1, n / 4, n == 4, 20 + n, n / 4, 2.0, None)
        for n in range(5)
    ]
    others = [
        Row(f"u{n}", "d0", False, False, False, None, None, 20, n / 4, 1.0, None) for n in range(4)
    ]
    questions = tuple(EvidenceQuestion(row.id, "?", row.document, (), ()) for row in asked)
    evidence = EvidenceSet("s", (EvidenceDocument("d0", "d", "t"),), questions, False)
    report = summarise(evidence, [*asked, *others])
    assert report.contains.mean == pytest.approx(4 / 5)
    assert report.first_contains.mean == pytest.approx(3 / 5)
    assert report.f1 is not None
    assert report.f1.mean == pytest.approx(0.5)
    # probability 0.5 and more answers: three of five; below it two of four decline
    assert report.balanced_accuracy == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert report.risk["1.0"] == pytest.approx(5 / 9, abs=1e-4)
    assert report.risk["0.1"] == 0.0
    assert {q.id for q in spread(questions, 2)} == {"q0", "q2"}
    assert sorted(q.id for q in spread(questions, None)) == [q.id for q in questions]


def test_the_fit_finds_what_separates() -> None:
    without = len(EVIDENCE) - EVIDENCE.index("cosine") - 1
    rows = [((0.0, n / 10, *[0.0] * without), n >= 5) for n in range(10)]
    chosen = [
        (np.array([[n, 1.0], [-n, 1.0], [n / 2, 1.0]]), np.array([1.0, 0.0, 0.1]))
        for n in (1.0, 2.0, 3.0)
    ]
    weights = conditional_logit(chosen, ridge=0.1)
    assert weights[0] > 0.5
    assert weights[1] == pytest.approx(0, abs=1e-6)
    fitted = fit_answerable(rows)
    assert fitted["cosine"] > 0
    assert fitted["cosine"] * 0.45 + fitted["intercept"] == pytest.approx(0, abs=0.2)


@needs_models
@pytest.mark.model
def test_a_small_model_quotes_the_fee(settings: Settings, handbook: Path) -> None:
    fathom = Fathom(settings.model_copy(update={"model": "smollm2-135m"}))
    stored = fathom.ingest(handbook).document
    answer = fathom.service().answer(QUESTION)
    check_verbatim(fathom, stored.id, answer)
    assert "The harbour fee is 35 crowns a night." in answer.answer
    declined = fathom.service().answer("Who won the football world cup in 1966?")
    check_verbatim(fathom, stored.id, declined)
    assert declined.abstained
    assert "is not asked to write" in declined.receipt.reason


def test_a_heading_is_no_sentence(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "fees.md"
    path.write_text(
        "# 2. The harbour fee\n\nThe harbour fee is 35 crowns.\n\n## Who pays the harbour fee?\n\n"
        "Each guest pays. The harbour fee\n\n### The harbour fee\n\nPayment is at the gate.\n"
    )
    report = library.ingest(path)
    hits = library.retriever.retrieve(
        "What is the harbour fee?", [report.document], num_candidates=9
    )
    ranked = rank_sentences(
        "What is the harbour fee?",
        hits,
        [report.document],
        store=library.store,
        similarities=library.retriever.similarities,
    )
    # Words that are a heading elsewhere are a sentence where they stand in the text.
    assert sorted(sentence.text for sentence in ranked) == [
        "Each guest pays.",
        "Payment is at the gate.",
        "The harbour fee",
        "The harbour fee is 35 crowns.",
    ]


def test_a_quotations_receipt_predicts_its_seconds(small_fathom: Fathom) -> None:
    engine = small_fathom.engine
    asked: list[tuple[int, int]] = []
    predict = engine.predicted_prefill_seconds

    def noted(num_tokens: int, *, cached_tokens: int = 0) -> float | None:
        asked.append((num_tokens, cached_tokens))
        return predict(num_tokens, cached_tokens=cached_tokens)

    engine.predicted_prefill_seconds = noted  # type: ignore[method-assign]
    receipt = small_fathom.service().answer(QUESTION, mode=AnswerMode.QUOTED).receipt
    seconds = receipt.seconds
    assert seconds.prefill_predicted is not None
    assert seconds.prefill_predicted > 0
    # Every token that the model reads is in one of the three prefills, the prompt's once.
    prompt = receipt.prompt_tokens
    assert asked[-3:-1] == [(prompt - 1, 0), (prompt, prompt - 1)]
    assert asked[-1][0] > prompt
    assert asked[-1][1] == prompt - 1
    expected = sum(predict(n, cached_tokens=cached) or 0 for n, cached in asked[-3:])
    assert seconds.prefill_predicted == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_of_options_one_is_named_not_quoted(
    small_fathom: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEngine, "name", property(lambda self: "qwen2.5-coder-0.5b"))
    service, documents = small_fathom.service(), small_fathom.documents()
    assert service.plan(QUESTION, documents).decision.mode is AnswerMode.QUOTED
    options = "\n(A) twenty crowns\n(B) thirty crowns"
    assert service.plan(QUESTION + options, documents).decision.mode is AnswerMode.WRITTEN


def test_a_listed_model_is_weighed_by_the_length_it_was_measured_to_use(
    small_fathom: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this machine has not calibrated it; of others the context alone is known."""
    service, documents = small_fathom.service(), small_fathom.documents()
    context_tokens = small_fathom.engine.context_tokens
    assert service.features("What?", documents).effective_tokens == context_tokens
    monkeypatch.setattr(LocalEngine, "name", property(lambda self: "qwen2.5-coder-0.5b"))
    listed = load_catalog()["qwen2.5-coder-0.5b"].effective_tokens
    assert service.features("What?", documents).effective_tokens == listed
    assert listed is not None
