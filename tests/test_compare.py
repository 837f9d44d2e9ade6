"""The same questions by every arm: what each shows, what is written down, what is said of it."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import HashEmbedder
from eval.analysis import Analysis, analyse
from eval.arms import Arm, Workplace
from eval.compare import check_evidence, compare, find_documents, keep_examples, load_comparison
from eval.examples import EvalExample
from eval.held_out import LOG, looks_at
from eval.journal import (
    ANSWERED,
    DOES_NOT_FIT,
    NOT_APPLICABLE,
    Found,
    Journal,
    Row,
    Run,
    read_journals,
)
from eval.policies import ORACLE_ROUTER, SELF_ROUTE
from eval.provenance import sha256_of_files
from eval.report import summary, to_json, write_report
from eval.scoring import TOKEN_BUDGETS, length_bucket, score_row
from rag.answering.planning import Planner
from rag.answering.prompt import CANNOT_ANSWER
from rag.errors import DocumentNotFoundError, ReadError, SettingsError
from rag.lm.engine import GenerationDone, GenerationStep, TextPiece
from rag.lm.local_engine import LocalEngine
from rag.routing.utility import load_weights
from rag.settings import Settings
from rag.types import Answer, Route
from ui.assembly import Fathom
from ui.cli import app
from ui.verbs.comparison import _look

ROOT = Path(__file__).resolve().parents[1]

HARBOUR = "\n\n".join(
    f"Berth {n} of the harbour lies beside the {word} shed. The fee of berth {n} is {30 + n} crowns"
    " a night."
    for n, word in enumerate("red green blue white black brown grey pink".split(), start=1)
)
MILL = "\n\n".join(
    f"Mill number {n} grinds {word}. Its miller came in the year {1800 + n}."
    for n, word in enumerate("wheat rye oats barley maize millet spelt buckwheat".split(), start=1)
)


def _example(name: str, question: str, document: str, answer: str, text: str) -> EvalExample:
    start = text.index(answer) if answer else 0
    evidence = ((start, start + len(answer)),) if answer else ()
    return EvalExample(
        name, question, document, (answer,) if answer else (), bool(answer), evidence
    )


EXAMPLES = [
    _example("h1", "What is the fee of berth 3?", "harbour.txt", "33 crowns", HARBOUR),
    _example("h2", "Which shed lies beside berth 7?", "harbour.txt", "grey shed", HARBOUR),
    _example("h3", "Who owns the quay?", "harbour.txt", "", HARBOUR),
    _example("m1", "What does mill number 2 grind?", "mill.txt", "rye", MILL),
    _example("m2", "When did the miller of mill 8 come?", "mill.txt", "1808", MILL),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_engine: LocalEngine) -> Workplace:
    """Return a library of two short texts, with a budget of a third of either."""
    folder = tmp_path_factory.mktemp("library")
    settings = Settings(
        home=folder / "home",
        chunk_tokens=32,
        retrieval_tokens=220,
        max_new_tokens=8,
        kv_reserve_bytes=0,
        prefill_deadline_seconds=1e9,
        document_kv_disk_bytes=0,
    )
    fathom = Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine)
    for name, text in (("harbour.txt", HARBOUR), ("mill.txt", MILL)):
        (folder / name).write_text(text)
        fathom.ingest(folder / name)
    return _workplace(fathom)


@pytest.fixture(scope="module")
def every_arm(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which every arm has answered the examples."""
    folder = tmp_path_factory.mktemp("every") / "report"
    keep_examples(EXAMPLES, folder)
    _compare(place, folder)
    return folder


def _workplace(fathom: Fathom) -> Workplace:
    return Workplace(
        store=fathom.store,
        retriever=fathom.retriever,
        engine=fathom.engine,
        settings=fathom.settings,
        calibrations=None,
        forget=lambda document: fathom.document_kv.forget({document.version_key}),
    )


def _run(**changes: Any) -> Run:  # noqa: ANN401
    values: dict[str, Any] = {
        "command": "fathom compare",
        "data": "two texts",
        "examples_sha256": "e",
        "documents": {"harbour.txt": "a", "mill.txt": "b"},
        "model": "tiny",
        "model_sha256": "m",
        "context_tokens": 4096,
        "effective_tokens": None,
        "embedder": "hash",
        "settings": {"retrieval_tokens": 220},
        "seed": 0,
        "commit": "c",
        "device": "a machine",
        "num_threads": 1,
        "versions": {"torch": "2"},
        "started": "2026-01-01T00:00:00+00:00",
    }
    return Run(**values | changes)


def _compare(
    place: Workplace,
    folder: Path,
    arms: Sequence[Arm] = tuple(Arm),
    examples: Sequence[EvalExample] = EXAMPLES,
    **more: Any,  # noqa: ANN401
) -> Journal:
    documents = find_documents(examples, place.store.find)
    return compare(examples, documents, arms, place, _run(), folder, **more)


def _by_arm(journal: Journal) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in journal.rows:
        found.setdefault(row.arm, {})[row.example_id] = row
    return found


# ---- what each arm shows ------------------------------------------------------------------------


def test_every_arm_shows_what_its_name_says(place: Workplace, every_arm: Path) -> None:
    """C0.4: closed book and oracle stand among them; the oracle router is reckoned from two."""
    rows = _by_arm(read_journals(every_arm))
    assert list(rows) == [str(arm) for arm in Arm]
    assert all(len(found) == len(EXAMPLES) for found in rows.values())
    texts = {"harbour.txt": HARBOUR, "mill.txt": MILL}
    for example in EXAMPLES:
        whole = ((0, len(texts[example.document])),)
        assert rows["closed"][example.id].shown == ()
        assert rows["full"][example.id].shown == rows["windowed"][example.id].shown == whole
        for arm in ("random", "lexical", "dense", "hybrid", "last"):
            row = rows[arm][example.id]
            assert row.shown
            shown = " ".join(texts[example.document][start:end] for start, end in row.shown)
            assert 0 < len(shown) <= place.settings.retrieval_tokens + 20  # a byte is a token here
        last = rows["last"][example.id].shown
        assert last is not None
        assert last[-1][1] == whole[0][1]
        oracle = rows["oracle"][example.id]
        if not example.answerable:
            assert oracle.outcome == NOT_APPLICABLE
            continue
        assert oracle.shown is not None
        (start, end), row = example.evidence[0], oracle
        assert any(a <= start and end <= b for a, b in row.shown or ())
    random = [rows["random"][example.id].shown for example in EXAMPLES[:3]]
    assert len(set(random)) > 1  # another draw for each question
    assert rows["lexical"]["h1"].ranked != rows["dense"]["h1"].ranked


def test_one_template_with_the_question_last(
    place: Workplace, every_arm: Path, tmp_path: Path
) -> None:
    """C0.1 and C0.3: arms differ in the passages alone."""
    rows = _by_arm(read_journals(every_arm))
    for example in EXAMPLES:
        assert rows["closed"][example.id].prompt == f"Question: {example.question}"
        for arm in ("random", "lexical", "dense", "hybrid", "last"):
            row = rows[arm][example.id]
            assert row.prompt.startswith("Passages:\n\n")
            assert row.prompt.endswith(f"\n\nQuestion: {example.question}")
            assert row.answer is not None
            assert row.answer.receipt.new_tokens <= place.settings.max_new_tokens
    # Greedy: asked again, the same comes out.
    again = _by_arm(_compare(place, tmp_path / "again", [Arm.HYBRID, Arm.RANDOM]))
    for arm, found in again.items():
        for name, other in found.items():
            row = rows[arm][name]
            assert (row.answer and row.answer.answer) == (other.answer and other.answer.answer)


def test_the_order_of_the_prompt_is_an_arm(every_arm: Path) -> None:
    """C0.1: order is a factor of its own; all else is hybrid's."""
    rows = _by_arm(read_journals(every_arm))
    for example in EXAMPLES:
        row, hybrid = rows["question_first"][example.id], rows["hybrid"][example.id]
        question = f"Question: {example.question}"
        assert hybrid.prompt.endswith(f"\n\n{question}")
        assert row.prompt == f"{question}\n\n{hybrid.prompt.removesuffix(question).rstrip()}"
        assert (row.shown, row.ranked) == (hybrid.shown, hybrid.ranked)
        assert row.answer is not None
        assert hybrid.answer is not None
        assert row.answer.receipt.prompt_sha256 != hybrid.answer.receipt.prompt_sha256
        assert row.answer.receipt.read.tokens == hybrid.answer.receipt.read.tokens


def test_a_document_is_read_once_for_all_its_questions(place: Workplace, tmp_path: Path) -> None:
    """Fact 2: so from L / (T_rag - T_q) questions on, reading everything computes less."""
    many = [
        replace(EXAMPLES[0], id=f"q{n}", question=f"What is the fee of berth {n % 8 + 1}, no. {n}?")
        for n in range(12)
    ]
    rows = _by_arm(_compare(place, tmp_path / "report", [Arm.HYBRID, Arm.FULL], many))

    def computed(arm: str) -> list[int]:
        receipts = [row.answer.receipt for row in rows[arm].values() if row.answer]
        return [r.prompt_tokens - (r.cached_tokens or 0) for r in receipts]

    full, hybrid = sorted(computed("full")), computed("hybrid")
    assert len(full) == len(hybrid) == 12
    assert full[-1] > len(HARBOUR)  # one question pays for the document
    assert full[-2] < 200  # the others for themselves
    break_even = (full[-1] - full[0]) / (max(hybrid) - full[0])
    assert break_even < 12
    assert sum(full) < sum(hybrid)


def test_a_window_as_long_as_the_text_is_the_whole_text(place: Workplace) -> None:
    """And a shorter one forgets: the control for what a retro-fitted window does not know."""
    engine, document = _engine_of(place), place.store.find("harbour.txt")
    planner = Planner(place.store, place.retriever, engine, place.settings)
    plans = [
        planner.plan(example.question, [document], route=Route.FULL) for example in EXAMPLES[:2]
    ]
    prefix = plans[0].prefix
    assert prefix is not None

    def written(steps: Iterator[tuple[int, GenerationStep]]) -> dict[int, tuple[str, int]]:
        texts = {0: "", 1: ""}
        tokens = {}
        for number, step in steps:
            if isinstance(step, TextPiece):
                texts[number] += step.text
            elif isinstance(step, GenerationDone):
                tokens[number] = step.kv_tokens or 0
        return {number: (texts[number], tokens[number]) for number in texts}

    prompts = [plan.prompt for plan in plans]
    whole = written(engine.generate_many(prompts, max_new_tokens=8, stop=Event(), prefix=prefix))

    def through(window: int) -> dict[int, tuple[str, int]]:
        return written(
            engine.generate_windowed(
                prompts, prefix, num_sinks=4, window=window, max_new_tokens=8, stop=Event()
            )
        )

    long = through(4000)
    assert {n: text for n, (text, _) in long.items()} == {n: text for n, (text, _) in whole.items()}
    assert all(kept <= 4 + 100 - 1 for _, kept in through(100).values())
    assert all(kept > prefix.num_tokens for _, kept in long.values())


def test_no_arm_reads_for_free_what_another_paid_for(place: Workplace, tmp_path: Path) -> None:
    rows = _by_arm(_compare(place, tmp_path / "report", [Arm.FULL, Arm.WINDOWED]))
    again = _by_arm(_compare(place, tmp_path / "again", [Arm.FULL]))
    for found in (rows["full"], again["full"]):
        cached = [row.answer.receipt.cached_tokens for row in found.values() if row.answer]
        assert cached.count(0) == 2  # one of each document


def test_what_does_not_fit_is_never_cut(tmp_path: Path, place: Workplace) -> None:
    """C0.2: it is its own stratum, in no mean and in no pair."""
    long_text = "\n\n".join(f"Line {n} says {n * 7}." for n in range(400))
    (tmp_path / "long.txt").write_text(long_text)
    (tmp_path / "more").mkdir()
    fathom = Fathom(place.settings, embedder=HashEmbedder(), engine=_engine_of(place))
    fathom.ingest(tmp_path / "long.txt")
    examples = [*EXAMPLES, _example("l1", "What does line 9 say?", "long.txt", "63", long_text)]
    journal = _compare(_workplace(fathom), tmp_path / "report", [Arm.HYBRID, Arm.FULL], examples)
    rows = _by_arm(journal)
    assert rows["full"]["l1"].outcome == DOES_NOT_FIT
    assert rows["full"]["l1"].answer is None
    assert "fails a gate" in rows["full"]["l1"].reason
    assert rows["full"]["l1"].document_tokens == len(long_text) > 4096
    assert rows["hybrid"]["l1"].outcome == ANSWERED
    analysis = analyse(examples, journal)
    full = next(arm for arm in analysis.arms if arm.arm == "full")
    assert (full.num_questions, full.does_not_fit) == (5, 1)
    assert next(p for p in analysis.pairs if p.first == "full").num_pairs == 5
    assert any("do not fit" in line for line in analysis.verdict)


def _engine_of(place: Workplace) -> LocalEngine:
    assert isinstance(place.engine, LocalEngine)
    return place.engine


def test_only_the_oracle_sees_the_evidence(
    place: Workplace, every_arm: Path, tmp_path: Path
) -> None:
    """The router may not know where the answer stands, nor what another arm said."""
    rows = _by_arm(read_journals(every_arm))
    blind = [replace(example, evidence=()) for example in EXAMPLES]
    others = _by_arm(_compare(place, tmp_path / "without", examples=blind))
    for arm in Arm:
        for example in EXAMPLES:
            row, other = rows[arm][example.id], others[arm][example.id]
            if arm is Arm.ORACLE:
                assert other.outcome == NOT_APPLICABLE
            else:
                assert (row.shown, row.ranked) == (other.shown, other.ranked)
                assert (row.answer and row.answer.answer) == (other.answer and other.answer.answer)


# ---- the journal --------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_killed(place: Workplace, tmp_path: Path) -> None:
    whole = _compare(place, tmp_path / "whole", [Arm.CLOSED, Arm.FULL])
    folder = tmp_path / "killed"
    _compare(place, folder, [Arm.CLOSED])
    path = folder / "rows.jsonl"
    lines = path.read_bytes().split(b"\n")
    # Of the second document nothing but half a row.
    path.write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:30])
    assert len(read_journals(folder).rows) == 3
    asked: list[tuple[str, int, int]] = []
    resumed = _compare(
        place, folder, [Arm.CLOSED, Arm.FULL], on_progress=lambda *told: asked.append(told)
    )
    assert [told[1] for told in asked] == sorted(told[1] for told in asked)
    assert asked[-1][1:] == (10, 10)
    assert len(resumed.runs) == 2
    assert {(r.example_id, r.arm) for r in resumed.rows} == whole.done
    assert {r.run for r in resumed.rows} == {0, 1}
    for row in resumed.rows:
        (same,) = [r for r in whole.rows if (r.example_id, r.arm) == (row.example_id, row.arm)]
        assert row.answer is not None
        assert same.answer is not None
        assert row.answer.answer == same.answer.answer
    before = path.read_bytes()
    _compare(place, folder, [Arm.CLOSED, Arm.FULL])
    added = path.read_bytes()[len(before) :]
    assert added.count(b"\n") == 1  # who ran; nothing was asked twice
    assert "run" in json.loads(added)


def test_shards_together_are_the_whole(place: Workplace, tmp_path: Path) -> None:
    whole = _compare(place, tmp_path / "whole", [Arm.CLOSED])
    folder = tmp_path / "shards"
    for number in (1, 2, 3):  # the third has nothing to do
        _compare(place, folder, [Arm.CLOSED], shard=(number, 3))
    names = sorted(path.name for path in folder.glob("rows*.jsonl"))
    assert names == ["rows-1-of-3.jsonl", "rows-2-of-3.jsonl", "rows-3-of-3.jsonl"]
    assert read_journals(folder).done == whole.done
    # Journals of shards may be laid beside each other from several machines.
    (folder / "rows-9.jsonl").write_bytes((tmp_path / "whole" / "rows.jsonl").read_bytes())
    assert read_journals(folder).done == whole.done


@pytest.mark.parametrize(
    "change", [{"model_sha256": "other"}, {"examples_sha256": "x"}, {"settings": {}}, {"seed": 1}]
)
def test_rows_of_other_things_are_not_mixed(
    place: Workplace, tmp_path: Path, change: dict[str, Any]
) -> None:
    _compare(place, tmp_path, [Arm.CLOSED])
    documents = find_documents(EXAMPLES, place.store.find)
    with pytest.raises(SettingsError, match=f"made with another {next(iter(change))}"):
        compare(EXAMPLES, documents, [Arm.CLOSED], place, _run(**change), tmp_path)


def test_other_examples_and_a_second_writer_are_refused(place: Workplace, tmp_path: Path) -> None:
    keep_examples(EXAMPLES, tmp_path)
    keep_examples(EXAMPLES, tmp_path)
    with pytest.raises(ReadError, match="holds other examples"):
        keep_examples(EXAMPLES[:2], tmp_path)
    seen: list[str] = []

    def write_too(*_: object) -> None:
        if not seen:
            seen.append("tried")
            with pytest.raises(SettingsError, match="another process is writing"):
                _compare(place, tmp_path, [Arm.CLOSED])

    _compare(place, tmp_path, [Arm.CLOSED], on_progress=write_too)
    assert seen
    (tmp_path / "rows.jsonl").write_bytes(b'{"x": 1}\n')
    with pytest.raises(ReadError, match=r"rows\.jsonl, line 1"):
        read_journals(tmp_path)
    with pytest.raises(ReadError, match="holds no comparison"):
        load_comparison(tmp_path / "none")


def test_unknown_documents_and_evidence_outside_are_all_named(place: Workplace) -> None:
    strangers = [replace(EXAMPLES[0], document="x"), replace(EXAMPLES[1], document="y")]
    with pytest.raises(DocumentNotFoundError) as caught:
        find_documents([*EXAMPLES, *strangers], place.store.find)
    assert "'x'" in caught.value.message
    assert "'y'" in caught.value.message
    wrong = [
        replace(EXAMPLES[0], evidence=((0, len(HARBOUR) + 1),)),
        replace(EXAMPLES[1], evidence=(), pages=(3,)),
    ]
    with pytest.raises(ReadError) as found:
        check_evidence(wrong, find_documents(wrong, place.store.find), place.store)
    assert "example h1: evidence" in found.value.message
    assert "example h2: harbour.txt has no page 3" in found.value.message


# ---- what is said -------------------------------------------------------------------------------


@pytest.fixture
def answer(place: Workplace, tmp_path: Path) -> Answer:
    """Return an answer with its receipt, to put other words in."""
    (row,) = _compare(place, tmp_path / "one", [Arm.HYBRID], EXAMPLES[:1]).rows
    assert row.answer is not None
    return replace(row.answer, abstained=False, citations=())


def _made(answer: Answer, right: Mapping[str, Sequence[bool]], documents: int = 4) -> Journal:
    """Return rows in which each arm answers rightly or not, as told, over some documents."""
    rows = []
    for arm, outcomes in right.items():
        for number, is_right in enumerate(outcomes):
            said = replace(answer, answer="33 crowns [1]" if is_right else "44 crowns [1]")
            rows.append(
                Row(
                    example_id=str(number),
                    arm=arm,
                    outcome=ANSWERED,
                    reason="",
                    document=str(number % documents),
                    document_tokens=1000,
                    num_chars=1000,
                    num_chunks=10,
                    gold=((0, 9),),
                    shown=((0, 9),) if is_right else ((500, 600),),
                    ranked=(Found(0, 9, 5, 0, 0.5, 0.9 if is_right else 0.1),),
                    prompt="",
                    answer=said,
                    verbatim=True,
                    seconds=2.0,
                )
            )
    return Journal((_run(),), tuple(rows))


def _questions(number: int) -> list[EvalExample]:
    return [replace(EXAMPLES[0], id=str(n)) for n in range(number)]


def _analysis(answer: Answer, right: Mapping[str, Sequence[bool]]) -> Analysis:
    number = len(next(iter(right.values())))
    return analyse(_questions(number), _made(answer, right), load_weights())


def test_a_clear_difference_is_shown(answer: Answer) -> None:
    right = {"hybrid": [True] * 40 + [False] * 40, "full": [True] * 70 + [False] * 10}
    analysis = _analysis(answer, right)
    (pair,) = analysis.pairs
    assert (pair.only_first, pair.only_second, pair.num_pairs) == (30, 0, 80)
    assert pair.difference.mean == pytest.approx(0.375)
    assert pair.p_value == pytest.approx(2 / 2**30)
    assert pair.words == "full is better than hybrid"
    assert analysis.verdict[0].startswith("Full is better than hybrid: +37.5 points [")
    other = {"closed": right["hybrid"], "hybrid": right["full"]}  # the better one is the second
    assert (
        _analysis(answer, other)
        .verdict[0]
        .startswith("Hybrid is better than closed: +37.5 points [")
    )
    full = next(arm for arm in analysis.arms if arm.arm == "full")
    assert full.score.mean == pytest.approx(70 / 80)
    assert full.score.low < 70 / 80 < full.score.high
    assert full.seconds_a_right_answer == pytest.approx(160 / 70)
    assert (full.shown, full.correct_if_shown, full.correct_if_not) == (70 / 80, 1.0, 0.0)


def test_an_interval_with_zero_shows_no_difference(answer: Answer) -> None:
    hybrid = [n // 4 % 2 == 0 for n in range(80)]
    right = {"hybrid": hybrid, "full": [was ^ (n % 5 == 0) for n, was in enumerate(hybrid)]}
    analysis = _analysis(answer, right)
    (pair,) = analysis.pairs
    assert (pair.only_first, pair.only_second) == (8, 8)
    assert pair.words == "no difference shown"
    assert analysis.verdict[0] == "No difference is shown between any two ways to answer."
    assert "no difference shown" in analysis.verdict[1]
    assert "better" not in " ".join(analysis.verdict)
    assert 0.05 < pair.detectable <= 1  # and what 80 questions could have shown stands beside it
    assert "in 4 of 5 runs" in analysis.verdict[1]


def test_equal_answers_of_many_questions_are_shown_to_be_equal(answer: Answer) -> None:
    outcomes = [True, False] * 100
    analysis = _analysis(answer, {"hybrid": outcomes, "full": outcomes})
    assert analysis.pairs[0].words == "no difference shown, and shown to be within 5 points"
    few = _analysis(answer, {"hybrid": [True, False, True], "full": [True, True, False]})
    assert few.pairs[0].words == "no difference shown"
    assert few.pairs[0].detectable == 1.0
    assert "too few to show any" in few.verdict[1]


def test_several_comparisons_are_paid_for(answer: Answer) -> None:
    """C0.11: what one comparison would show, seven do not."""
    base = [True] * 20 + [False] * 20
    better = [True] * 26 + [False] * 14  # 6 to nothing: p = 2/64
    alone = _analysis(answer, {"hybrid": base, "full": better})
    assert alone.pairs[0].words == "full is better than hybrid"
    arms = {str(arm): base for arm in (Arm.CLOSED, Arm.RANDOM, Arm.LEXICAL, Arm.DENSE, Arm.LAST)}
    among = _analysis(answer, {**arms, "hybrid": base, "full": better})
    (pair,) = [p for p in among.pairs if p.first == "full"]
    assert pair.holm == pytest.approx(6 * 2 / 64)
    assert pair.words == "no difference shown"


def test_questions_known_closed_book_are_told_apart(answer: Answer) -> None:
    """C0.9: the headline beside the score is of the others."""
    right = {"closed": [True] * 10 + [False] * 30, "hybrid": [True] * 20 + [False] * 20}
    analysis = _analysis(answer, right)
    hybrid = next(arm for arm in analysis.arms if arm.arm == "hybrid")
    assert hybrid.score.mean == 0.5
    assert hybrid.rest is not None
    assert hybrid.rest.mean == pytest.approx(10 / 30)


def test_risk_falls_where_the_nearest_evidence_is_right(answer: Answer) -> None:
    """The arms share the order of hybrid's ranking, whether they rank or not."""
    right = {"hybrid": [True] * 10 + [False] * 10, "full": [True] * 10 + [False] * 10}
    journal = _made(answer, right)
    rows = [replace(row, ranked=()) if row.arm == "full" else row for row in journal.rows]
    analysis = analyse(_questions(20), Journal(journal.runs, tuple(rows)))
    assert analysis.risk["full"] == analysis.risk["hybrid"] == ((0.5, 0.0), (1.0, 0.5))
    assert {arm.aurc for arm in analysis.arms[:2]} == {0.125}


def test_derived_policies_pay_for_what_they_read(answer: Answer) -> None:
    right = {"hybrid": [True, False, True, False], "full": [True, True, False, False]}
    journal = _made(answer, {**right, "router": [True, True, False, False]})
    refused = replace(answer, answer=CANNOT_ANSWER, abstained=True)
    rows = [
        replace(row, answer=refused) if (row.arm, row.example_id) == ("hybrid", "1") else row
        for row in journal.rows
    ]
    analysis = analyse(_questions(4), Journal(journal.runs, tuple(rows)), load_weights())
    by_arm = {arm.arm: arm for arm in analysis.arms}
    assert by_arm[ORACLE_ROUTER].score.mean == 0.75
    assert by_arm[SELF_ROUTE].score.mean == 0.75  # right, wrong then right, right, wrong
    tokens = answer.receipt.prompt_tokens
    assert by_arm[SELF_ROUTE].prompt_tokens == pytest.approx(tokens * 5 / 4)
    assert analysis.gap_closed == 0.0
    assert analysis.curve
    assert all(0 <= point.score <= 1 for point in analysis.curve)


def test_a_row_is_scored_by_its_metric(answer: Answer) -> None:
    example, (row,) = EXAMPLES[0], _made(answer, {"hybrid": [True]}).rows

    def score(words: str, **changes: Any) -> float:  # noqa: ANN401
        scored = score_row(
            replace(example, **changes), replace(row, answer=replace(answer, answer=words))
        )
        assert scored is not None
        return scored.score

    assert score("It is 33 crowns [1]") == 1.0
    assert score("31, 32, 33 crowns, 34") == 0.0  # everything named
    assert score("33 crowns a night", metric="f1") == pytest.approx(2 * 2 / 5)
    assert score("33.00", metric="number", answers=("33",)) == 1.0
    options = {"options": {"A": "31", "B": "33"}, "metric": "option", "answers": ("B",)}
    assert score("(B)", **options) == 1.0
    assert score("(A) or (B)", **options) == 0.0
    assert score(CANNOT_ANSWER, answers=(), answerable=False) == 1.0
    assert score("33", answers=(), answerable=False) == 0.0
    assert score("The passages do not mention a fee.") == 0.0
    failed = replace(row, outcome=DOES_NOT_FIT, answer=None)
    assert score_row(example, failed) is None


def test_the_sweep_over_budgets_fills_each_as_the_product_does(answer: Answer) -> None:
    """C0.5: evidence read within each budget, from one ranking; 4,096 tokens at most."""
    ranked = (
        Found(500, 900, 500, 5, 0.9, 0.9),
        Found(0, 9, 600, 0, 0.8, 0.8),  # the evidence: 500 before it, so it fits from 1,100 on
        Found(100, 300, 12, 1, 0.7, 0.7),
    )
    row = replace(_made(answer, {"hybrid": [True]}).rows[0], ranked=ranked)
    scored = score_row(_questions(1)[0], row)
    assert scored is not None
    assert dict(zip(TOKEN_BUDGETS, scored.recall_at_tokens, strict=True)) == {
        256: 0, 512: 0, 1024: 0, 2048: 1, 4096: 1
    }  # fmt: skip
    analysis = analyse(_questions(1), Journal((_run(),), (row,)))
    (hybrid,) = [result for result in analysis.arms if result.arm == "hybrid"]
    assert {name: hybrid.recall[name] for name in ("1024 tokens", "2048 tokens")} == {
        "1024 tokens": 0, "2048 tokens": 1
    }  # fmt: skip


def test_lengths_sort_as_they_grow() -> None:
    names = [length_bucket(n) for n in (1, 2_000, 2_001, 9_000, 40_000, 127_000, 128_001)]
    assert names == sorted(names)
    assert length_bucket(2_000).strip() == "0-2k tokens"
    assert length_bucket(128_001).strip() == "128k tokens and more"


class _Page(HTMLParser):
    """Sees that tags close in the order in which they opened, and what is linked."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.linked: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert tag != "script"
        self.linked += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _opened(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    for name in page.linked:
        assert (path.parent / name).stat().st_size > 0
    return page


def test_the_report_opens_and_can_be_made_again(
    place: Workplace, every_arm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "rows-of-others.jsonl").write_bytes((every_arm / "rows.jsonl").read_bytes())
    named = replace(
        EXAMPLES[0], id="<b>&", question="Is <script>alert(1)</script> the fee of berth 3?"
    )
    examples = [named, *EXAMPLES]
    keep_examples(examples, folder)
    journal = _compare(place, folder, examples=examples)
    analysis = analyse(examples, journal, load_weights())
    page = _opened(write_report(analysis, examples, journal, folder))
    assert "Verdict" in page.text
    assert "no difference shown" in page.text
    assert "fathom compare" in page.text
    assert {name for name in page.linked if name.endswith(".png")} == {
        "heatmap.png", "cost.png", "waterfall.png", "risk.png", "recall.png"
    }  # fmt: skip
    failures = _opened(folder / "failures.html")
    assert "Where the arms disagree" in failures.text
    numbers = json.loads((folder / "report.json").read_text())
    assert {arm["arm"] for arm in numbers["arms"]} >= {*map(str, Arm), ORACLE_ROUTER, SELF_ROUTE}
    run = numbers["runs"][-1]
    for key in ("command", "commit", "device", "model_sha256", "examples_sha256", "documents"):
        assert run[key]
    # Offline: the folder alone gives the same numbers.
    asked, rows = load_comparison(folder)
    assert to_json(analyse(asked, rows, load_weights())) == to_json(analysis) == numbers
    assert "full" in summary(analysis)
    elsewhere = tmp_path / "public"
    page = _opened(write_report(analysis, examples, journal, elsewhere, with_failures=False))
    assert not (elsewhere / "failures.html").exists()
    assert "alert(1)" not in page.text


def test_rows_carry_what_an_audit_asks_for(place: Workplace, tmp_path: Path) -> None:
    """C0.10 and fact 9: tokens are the model's own."""
    for row in _compare(place, tmp_path, [Arm.HYBRID, Arm.FULL]).rows:
        assert row.answer is not None
        receipt = row.answer.receipt
        assert len(receipt.prompt_sha256) == 64
        assert receipt.seconds.total > 0
        assert receipt.prompt_tokens > 0
        text = place.store.text(place.store.find(row.document).id)
        assert row.document_tokens == place.engine.count_tokens(text) == len(text)
        assert row.verbatim
        assert row.gold == tuple(next(e for e in EXAMPLES if e.id == row.example_id).evidence)


def test_looks_at_held_out_questions_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C0.12: a comparison on `test` is written down, and says how often that was done."""
    home, one, other = tmp_path / "home", tmp_path / "one", tmp_path / "other"
    for number, folder in enumerate((one, other)):
        folder.mkdir()
        (folder / "questions.jsonl.gz").write_bytes(gzip.compress(b"%d" % number))
    begins = [keep_examples(EXAMPLES, tmp_path / "report") for _ in range(2)]
    assert begins == [True, False]
    first, second = sha256_of_files(one), sha256_of_files(other)
    assert [_look(home, "one test", first, is_new=is_new) for is_new in begins] == [1, 1]
    assert "one test: looked at for the first time here" in capsys.readouterr().err
    with (home / LOG).open("ab") as log:
        log.write(b'{"data": "one te')  # as a process that was killed leaves it
    assert _look(home, "one test", first, is_new=True) == 2
    assert "look 2 at these held-out questions" in " ".join(capsys.readouterr().err.split())
    assert _look(home, "other test", second, is_new=True) == 1
    looks = looks_at(home, first)
    assert [look.data for look in looks] == ["one test"] * 2
    analysis = analyse(EXAMPLES, Journal((_run(held_out_looks=2),), ()))
    page = write_report(analysis, EXAMPLES, Journal((), ()), tmp_path / "page").read_text()
    assert "comparison 2 on these held-out questions" in page


def test_a_table_of_no_rows_says_so() -> None:
    analysis = analyse(EXAMPLES, Journal((), ()))
    assert not analysis.arms
    assert not analysis.pairs
    assert json.dumps(to_json(analysis), allow_nan=False)
    assert not math.isnan(analysis.num_rows_missing)


# ---- the command --------------------------------------------------------------------------------


def test_what_is_asked_wrongly_costs_no_model(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, folder = tmp_path / "questions.jsonl", tmp_path / "report"
    table.write_text("\n".join(json.dumps(example.to_json()) for example in EXAMPLES))
    keep_examples(EXAMPLES, folder)

    def words(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["compare", *arguments])
        assert result.exit_code == (2 if isinstance(result.exception, SystemExit) else 1)
        message = getattr(result.exception, "message", "")
        return " ".join((message + result.output).replace("│", " ").split())

    there = [str(table), "-o", str(folder)]
    assert "give a table of questions, or --rescore" in words()
    assert "give a table of questions, or --rescore" in words(*there, "--rescore", str(folder))
    assert "known are: closed, random" in words(*there, "--arms", "fulll")
    assert "expected i/n" in words(*there, "--shard", "3/2")
    assert "holds other examples" in words(*there, "--limit", "2")
    assert "holds no comparison" in words("--rescore", str(tmp_path))


@pytest.fixture(scope="module")
def models_dir() -> Path:
    """Return the folder of fetched models, if those of the tests are there."""
    folder = Settings().models_dir
    for name in ("smollm2-135m", "all-minilm-l6-v2"):
        if not (folder / name / "config.json").exists():
            pytest.skip(f"{name} is not fetched")
    return folder


@pytest.mark.model
def test_killed_and_gone_on_with_a_real_model(models_dir: Path, tmp_path: Path) -> None:
    for name, text in (("harbour.txt", HARBOUR), ("mill.txt", MILL)):
        (tmp_path / name).write_text(text)
    table = tmp_path / "questions.jsonl"
    table.write_text("\n".join(json.dumps(example.to_json()) for example in EXAMPLES))
    environment = os.environ | {
        "FATHOM_HOME": str(tmp_path / "home"),
        "FATHOM_MODELS_DIR": str(models_dir),
        "FATHOM_MODEL": "smollm2-135m",
        "PYTHONPATH": str(ROOT),
    }
    program = [sys.executable, "-m", "ui.cli"]

    def fathom(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    ingested = fathom("ingest", "harbour.txt", "mill.txt")
    assert ingested.returncode == 0, ingested.stderr
    folder = tmp_path / "report"
    asking = ["compare", str(table), "-o", str(folder), "--max-new-tokens", "12"]
    journal = folder / "rows.jsonl"
    with subprocess.Popen(
        [*program, *asking], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > 3:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    kept = read_journals(folder).done
    assert 0 < len(kept) < 20

    done = fathom(*asking, "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["num_rows_missing"] == 0
    assert len(numbers["runs"]) == 2
    assert {arm["num_questions"] for arm in numbers["arms"]} == {5}
    assert kept < read_journals(folder).done
    full = [row for row in read_journals(folder).rows if row.arm == "full"]
    assert all(row.answer and row.answer.receipt.route is Route.FULL for row in full)
    _opened(Path(numbers["report"]))

    scored = fathom("compare", "--rescore", str(folder), "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout) == numbers
