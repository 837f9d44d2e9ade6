"""What a user can do: the 25 acceptance statements, each with its test or why it is open.

A test here is short and takes the product's own path; others go deeper, and the last column names
them. Where a statement has a part that a test cannot prove, the column says so.

 1  install, and a cited answer in minutes     here; minutes on a clean machine: by hand
 2  ingest with rates, killed, resumed         here; kills: test_durability.py, test_ingest.py
 3  same content told, changed is a version    here
 4  delete, and doctor mends                   here; each fault: test_doctor.py
 5  another embedder while the old answers     here; kills: test_reindex.py
 6  the index finds what exact search does     here on a CPU; on a GPU: test_gpu.py, bench gpu
 7  one panel with every number                here as its HTML; in a browser: test_browser.py
 8  another route with one click, side by side test_browser.py, by a click
 9  how many: 102                              here; other structures: test_structure_counts.py
10  any length up to 10 times the window       here; a thousand at random: test_fuzz_answering.py
11  KV bytes predicted and actual              here; every family: test_kv_bytes.py
12  trained, scaled and measured range         here; test_positions.py, test_calibrate.py
13  calibrate once: a chart, stored, used      here; a real model: test_calibrate.py
14  thrift moves cost and accuracy             here; on own questions: fathom compare's report
15  the second question skips prefill          here; break-even: fathom bench document-kv
16  a citation is the exact characters         here; the click: test_browser_way.py
17  not found, with what is nearest            here; the rate: docs/benchmarks.md
18  start, middle or end of the document       here; the weakness at that depth: test_calibrate.py
19  chat while an upload is processed          test_browser.py; GPU memory: open, needs a GPU
20  nobody sees anything of another            here; at once and by HTTP: test_users.py, test_api.py
21  a table of questions, stopped and resumed  here; kills: test_batch.py
22  retrieval, full, router: a verdict         here; test_compare.py
23  regret of the router, refitted             here; on LaRA: fathom bench router, test_utility.py
24  any past answer again                      here; test_replay.py
25  Python, HTTP and command line alike        here; turns and shares: test_users.py, test_api.py
"""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import HANDBOOK, HashEmbedder, make_tiny_engine, make_tiny_tokenizer
from documents import pdf_line, write_pdf
from eval.analysis import analyse
from eval.arms import Arm, Workplace
from eval.bench.router import Round, bench_router
from eval.calibrate import Run as Calibrating
from eval.calibrate import calibrate
from eval.compare import compare, find_documents
from eval.examples import EvalExample
from eval.fit_router import LabelledPair, fit_router
from eval.journal import Run as Comparing
from eval.report import to_json
from eval.synthetic import Mix
from eval.tables import read_table
from ingest.pipeline import IngestResult
from ingest.reindex import reembed_library
from ingest.sample import write_sample
from ingest.sources import SourceToRead
from rag.answering.citations import UNVERIFIED, resolve_citations
from rag.answering.context import full_context
from rag.answering.prompt import CANNOT_ANSWER
from rag.answering.replay import replay
from rag.errors import DocumentNotFoundError, EmptyLibraryError
from rag.lm.kv_bytes import KVDtype, kv_cache_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.positions import PositionVerdict, position_limit, position_verdict
from rag.lm.spec import ModelSpec
from rag.routing.utility import RouteFeatures, load_weights
from rag.settings import Settings
from rag.store.calibrations import EffectiveLength
from rag.store.oplog import OpLog
from rag.types import AnswerMode, IngestProgress, QuestionClass, Route
from served import serving
from tiny_families import tiny_config, tiny_model
from ui.answer_html import answer_card, gate_name, receipt_html
from ui.assembly import Fathom
from ui.cli import app
from ui.doctor import examine_library, repair
from ui.plots import draw_calibration

QUESTION = "What is the harbour fee?"
FEE = "The harbour fee is 35 crowns a night."


# ---- start and ingest ---------------------------------------------------------------------------


def test_01_a_sample_gets_a_cited_answer(library: Fathom, tmp_path: Path) -> None:
    sample = library.ingest(write_sample(tmp_path)).document
    answer = library.service().answer("What does the pass statement do?", mode=AnswerMode.QUOTED)
    assert answer.citations
    for c in answer.citations:
        assert library.text(sample.id, c.start, c.end) == c.quote


def test_02_an_ingest_shows_rates_and_resumes_without_duplicates(
    library: Fathom, tmp_path: Path
) -> None:
    lines = [pdf_line(f"Line {n} of the log.", y=700 - 20 * n) for n in range(8)]
    pages = ["".join([*lines, pdf_line(f"Page {number}", y=100)]) for number in range(60)]
    sources = []
    for name in ("a.pdf", "b.pdf"):
        path = write_pdf(tmp_path / name, [*pages, pdf_line(name)])
        sources.append(SourceToRead(path, str(path), name))
    seen: list[IngestProgress] = []

    def interrupt(progress: IngestProgress) -> None:
        if progress.fraction >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(library.ingest_files(sources, on_progress=interrupt))
    outcomes = list(library.ingest_files(sources, on_progress=seen.append))
    assert all(isinstance(outcome, IngestResult) for outcome in outcomes)
    assert [d.num_pages for d in library.documents()] == [61, 61]
    assert library.store.num_chunks() == sum(d.num_chunks for d in library.documents())
    assert max(p.pages_per_second for p in seen) > 0
    assert max(p.chunks_per_second for p in seen) > 0
    assert seen[-1].seconds_left == 0.0


def test_03_the_same_content_is_told_and_a_changed_one_is_a_new_version(
    small_fathom: Fathom, handbook: Path, tmp_path: Path
) -> None:
    before = small_fathom.service().answer(QUESTION, mode=AnswerMode.QUOTED)
    copy = tmp_path / "copy.md"
    copy.write_text(HANDBOOK)
    told = small_fathom.ingest(copy)
    assert (told.outcome, "handbook.md" in told.message) == ("known", True)
    handbook.write_text(HANDBOOK.replace("35 crowns", "40 crowns"))
    changed = small_fathom.ingest(handbook)
    assert (changed.outcome, changed.document.version) == ("new-version", 2)
    (old,) = small_fathom.receipts.load(before.receipt.id).citations[:1]
    assert small_fathom.text(old.document, old.start, old.end) == old.quote == FEE


def test_04_a_deleted_document_is_nowhere_and_doctor_mends_what_disagrees(
    small_fathom: Fathom, tmp_path: Path
) -> None:
    other = tmp_path / "tides.txt"
    other.write_text("The tide turns at noon.")
    small_fathom.ingest(other)
    (harbour, tides) = small_fathom.documents()
    small_fathom.delete(harbour.id)
    answer = small_fathom.service().answer(QUESTION, mode=AnswerMode.QUOTED)
    assert "crowns" not in json.dumps(answer.to_json())
    with pytest.raises(DocumentNotFoundError):
        small_fathom.service().answer(QUESTION, document_ids=[harbour.id])
    assert all(check.passed for check in examine_library(small_fathom))
    (file,) = small_fathom.settings.index_dir.rglob("*.faiss")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert not all(check.passed for check in examine_library(small_fathom))
    list(repair(small_fathom))
    again = Fathom(small_fathom.settings, embedder=HashEmbedder(), engine=small_fathom.engine)
    assert all(check.passed for check in examine_library(again))
    assert [d.id for d in again.documents()] == [tides.id]


def test_05_another_embedder_is_built_beside_the_old_one(small_fathom: Fathom) -> None:
    class Wide(HashEmbedder):
        fingerprint, dim = "wide-128", 128

    answered: list[bool] = []

    def while_it_runs(done: int, total: int) -> None:
        quoted = small_fathom.service().answer(QUESTION, mode=AnswerMode.QUOTED)
        answered.append(FEE in quoted.answer)

    small_fathom.index.catch_up()
    reembed_library(small_fathom.database, Wide(), small_fathom.settings, on_progress=while_it_runs)
    assert answered
    assert answered[0]
    new = Fathom(small_fathom.settings, embedder=Wide(), engine=small_fathom.engine)
    assert FEE in new.service().answer(QUESTION, mode=AnswerMode.QUOTED).answer


def test_06_the_index_finds_what_exact_search_finds(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "ships.txt"
    path.write_text(
        "\n\n".join(f"Ship {n} of port {n % 7} carries cargo {n}." * 9 for n in range(60))
    )
    library.ingest(path)
    library.index.catch_up()
    query = library.embedder.embed(["ship of port 3"])[0]
    scores = {
        number: float(vector @ query)
        for numbers, vectors in OpLog(library.database, library.embedder.fingerprint).vectors()
        for number, vector in zip(numbers, vectors, strict=True)
    }
    found = library.index.search(query, top_k=10)
    best = sorted(scores.values(), reverse=True)[:10]
    assert np.allclose([score for _, score in found], best, atol=1e-5)
    assert np.allclose([scores[number] for number, _ in found], best, atol=1e-5)


# ---- routing ------------------------------------------------------------------------------------


def test_07_one_panel_says_route_numbers_limits_and_what_was_not_read(
    small_fathom: Fathom,
) -> None:
    receipt = small_fathom.service().answer(QUESTION, route=Route.RETRIEVAL).receipt
    panel = html.unescape(receipt_html(receipt))
    for gate in receipt.gates:
        assert gate_name(gate) in panel
        assert gate.limit is None or gate.unit == "bytes" or f"{gate.limit:,.0f}" in panel
    assert "retrieval" in panel.lower()
    assert f"{receipt.read.tokens:,} of {receipt.read.of_tokens:,} tokens" in panel
    assert "Not read" in panel


def test_09_how_many_on_a_102_record_file_gets_102(library: Fathom, tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_text("\n\n".join(f"Record {n}\nName: Person {n}" for n in range(1, 103)))
    library.ingest(path)
    answer = library.service().answer("How many records are listed in this file?")
    assert answer.answer.startswith("102 records.")
    assert (answer.receipt.mode, answer.receipt.route) == (AnswerMode.COUNTED, Route.SCAN)
    assert len(answer.citations) == 102


@pytest.mark.parametrize("times", [0.5, 2, 10])
def test_10_any_length_up_to_ten_windows_is_planned_and_said(
    settings: Settings, tmp_path: Path, times: float
) -> None:
    engine = make_tiny_engine(max_position_embeddings=2048)
    few = settings.model_copy(update={"retrieval_tokens": 400})
    library = Fathom(few, embedder=HashEmbedder(), engine=engine)
    path = tmp_path / "long.txt"
    path.write_text(("Ship 7 lies at berth 3 and pays the fee. " * 1000)[: int(times * 2048)])
    library.ingest(path)
    receipt = library.service().answer("What does ship 7 pay?", route=Route.FULL).receipt
    if times < 1:
        assert (receipt.route, receipt.read.not_read) == (Route.FULL, "")
    else:
        assert receipt.route is Route.RETRIEVAL
        assert "reading everything was asked for but fails a gate" in receipt.reason
        assert receipt.read.not_read
    assert receipt.prompt_tokens + receipt.new_tokens <= 2048
    if times > 2:
        return
    scanned = library.service().answer("What does ship 7 pay?", route=Route.SCAN).receipt
    assert scanned.read.tokens == scanned.read.of_tokens


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3n_text", "deepseek_v3"])
def test_11_kv_bytes_are_predicted_to_the_byte(
    settings: Settings, handbook: Path, family: str
) -> None:
    """Of every head its own, grouped, windowed, shared and latent caches; narrower ones scale."""
    engine = LocalEngine(tiny_model(family), make_tiny_tokenizer(), name=family)
    library = Fathom(settings, embedder=HashEmbedder(), engine=engine)
    library.ingest(handbook)
    held = library.service().answer(QUESTION, route=Route.FULL).receipt.kv_bytes
    assert held.predicted == held.actual
    spec = ModelSpec.from_config(tiny_config(family), dtype_bytes=2)
    sixteen, eight, four = (
        kv_cache_bytes(spec, 1000, kv_dtype=kind)
        for kind in (KVDtype.BFLOAT16, KVDtype.INT8, KVDtype.INT4)
    )
    assert sixteen == 2 * eight == 4 * four


def test_12_trained_scaled_and_measured_ranges_are_told_and_the_lowest_holds(
    small_fathom: Fathom,
) -> None:
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 10000.0,
    }
    spec = ModelSpec.from_config(
        tiny_config("qwen2", max_position_embeddings=32768, rope_parameters=yarn), dtype_bytes=2
    )
    assert position_limit(spec) == 131072
    assert position_verdict(spec, 32768) is PositionVerdict.NATIVE
    assert position_verdict(spec, 32769) is PositionVerdict.EXTENDED
    assert position_verdict(spec, 131073) is PositionVerdict.OUT_OF_RANGE
    _calibrate(small_fathom)
    ranges = small_fathom.context_ranges()
    assert ranges is not None
    assert ranges.trained == 4096
    assert ranges.effective is not None
    assert ranges.counts == min(ranges.trained, ranges.effective)
    plan = small_fathom.service().plan(QUESTION, small_fathom.documents())
    assert "effective_length" in {gate.gate for gate in plan.decision.gates}


def test_13_calibrate_gives_a_chart_and_a_length_that_is_used(
    small_fathom: Fathom, tmp_path: Path
) -> None:
    calibration = _calibrate(small_fathom)
    assert {point.tokens for point in calibration.points} == {1536, 2048}
    assert calibration.cells
    draw_calibration(calibration, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    stored = small_fathom.calibrations.effective_length(small_fathom.engine.model_id)
    assert stored == calibration


def _calibrate(library: Fathom) -> EffectiveLength:
    run = Calibrating((1536, 2048), num_haystacks=1, mixes=(Mix.LOOKUP,))
    return calibrate(library.engine, library.calibrations, run, dtype="32 bits", device="a test")


def test_14_thrift_moves_the_route_its_cost_and_its_expected_accuracy(
    settings: Settings, tiny_engine: LocalEngine, tmp_path: Path
) -> None:
    path = tmp_path / "ships.txt"
    path.write_text("\n\n".join(f"The cook of ship {n} made soup number {n}." for n in range(50)))
    chosen = []
    for thrift in (0.0, 1.0):
        changed = settings.model_copy(update={"thrift": thrift, "retrieval_tokens": 200})
        library = Fathom(changed, embedder=HashEmbedder(), engine=tiny_engine)
        library.ingest(path)
        decision = library.service().plan("Who made soup 7?", library.documents()).decision
        chosen.append(decision.routes[0])
        assert decision.route is decision.routes[0].route
    lavish, thrifty = chosen
    assert thrifty.route is Route.RETRIEVAL
    assert lavish.probability >= thrifty.probability
    assert thrifty.utility < thrifty.probability


def test_15_later_questions_on_a_document_skip_its_prefill(
    settings: Settings, handbook: Path
) -> None:
    library = Fathom(settings, embedder=HashEmbedder())
    tiny = make_tiny_engine()
    library._given_engine = LocalEngine(
        tiny._model, make_tiny_tokenizer(), name="tiny", document_kv=library.document_kv
    )
    library.ingest(handbook)
    cached = []
    for number in range(20):
        question = f"{number}: what is the fee?"
        receipt = library.service().answer(question, route=Route.FULL).receipt
        cached.append(receipt.cached_tokens)
        assert receipt.kv_bytes.predicted == receipt.kv_bytes.actual
    assert cached[0] == 0
    assert min(n or 0 for n in cached[1:]) > len(HANDBOOK.encode())
    assert library.document_kv.memory_used_bytes > 0


# ---- answers ------------------------------------------------------------------------------------


def test_16_every_quotation_is_the_exact_characters_and_the_rest_is_marked(
    small_fathom: Fathom,
) -> None:
    store, documents = small_fathom.store, small_fathom.documents()
    passages = full_context(documents, store=store, count_tokens=len).passages
    said = "The fee is 35 crowns. Whales sing in the mountains."
    cited = resolve_citations(said, QUESTION, passages, store)
    (citation,) = cited.citations
    assert HANDBOOK[citation.start : citation.end] == citation.quote == FEE
    assert citation.verified
    assert cited.text.endswith(f"Whales sing in the mountains. {UNVERIFIED}")


def test_17_what_is_not_in_the_document_is_not_found_with_the_nearest(
    small_fathom: Fathom,
) -> None:
    answer = small_fathom.service().answer(
        "Which trumpeter won the harbour championship of Guatemala?", mode=AnswerMode.QUOTED
    )
    assert answer.abstained
    assert answer.answer.startswith(CANNOT_ANSWER)
    assert all(HANDBOOK[c.start : c.end] == c.quote for c in answer.citations)


def test_18_an_answer_says_where_in_the_document_it_comes_from(small_fathom: Fathom) -> None:
    answer = small_fathom.service().answer(
        "What colour is the south beacon?", mode=AnswerMode.QUOTED
    )
    (document,) = small_fathom.documents()
    card = html.unescape(answer_card(answer, num_chars={document.id: document.num_chars}))
    assert "at the end" in card


def test_20_nobody_sees_anything_of_another(library: Fathom, tmp_path: Path) -> None:
    for name in ("anna", "ben"):
        library.accounts.add(name, "correct horse battery")
    anna, ben = library.for_owner("anna"), library.for_owner("ben")
    path = tmp_path / "secret.md"
    path.write_text("The zolothurn lies under the third bollard.")
    hers = anna.ingest(path).document
    given = anna.service().answer("Where is the zolothurn?", mode=AnswerMode.QUOTED)
    assert "third bollard" in given.answer
    assert ben.documents() == []
    with pytest.raises(EmptyLibraryError):
        ben.service().answer("Where is the zolothurn?")
    with pytest.raises(DocumentNotFoundError):
        ben.service().answer("Where is the zolothurn?", document_ids=[hers.id])
    with pytest.raises(DocumentNotFoundError):
        ben.receipts.load(given.receipt.id)
    assert (
        b"correct horse battery" not in library.settings.home.joinpath("fathom.sqlite").read_bytes()
    )


# ---- batch and comparison -----------------------------------------------------------------------


def test_21_a_table_is_answered_stopped_and_resumed(
    small_fathom: Fathom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.verbs.batch.open_fathom", lambda _: small_fathom)
    asked = ["What is the harbour fee?", "Who books a berth?", "What is red?"]
    (tmp_path / "in.csv").write_text("question\n" + "".join(f"{q}\n" for q in asked[:2]))
    arguments = ["batch", str(tmp_path / "in.csv"), "-o", str(tmp_path / "out.csv"), "--json"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    before = _num_answers(small_fathom)
    assert before == 2
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert _num_answers(small_fathom) == before, "no row is asked twice"
    table = read_table(tmp_path / "out.csv")
    assert len(table.rows) == 2
    assert {"question", "answer", "route", "confidence"} <= set(table.columns)


def _num_answers(library: Fathom) -> int:
    with library.database.read() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM answer").scalar_one())


@pytest.fixture
def examples(small_fathom: Fathom) -> list[EvalExample]:
    """Return two questions on the handbook, with their evidence."""
    return [
        EvalExample(
            name, question, "handbook.md", (answer,), True,
            ((HANDBOOK.index(answer), HANDBOOK.index(answer) + len(answer)),),
        )
        for name, question, answer in (
            ("fee", QUESTION, "35 crowns"),
            ("berth", "How is a berth booked?", "by radio"),
        )
    ]  # fmt: skip


def test_22_a_comparison_ends_in_a_verdict_that_may_be_no_difference(
    small_fathom: Fathom, examples: list[EvalExample], tmp_path: Path
) -> None:
    place = Workplace(
        store=small_fathom.store,
        retriever=small_fathom.retriever,
        engine=small_fathom.engine,
        settings=small_fathom.settings,
        calibrations=None,
        forget=lambda document: small_fathom.document_kv.forget({document.version_key}),
    )
    run = Comparing(
        command="fathom compare", data="the handbook", examples_sha256="e",
        documents={"handbook.md": "a"}, model="tiny", model_sha256="m", context_tokens=4096,
        effective_tokens=None,
        embedder="hash", settings={}, seed=0, commit="c", device="a test", num_threads=1,
        versions={}, started="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    documents = find_documents(examples, small_fathom.store.find)
    journal = compare(examples, documents, (Arm.HYBRID, Arm.FULL), place, run, tmp_path / "report")
    analysis = analyse(examples, journal, load_weights())
    assert {row.arm for row in journal.rows} == {"hybrid", "full"}
    assert "no difference shown" in json.dumps(to_json(analysis))


def test_23_the_routers_regret_stands_beside_simple_rules_and_it_is_refitted() -> None:
    generator = np.random.default_rng(1)
    features = RouteFeatures(
        question="What is the fee?", document_tokens=8_000, effective_tokens=32_768,
        shares=(0.5,), places=(0.5,), question_class=QuestionClass.LOOKUP,
    )  # fmt: skip
    pairs = []
    for number in range(400):
        tokens, share = int(2 ** generator.uniform(9, 17)), float(generator.uniform(0, 1))
        pairs.append(
            LabelledPair(
                model="m",
                document=f"d{number % 20}",
                features=replace(features, document_tokens=tokens, shares=(share,)),
                full=float(tokens < 8_000),
                retrieval=float(share > 0.5),
            )
        )
    fit, judged = pairs[:300], pairs[300:]
    weights = fit_router(fit, fitted_on="one's own questions")
    bench = bench_router([Round(fit, judged, weights)], split="test")
    score = {row.policy: row.score.mean for row in bench.policies}
    assert score["oracle"] >= max(score.values())
    (own,) = [policy for policy in score if policy.startswith("router")][-1:]
    assert score[own] > score["always retrieval"]
    assert any("random" in policy for policy in score)
    assert any("size" in policy for policy in score)


def test_24_a_past_answer_comes_again(small_fathom: Fathom, handbook: Path) -> None:
    before = small_fathom.service().answer(QUESTION)
    handbook.write_text(HANDBOOK.replace("35", "40"))
    small_fathom.ingest(handbook)
    again = replay(before.receipt.id, small_fathom.receipts, small_fathom.service())
    assert again.same_text
    assert again.differences == ()


def test_a_long_reading_is_told_where_nobody_sees_it_change(
    small_fathom: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of stdout and stderr that are no terminal: once, with the time left and how to end it."""
    monkeypatch.setattr("ui.verbs.questions.open_fathom", lambda _: small_fathom)
    engine: Any = small_fathom.engine
    short = replace(engine.spec, chunk_tokens=200)
    monkeypatch.setattr(engine, "_prefill", engine._new_prefill(short))
    ask = ["ask", QUESTION, "--route", "full", "--json"]
    assert "Reading" not in CliRunner().invoke(app, ask).stderr
    monkeypatch.setattr("ui.verbs.questions._LONG_SECONDS", 0.0)
    monkeypatch.setattr("ui.reading._SECONDS_UNTOLD", 0.0)
    told = CliRunner().invoke(app, [*ask[:1], QUESTION + " Please.", *ask[2:]]).stderr
    assert told.count("Reading") == 1
    assert "left; Ctrl+C ends it" in " ".join(told.split())


# ---- operations ---------------------------------------------------------------------------------


def test_25_python_http_and_the_command_line_give_the_same_answer(
    small_fathom: Fathom, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = small_fathom.service().answer(QUESTION, route=Route.RETRIEVAL).answer
    monkeypatch.setattr("ui.verbs.questions.open_fathom", lambda _: small_fathom)
    told = CliRunner().invoke(app, ["ask", QUESTION, "--route", "retrieval", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["answer"] == python
    with serving(small_fathom) as url, httpx.Client(base_url=url, timeout=60) as http:
        asked = {"question": QUESTION, "route": "retrieval"}
        assert http.post("/v1/questions", json=asked).json()["answer"] == python
        metrics = http.get("/metrics").text
    counted = re.findall(r'^fathom_answers_total\{.*route="retrieval".*\} (\S+)$', metrics, re.M)
    assert [float(n) for n in counted] == [1.0]
    assert "fathom_last_kv_bytes" in metrics
