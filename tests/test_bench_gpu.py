"""`fathom bench gpu` on small shapes: what it does on a card, tried on whatever is here."""

import json
import time

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from eval.bench.gpu import REAL, SMALL, GoalRow, GpuBench, _random_model, bench_gpu, card, goals
from eval.bench.gpu_attention import AttentionRow, visible_pairs
from eval.bench.gpu_decode import OWN_CODE, STATIC_WAYS, DecodeRow, step_bytes
from eval.bench.gpu_embed import EmbedRow, _word
from eval.bench.gpu_prefill import PrefillRow, useful_flops
from eval.bench.gpu_rows import row_ways
from eval.bench.gpu_run import Run
from eval.bench.gpu_search import ExactRow, exact_limit_seconds, nearest
from rag.lm.spec import ModelSpec
from rag.lm.window_kernels import WindowPlan, visible_keys
from ui.cli import app


def test_the_bench_on_small_shapes() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = bench_gpu(SMALL, device)
    ways = {(row.model, row.way, row.num_tokens) for row in bench.prefill}
    assert ways == {
        (model, way, num_tokens)
        for model, of_model in (
            ("tiny-llama", ("transformers", "full", "windowed")),
            ("tiny-gemma3_text", ("transformers", "full")),
        )
        for way in of_model
        for num_tokens in (128, 640)
    }
    assert all(row.kv_bytes_predicted == row.kv_bytes_actual for row in bench.prefill)
    assert [(row.model, row.way) for row in bench.decode] == [
        (model, way)
        for model in ("tiny-llama", "tiny-gemma3_text")
        for way in ("transformers", "plain", *STATIC_WAYS)
        if (model, way) != ("tiny-gemma3_text", OWN_CODE)  # it has no other
    ]
    assert [(row.model, row.way, row.num_rows) for row in bench.rows] == [
        ("tiny-llama", way, num_rows) for way, num_rows in row_ways(4)
    ]
    assert [row.agrees for row in bench.twins] == [True, True, True]
    assert {(row.way, row.window) for row in bench.attention} == {
        ("full", None),
        *((way, window) for way in ("window", "dense mask") for window in (16, 64)),
    }
    assert max(row.difference or 0.0 for row in bench.attention) < 2e-2
    assert {(row.way, row.num_tokens) for row in bench.one_query} == {
        (way, num_tokens) for way in ("in place", "copied", "plain") for num_tokens in (128, 256)
    }
    assert {(row.way, row.num_queries) for row in bench.exact} >= {("product", 1), ("product", 8)}
    assert min(row.recall_at_10 for row in bench.exact) > 0.9
    assert [row.way for row in bench.embed] == [
        *("sentence-transformers", "ours", "tokens alone"),
        *("an ingest, by 256", "an ingest, by 256: embedding"),
        *("an ingest", "an ingest: embedding"),
    ]
    assert min(row.min_cosine or 1.0 for row in bench.embed) > 0.99
    assert bench.search or any("FAISS" in reason for reason in bench.left_out)
    assert {row.goal for row in bench.goals} == {"G1", "G2", "G3", "G4", "G6", "G7"}
    shown = card(bench)
    assert "tiny-gemma3_text" in shown
    assert all(reason in shown for reason in bench.left_out)
    if device.type == "cpu":  # every section ran; in float32 every way writes the same
        [reason] = [reason for reason in bench.left_out if "FAISS" not in reason]
        assert reason.startswith(
            "tiny-gemma3_text: 4 rows behind 128 tokens: its rows share nothing"
        )
        assert {row.same_tokens for row in bench.rows} == {bench.rows[0].same_tokens}
        assert {row.same_tokens for row in bench.decode} == {bench.decode[0].same_tokens}


def test_the_real_shapes_are_an_8b_without_windows_and_one_with() -> None:
    plain, windowed = (AutoConfig.for_model(**facts) for _, facts in REAL.models)
    spec = ModelSpec.from_config(plain, dtype_bytes=2)
    assert spec.num_parameters == 8_030_261_248
    assert windowed.sliding_window == 1024
    assert REAL.decode_context_tokens == 8_192
    # What one token reads: all weights but the table of embeddings, and 128 KiB a token of cache.
    model = _random_model(REAL.models[0][1], torch.bfloat16, torch.device("meta"))
    weights = 2 * (8_030_261_248 - 128_256 * 4_096)
    assert step_bytes(model, spec, 8_192) == weights + 8_192 * 131_072
    # The floors of the notes: 13.96 GFLOP a token, and attention of 131,072 in a window of 4,096.
    linear = 2 * spec.linear_parameters
    assert linear == pytest.approx(13.96e9, rel=1e-3)
    attention = useful_flops(spec, 131_072, window=4_096, num_sinks=4) - linear * 131_072
    assert attention == pytest.approx(277e12, rel=1e-2)
    assert useful_flops(spec, 131_072) - linear * 131_072 == pytest.approx(4504e12, rel=1e-3)


def test_a_models_own_windows_are_no_work_beyond_them() -> None:
    config = AutoConfig.for_model(**SMALL.models[1][1])
    spec = ModelSpec.from_config(config, dtype_bytes=2)
    pairs = sum(visible_pairs(200, layer.window) for layer in spec.layers)
    assert useful_flops(spec, 200, window=8, num_sinks=2) == (
        2 * spec.linear_parameters * 200 + 4 * 32 * pairs
    )
    assert {layer.window for layer in spec.layers} == {64}


@pytest.mark.parametrize("num_tokens", [1, 5, 20, 60])
@pytest.mark.parametrize("window", [1, 5, 19, 60])
@pytest.mark.parametrize("num_sinks", [0, 3, 30])
def test_the_pairs_that_count_are_those_of_the_mask(
    num_tokens: int, window: int, num_sinks: int
) -> None:
    plan = WindowPlan(num_sinks=num_sinks, window=window)
    mask = visible_keys(plan, num_tokens, num_tokens, torch.device("cpu"))
    assert visible_pairs(num_tokens, window, num_sinks) == int(mask.sum())


def test_the_limit_of_exact_search_is_memory_for_one_and_products_for_many() -> None:
    rates = {"bytes_per_second": 4.3e12, "flops_per_second": 788e12}
    assert exact_limit_seconds(10_000_000, 1, **rates) == pytest.approx(1.79e-3, rel=1e-2)
    many = exact_limit_seconds(10_000_000, 1_024, **rates)
    assert many == pytest.approx(10.0e-3, rel=1e-2)


def test_the_nearest_by_blocks_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    stored, queries = torch.randn(1_000, 16), torch.randn(5, 16)
    monkeypatch.setattr("eval.bench.gpu_search._BLOCK_ROWS", 900)
    monkeypatch.setattr("eval.bench.gpu_search._BLOCK_SCORES", 900)
    expected = torch.topk(queries @ stored.T, 10).indices
    assert torch.equal(nearest(stored, queries), expected)


def test_made_up_words_are_all_different() -> None:
    assert len({_word(number) for number in range(REAL.embed.num_words)}) == REAL.embed.num_words


def test_goals_are_reckoned_from_the_rows() -> None:
    bench = GpuBench("a card", {}, "bfloat16")
    bench.attention = [
        AttentionRow("full", 32_768, None, 0.020, 0.8, None, None),
        AttentionRow("window", 32_768, 1_024, 0.001, 0.50, 90.0, 1e-3),
        AttentionRow("dense mask", 32_768, 1_024, 0.090, 0.01, 1.0, 0.0),
        AttentionRow("window", 32_768, 4_096, 0.004, 0.60, 22.0, 1e-3),
    ]
    for seconds, way, share in (
        (12.0, "transformers", 0.6),
        (9.0, "full", 0.8),
        (4.0, "windowed", 0.66),
    ):
        for num_tokens in (8_192, 131_072):
            bench.prefill.append(
                PrefillRow("plain", way, num_tokens, seconds, num_tokens / seconds, share, 0, 0, 0)
            )
    bench.prefill.append(PrefillRow("born", "transformers", 131_072, 1.0, 1.0, 0.9, 0, 0, 0))
    for way, rate in (
        ("transformers", 40.0),
        ("plain", 45.0),
        *zip(STATIC_WAYS, (50.0, 120.0, 180.0, 220.0), strict=True),
    ):
        bench.decode.append(
            DecodeRow("plain", way, 8_192, rate, 267.0, rate / 267.0, rate / 40.0, 64)
        )
    bench.embed = [EmbedRow("ours", 16_384, 4.0, 9.0, 0.9999)]
    bench.exact = [
        ExactRow("product", 10_000_000, 1, 0.002, 500.0, 0.9, 1.0),
        ExactRow("product", 10_000_000, 1_024, 0.020, 51_200.0, 0.5, 1.0),
    ]
    found = [(row.goal, round(row.found, 3), row.wanted, row.is_reached) for row in goals(bench)]
    assert found == [
        ("G1", 90.0, 80, True),
        ("G2", 0.5, 0.55, False),
        ("G1", 22.0, 25, False),
        ("G2", 0.6, 0.55, True),
        ("G3", 3.0, 3.5, False),
        ("G3", 0.66, 0.65, True),
        ("G4", 0.824, 0.8, True),
        ("G4", 5.5, 5.0, True),
        ("G6", 4.0, 5.0, False),
        ("G6", 9.0, 8.0, True),
        ("G7", 2.0, 2.2, True),
        ("G7", 51_200.0, 60_000, False),
    ]
    assert GoalRow("G7", "", 2.3, 2.2, at_most=True).is_reached is False
    assert goals(GpuBench("a card", {}, "bfloat16")) == []


def test_what_the_time_does_not_allow_is_named() -> None:
    bench = bench_gpu(SMALL, torch.device("cpu"), deadline_seconds=0.0)
    assert not any((bench.attention, bench.one_query, bench.prefill, bench.decode, bench.rows))
    assert not any((bench.exact, bench.embed))
    assert not bench.goals
    for what in (
        "tiny-llama: full prefill of 640 tokens",
        "tiny-llama: decode at 128 tokens",
        "tiny-llama: 4 rows behind 128 tokens",
        "attention of 256 tokens through a window of 16",
        "exact search of 3,000 vectors",
        "embedding 40 texts",
    ):
        assert f"{what}: the time was up" in bench.left_out


def test_a_section_that_fails_is_named_and_the_rest_goes_on() -> None:
    run = Run(torch.device("cpu"), torch.float32, time.perf_counter() + 60, lambda _: None)

    def kernel() -> None:
        raise RuntimeError("no such kernel\nand where it was sought")

    with run.section("a kernel"):
        kernel()
    assert run.left_out == ["a kernel: RuntimeError: no such kernel"]


def test_the_verb_prints_a_card_and_one_line_of_json() -> None:
    done = CliRunner().invoke(app, ["bench", "gpu", "--small", "--json"])
    assert done.exit_code == 0
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "gpu"
    assert {"decode", "rows", "goals", "attention", "exact", "embed"} <= set(line)
    assert "left out" in done.stderr or line["left_out"] == []


def test_one_section_can_be_run_alone() -> None:
    done = CliRunner().invoke(
        app, ["bench", "gpu", "--small", "--only", "attention", "--seconds", "60", "--json"]
    )
    assert done.exit_code == 0
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["attention"]
    assert not any(line[part] for part in ("exact", "embed", "search", "decode", "prefill"))
    refused = CliRunner().invoke(app, ["bench", "gpu", "--small", "--only", "decoding"])
    assert refused.exit_code == 2
    assert "decoding is no section" in " ".join(refused.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_bench_says_so() -> None:
    done = CliRunner().invoke(app, ["bench", "gpu"])
    assert done.exit_code == 1
    assert "no CUDA device" in str(done.exception)
