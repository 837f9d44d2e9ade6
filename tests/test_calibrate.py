"""Effective length: the estimate against a known truth, runs that are killed, and the gate."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from conftest import HashEmbedder, make_tiny_engine
from eval.calibrate import (
    CalibrationProgress,
    Run,
    Step,
    ask,
    calibrate,
    lengths_within,
    possible_lengths,
    quick_lengths,
)
from eval.effective_length import KEPT_SHARE, effective_tokens, estimate_length
from eval.judge_calibration import judge
from eval.synthetic import Mix, Task
from eval.synthetic_words import NON_LITERAL
from rag.answering.prompt import CANNOT_ANSWER
from rag.errors import ModelError
from rag.lm.catalog import fetched_models
from rag.lm.document_kv import DocumentKV
from rag.lm.local_engine import LocalEngine
from rag.lm.shared_prefix import can_share
from rag.routing.model_plan import plan_model
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore, EffectiveLength
from rag.store.database import Database
from rag.types import Route
from test_model_plan import known_spec
from test_remote_engine import FaultyServer, piece, stream
from ui.assembly import Fathom
from ui.plots import draw_calibration
from ui.verbs.model_plan import ranges_text

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = np.array([512.0, 1024, 2048, 4096, 8192])
TINY_LENGTHS = (1536, 2048)  # in bytes, which are the tiny model's tokens
calibrate_here = partial(calibrate, dtype="32 bits", device="a test")


# ---- the estimate -----------------------------------------------------------------------------


def curve(lengths: Any, middle: float) -> Any:  # noqa: ANN401 - numpy in, numpy out
    """Return a true accuracy that falls from 0.95 to half of it at `middle` tokens."""
    return 0.95 / (1 + (lengths / middle) ** 1.6)


def true_length(middle: float) -> float:
    fine = np.geomspace(LENGTHS[0], LENGTHS[-1], 20_000)
    kept = curve(fine, middle) >= KEPT_SHARE * curve(LENGTHS[0], middle)
    return float(fine[kept][-1])


def draw_scores(
    random: np.random.Generator, middle: float, haystacks: int
) -> dict[int, list[list[float]]]:
    """Draw ten answers a haystack; haystacks differ (intra-class correlation 0.1)."""
    alike = (1 - 0.1) / 0.1
    drawn = {}
    for tokens, accuracy in zip(LENGTHS, curve(LENGTHS, middle), strict=True):
        own = random.beta(accuracy * alike, (1 - accuracy) * alike, size=(haystacks, 1))
        drawn[int(tokens)] = (random.random((haystacks, 10)) < own).astype(float).tolist()
    return drawn


@pytest.mark.parametrize(("middle", "haystacks"), [(3000.0, 12), (6000.0, 3)])
def test_the_5th_percentile_is_seldom_above_the_truth(middle: float, haystacks: int) -> None:
    random = np.random.default_rng(int(middle) + haystacks)
    truth = true_length(middle)
    found = [estimate_length(draw_scores(random, middle, haystacks)) for _ in range(60)]
    low = np.array([estimate.low_tokens for estimate in found])
    assert np.mean(low <= truth) >= 0.93
    # Nor does it promise nothing: half of the runs give much of the truth.
    assert np.median(low) > truth / 3
    median = np.array([estimate.median_tokens for estimate in found])
    assert truth / 1.5 < np.median(median) < 1.5 * truth
    assert all(e.low_tokens <= e.median_tokens <= e.high_tokens for e in found)


def test_the_curve_is_read_between_lengths_by_their_logarithms() -> None:
    counts = np.full(3, 10.0)
    lengths = np.array([512.0, 2048, 8192])
    # 0.85 lies halfway between 1.0 and 0.7, and 1,024 between 512 and 2,048.
    means = np.array([1.0, 0.7, 0.2])
    assert effective_tokens(lengths, means, counts, floor=0.5) == pytest.approx(1024)
    # A rise is levelled first: 0.9 and 1.0 count as 0.95 each, of which 0.8075 is kept.
    means = np.array([0.9, 1.0, 0.665])
    assert effective_tokens(lengths, means, counts, floor=0.5) == pytest.approx(4096)
    assert effective_tokens(lengths, np.ones(3), counts, floor=0.5) == 8192
    assert effective_tokens(lengths, means / 2, counts, floor=0.5) == 0


def test_a_model_that_is_poor_from_the_start_is_not_measurable() -> None:
    right = [[1.0] * 10] * 6
    half = [[1.0] * 5 + [0.0] * 5] * 6
    seldom = [[1.0] * 3 + [0.0] * 7] * 6
    assert not estimate_length({512: seldom, 1024: seldom}).is_measurable
    unsure = estimate_length({512: half, 1024: half})
    assert unsure.base == unsure.floor == 0.5
    assert not unsure.is_measurable
    assert estimate_length({512: right, 1024: right}).is_measurable
    # What a guess would score in one of three cases is no base.
    six = [[1.0] * 6 + [0.0] * 4] * 12
    assert estimate_length({512: six, 1024: six}, chance=0.35).floor == pytest.approx(0.65)
    assert not estimate_length({512: six, 1024: six}, chance=0.35).is_measurable


def test_nothing_is_promised_beyond_the_longest_length() -> None:
    right = [[1.0] * 10] * 3
    found = estimate_length({512: right, 1024: right})
    assert (found.low_tokens, found.high_tokens, found.longest_tokens) == (1024, 1024, 1024)
    with pytest.raises(ValueError, match="two lengths"):
        estimate_length({512: right})


# ---- which lengths ----------------------------------------------------------------------------


def test_lengths_are_powers_of_two_and_the_longest_that_fits() -> None:
    assert possible_lengths(4096 + 32) == [512, 1024, 2048, 4096]
    assert possible_lengths(4096) == [512, 1024, 2048, 4064]
    assert possible_lengths(4200) == [512, 1024, 2048, 4096]
    with pytest.raises(ModelError, match="too few"):
        possible_lengths(600)


def test_a_quick_run_takes_lengths_that_fit_its_seconds() -> None:
    lengths = [512, 1024, 2048, 4096, 8192]

    def seconds_of(tokens: int) -> float:
        return tokens / 512

    assert quick_lengths(lengths, 3 * (1 + 2 + 4), seconds_of) == lengths[:3]
    assert quick_lengths(lengths, 3 * (1 + 2 + 4) - 1, seconds_of) == lengths[:2]
    assert quick_lengths(lengths, 0.1, seconds_of) == lengths[:2]
    assert quick_lengths(lengths, 0.1, lambda tokens: None) == lengths
    assert lengths_within(lengths, 8, seconds_of) == lengths[:4]


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture
def calibrations(tmp_path: Path) -> CalibrationStore:
    return CalibrationStore(Database(f"sqlite:///{tmp_path / 'library.sqlite'}"))


def kept_engine(tmp_path: Path) -> LocalEngine:
    """Return the tiny model with a document KV, as the verb gives it one."""
    tiny = make_tiny_engine()
    kept = DocumentKV(tmp_path / "kv", memory_bytes=2**26, disk_bytes=0)
    tokenizer = tiny._tokenizer._tokenizer
    return LocalEngine(tiny._loaded_model(), tokenizer, name="tiny", document_kv=kept)


def test_a_haystack_is_prefilled_once_for_all_its_questions(tmp_path: Path) -> None:
    engine = kept_engine(tmp_path)
    engine.predicted_prefill_seconds(1)  # measures the rate, once
    computed: list[int] = []

    def count(_: object, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        computed.append(ids.numel())

    model = engine._loaded_model()
    assert can_share(model, engine.spec)  # tries itself, once
    model.register_forward_pre_hook(count, with_kwargs=True)
    record = ask(engine, Step(Mix.LOOKUP, 2048, 0), Run(TINY_LENGTHS), Event())
    assert record is not None
    assert 1950 < record["prompt_tokens"] <= 2048
    rows = record["rows"]
    assert len(rows) == 12
    assert {row["likeliest"] for row in rows if row["task"] == Task.ABSENT} == {None}
    assert all(row["likeliest"] in (True, False) for row in rows if row["task"] != Task.ABSENT)
    # Replies and options: the document, then 12 and 10 tails, 16 tokens each of the former, which
    # are read side by side and padded to the longest.
    tails = len(rows) * max(len(row["question"]) for row in rows) * 4 + 12 * 16
    assert record["document_tokens"] < sum(computed) < record["prompt_tokens"] + tails


def test_a_run_that_breaks_off_goes_on_and_ends_as_one_that_did_not(
    calibrations: CalibrationStore, tmp_path: Path
) -> None:
    engine = kept_engine(tmp_path)
    run = Run(TINY_LENGTHS, num_haystacks=2, mixes=(Mix.LOOKUP,))
    prefix = run.rows_prefix(engine.model_id)

    def break_off(progress: CalibrationProgress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_here(engine, calibrations, run, on_progress=break_off)
    there = calibrations.load_all(prefix)
    assert set(there) == {prefix + f"lookup {step}" for step in ("1536 0", "2048 0", "1536 1")}
    assert calibrations.effective_length(engine.model_id) is None

    seen: list[CalibrationProgress] = []
    resumed = calibrate_here(engine, calibrations, run, on_progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(3, 4)]
    after = calibrations.load_all(prefix)
    assert {key: after[key] for key in there} == there

    other = CalibrationStore(Database(f"sqlite:///{tmp_path / 'other.sqlite'}"))
    whole = calibrate_here(kept_engine(tmp_path / "other"), other, run)
    assert timeless(resumed) == timeless(whole)
    assert resumed.cells == whole.cells
    assert calibrations.effective_length(engine.model_id) == resumed
    assert calibrations.effective_length_of("tiny") == resumed
    assert calibrations.effective_length_of("another") is None

    seen.clear()
    calibrate_here(engine, calibrations, run, on_progress=seen.append)
    assert not seen
    calibrate_here(engine, calibrations, run, fresh=True, on_progress=seen.append)
    assert [progress.done for progress in seen] == [0, 1, 2, 3]


def test_a_run_with_a_budget_ends_with_whole_rounds(
    calibrations: CalibrationStore, tmp_path: Path
) -> None:
    engine = kept_engine(tmp_path)
    ticks = iter(range(1_000_000))
    run = Run(TINY_LENGTHS, num_haystacks=5, mixes=(Mix.LOOKUP,), budget_seconds=12)
    found = calibrate_here(engine, calibrations, run, clock=lambda: float(next(ticks)))
    counts = {point.num_haystacks for point in found.points}
    assert len(counts) == 1  # as many of each length
    assert 1 <= counts.pop() < 5


SEEN_CHARS = 1500


def short_sighted(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Answer rightly from the last SEEN_CHARS of the passage, and know of nothing before them."""
    passages, asked = body["messages"][-1]["content"].rsplit("\n\nQuestion: ", 1)
    seen = passages[-SEEN_CHARS:]
    reply = CANNOT_ANSWER
    for fact, question in NON_LITERAL:
        found = re.search(re.escape(fact).replace(r"\{name\}", r"(\w+)"), seen)
        if found and asked == question:
            reply = found.group(1)
    found = re.search(f"he {re.escape(asked[12:-1])} is (\\d+)", seen)
    if found:
        reply = f"It is {found.group(1)}."
    stream(piece(reply, "stop"))(handler, body)


def test_a_server_whose_sight_is_known_is_measured_so(
    calibrations: CalibrationStore,
) -> None:
    server = FaultyServer()
    server.paths = {"/v1/models": {"data": [{"id": "m", "max_model_len": 16_384}]}}
    server.replies = [short_sighted]
    server.thread.start()
    try:
        run = Run((1536, 2048, 2560, 3072), num_haystacks=5, mixes=(Mix.LOOKUP,))
        found = calibrate_here(server.engine(), calibrations, run)
    finally:
        server.http.shutdown()
        server.http.server_close()
        server.thread.join()
    # Bytes are counted. It sees the share SEEN_CHARS / document, so it is right for 85% where the
    # document has 1,765; the prompt around the documents takes the same of each.
    (record, *_) = calibrations.load_all(run.rows_prefix(found.model_id)).values()
    truth = SEEN_CHARS / KEPT_SHARE + record["prompt_tokens"] - record["document_tokens"]
    assert found.base == 1
    assert found.scored_by == "replies"
    assert truth / 1.2 < found.tokens <= truth
    assert truth / 1.1 < found.median_tokens < 1.1 * truth
    assert {row["score"] for row in record["rows"] if row["task"] == Task.ABSENT} == {1.0}
    at = {(cell.tokens, cell.depth_from): cell.correct for cell in found.cells}
    assert at[3072, 0.0] == 0
    assert at[3072, 0.8] == 1


def timeless(found: EffectiveLength) -> EffectiveLength:
    """Return it without what differs between two equal runs."""
    points = tuple(
        replace(point, prefill_seconds=None, predicted_seconds=None) for point in found.points
    )
    return replace(found, points=points, measured_at="")


def rows_of(database: Path) -> dict[str, str]:
    """Return when each haystack was stored, by its key, as another process sees it."""
    if not database.is_file():
        return {}
    from rag.store.schema import calibration

    with Database(f"sqlite:///{database}").read() as connection:
        return {
            row.key: row.created_at + row.value
            for row in connection.execute(calibration.select())
            if row.key.startswith("calibration rows")
        }


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    tiny = make_tiny_engine()
    model = tmp_path / "tiny"
    tiny._loaded_model().save_pretrained(model)
    tiny._tokenizer._tokenizer.save_pretrained(model)
    home = tmp_path / "home"
    command = [sys.executable, "-m", "ui.cli", "calibrate", "--model", str(model), "--json"]
    command += ["--lengths", ",".join(map(str, TINY_LENGTHS)), "--haystacks"]
    environment = os.environ | {"FATHOM_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"FATHOM_KV_RESERVE_BYTES": "0"}

    killed = subprocess.Popen(
        [*command, "200"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while killed.poll() is None and len(rows_of(home / "fathom.sqlite")) < 3:
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL  # it was not done yet
    there = rows_of(home / "fathom.sqlite")
    assert len(there) >= 3

    rounds = str(len(there) // 4 + 1)  # at least a haystack more than there are
    done = subprocess.run(
        [*command, rounds], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    after = rows_of(home / "fathom.sqlite")
    assert len(after) > len(there)
    assert {key: after[key] for key in there} == there
    assert line["measurable"] is False  # random weights answer nothing
    assert line["tokens"] == 0
    assert {point["tokens"] for point in line["points"]} == set(TINY_LENGTHS)

    settings = Settings(home=home, model=str(model))
    stored = Fathom(settings, embedder=HashEmbedder()).calibrations.effective_length_of(str(model))
    assert stored is not None
    assert json.loads(json.dumps(stored.to_json())) | {"cells": line["cells"]} == line


# ---- what was found is used -------------------------------------------------------------------


def saved(library: Fathom, tokens: int) -> None:
    """Save an effective length of this many tokens for the library's model."""
    engine, right = library.engine, float(tokens > 0)
    records = [
        {"tokens": length, "prefill_seconds": 1.0, "predicted_seconds": 1.0}
        | {"rows": [{"task": Task.LITERAL, "depth": 0.5, "score": right, "likeliest": None}] * 10}
        for length in TINY_LENGTHS
    ]
    found = judge(
        records,
        model=engine.name,
        model_id=engine.model_id,
        seed=0,
        filler="none",
        dtype="32 bits",
        device="a test",
    )
    library.calibrations.save_effective_length(replace(found, tokens=tokens))


def gate_of(gates: Sequence[Any]) -> Any:  # noqa: ANN401 - a Gate
    (gate,) = [gate for gate in gates if gate.gate == "effective_length"]
    return gate


QUESTION = "What is the fee for the crossing?"


@pytest.fixture
def crossing(library: Fathom, tmp_path: Path) -> Fathom:
    """Return a library with a document of some 2,000 bytes, longer than the retrieval budget."""
    path = tmp_path / "crossing.txt"
    path.write_text("The ferry crosses the sound twice a day. The fee is 12 crowns. " * 32)
    settings = library.settings.model_copy(update={"retrieval_tokens": 512})
    library = Fathom(settings, embedder=HashEmbedder(), engine=library.engine)
    library.ingest(path)
    return library


def test_the_gate_is_left_out_until_something_was_measured(crossing: Fathom) -> None:
    service = crossing.service()
    documents = service.documents(None)
    planned = service.plan(QUESTION, documents)
    assert planned.decision.route is Route.FULL
    assert "effective_length" not in {gate.gate for gate in planned.decision.gates}

    saved(crossing, 3500)
    planned = service.plan(QUESTION, documents)
    gate = gate_of(planned.decision.gates)
    assert planned.decision.route is Route.FULL
    assert (gate.value, gate.limit, gate.passed) == (planned.prompt.num_tokens, 3500, True)
    assert gate.value > planned.document_tokens  # with the template, as it was measured


def test_a_longer_prompt_is_retrieved_unless_all_was_asked_for(crossing: Fathom) -> None:
    saved(crossing, 1800)
    service = crossing.service()
    documents = service.documents(None)
    decision = service.plan(QUESTION, documents).decision
    assert decision.route is Route.RETRIEVAL
    assert gate_of(decision.gates).limit == 1800
    assert "effective_length 2," in decision.reason
    assert "of 1,800" in decision.reason

    asked = service.plan(QUESTION, documents, route=Route.FULL).decision
    assert asked.route is Route.FULL
    assert "not measured to use that much well: effective_length 2," in asked.reason

    answer = service.answer(QUESTION, route=Route.FULL)
    assert gate_of(answer.receipt.gates) == gate_of(asked.gates)


def test_what_is_not_measurable_is_not_relied_on(crossing: Fathom, handbook: Path) -> None:
    saved(crossing, 0)
    service = crossing.service()
    decision = service.plan(QUESTION, service.documents(None)).decision
    gate = gate_of(decision.gates)
    assert (gate.limit, gate.passed) == (None, False)
    assert decision.route is Route.RETRIEVAL
    assert "not measurable" in decision.reason
    ranges = crossing.context_ranges()
    assert ranges is not None
    assert (ranges.trained, ranges.effective, ranges.counts) == (4096, 0, 0)

    # What retrieval would show anyway may as well be read whole: nothing is gained by less.
    short = crossing.ingest(handbook).document
    settings = crossing.settings.model_copy(update={"retrieval_tokens": 1024})
    wide = Fathom(settings, embedder=HashEmbedder(), engine=crossing.engine).service()
    decision = wide.plan(QUESTION, [short]).decision
    assert not gate_of(decision.gates).passed
    assert decision.route is Route.FULL
    assert "fit the retrieval budget" in decision.reason


@pytest.mark.parametrize(
    ("effective", "counts", "words"),
    [
        (None, 131_072, "scaled to 131,072 tokens, effective length not measured here"),
        (20_000, 20_000, "measured to use 20,000 tokens well; what counts: 20,000 tokens"),
        (0, 0, "effective length not measurable; what counts: none"),
    ],
)
def test_a_plan_names_the_three_ranges_and_the_one_that_counts(
    effective: int | None, counts: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = known_spec("llama-3.1-8b", monkeypatch)
    plan = plan_model(
        spec,
        30_000,
        model="llama-3.1-8b",
        device_bytes=2**40,
        reserve_bytes=0,
        effective_tokens=effective,
    )
    assert (plan.ranges.trained, plan.ranges.scaled) == (8192, 131_072)
    assert plan.ranges.counts == counts
    assert words in ranges_text(plan.ranges)
    gates = {gate.gate: gate.passed for gate in plan.gates}
    assert gates.get("effective_length") is (None if effective is None else False)
    assert plan.fits  # it would be used badly, but it is possible
    assert plan.to_json()["ranges"]["counts"] == counts


def test_rows_are_found_and_forgotten_by_how_their_keys_begin(database_url: str) -> None:
    opened = Database(database_url)
    calibrations = CalibrationStore(opened)
    for key in ("rows 1_: a", "rows 1_: b", "rows 12: c", "rates"):
        calibrations.save(key, {"of": key})
    assert calibrations.load_all("rows 1_: ") == {
        "rows 1_: a": {"of": "rows 1_: a"},
        "rows 1_: b": {"of": "rows 1_: b"},
    }
    calibrations.forget("rows 1_: ")
    assert calibrations.load_all("rows 1_: ") == {}
    assert calibrations.load("rows 12: c") == {"of": "rows 12: c"}
    assert calibrations.load("rates") == {"of": "rates"}
    opened.close()


# ---- a real model -----------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.skipif(
    not any(model.name == "smollm2-135m" for model in fetched_models(Settings())),
    reason="the test model is not fetched: make test fetches it",
)
def test_a_real_model_finds_the_facts_of_short_prompts(
    calibrations: CalibrationStore, tmp_path: Path
) -> None:
    kept = DocumentKV(tmp_path / "kv", memory_bytes=2**28, disk_bytes=0)
    engine = LocalEngine.load(
        "smollm2-135m", Settings(), calibrations=calibrations, document_kv=kept
    )
    run = Run((512, 600), num_haystacks=1, mixes=(Mix.LOOKUP,))
    found = calibrate_here(engine, calibrations, run)
    assert found.tasks[Task.LITERAL]["base"] >= 0.5
    assert found.tasks[Task.MANY_KEYS]["base"] >= 0.5
    assert [point.num_questions for point in found.points] == [10, 10]
    for point in found.points:
        assert point.predicted_seconds is not None
        assert point.prefill_seconds is not None
    picture = tmp_path / "chart.png"
    draw_calibration(found, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    ((_, record), *_) = calibrations.load_all(run.rows_prefix(engine.model_id)).items()
    assert 480 < record["prompt_tokens"] <= 512
