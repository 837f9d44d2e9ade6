"""The benches of the language model, on tiny models: what they count, compare and print."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import make_tiny_tokenizer
from eval.bench import decode, document_kv, prefill, windowed
from eval.bench.machine import this_machine
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.prefill_cost import prefill_work
from rag.lm.spec import ModelSpec
from rag.lm.windowed_attention import WindowPlan, check_windowed
from tiny_families import tiny_model
from ui.cli import app


def spec_of(model: Any) -> ModelSpec:  # noqa: ANN401
    return ModelSpec.from_config(model.config, dtype_bytes=model.dtype.itemsize)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_prefill_is_predicted_and_measured_at_each_length(clock: str) -> None:
    model = tiny_model("gemma3_text")
    spec = spec_of(model)
    said: list[str] = []
    bench = prefill.bench_prefill(
        model, spec, [1024, 512], name="tiny", rounds=2, clock=clock, on_progress=said.append
    )
    assert said == ["round 1 of 2", "round 2 of 2"]
    assert [row.num_tokens for row in bench.rows] == [512, 1024]
    short, long = bench.rows
    for row in bench.rows:
        for seconds in (row.prefill, row.question):
            assert seconds.predicted > 0
            assert seconds.measured > 0
            assert seconds.error == pytest.approx(seconds.predicted / seconds.measured - 1)
        assert row.tokens_per_second == pytest.approx(row.num_tokens / row.prefill.measured)
    assert short.prefill.measured < long.prefill.measured  # the one is a part of the other
    assert short.prefill.predicted < long.prefill.predicted
    assert bench.largest_error == max(abs(row.prefill.error) for row in bench.rows)
    reached = prefill_work(spec, 1024).flops / long.prefill.measured
    assert 0 < reached < 100 * bench.matmul_flops_per_second
    assert "largest error of a prefill" in prefill.card(bench)
    json.dumps(bench.to_json())


@pytest.mark.parametrize("lengths", [[], [500], [0], [512, 700]])
def test_lengths_that_are_no_chunks_are_refused(lengths: list[int]) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="multiples of 512"):
        prefill.bench_prefill(model, spec_of(model), lengths, name="tiny")


def test_the_limit_of_decoding_is_what_a_token_reads() -> None:
    model = tiny_model("llama")
    spec = spec_of(model)
    bench = decode.bench_decode(
        model, spec, [16, 900], name="tiny", num_tokens=2, rounds=2, copied_bytes=2**20
    )
    assert [row.context_tokens for row in bench.rows] == [16, 900]
    head = model.get_output_embeddings().weight.numel()
    weights = (spec.linear_parameters + head) * spec.dtype_bytes
    for row in bench.rows:
        assert row.bytes_per_token == weights + kv_cache_bytes(spec, row.context_tokens)
        limit = bench.copy_bytes_per_second / row.bytes_per_token
        assert row.limit_tokens_per_second == pytest.approx(limit)
        assert row.share == pytest.approx(row.tokens_per_second / limit)
    assert "GB/s" in decode.card(bench)
    json.dumps(bench.to_json())


def test_a_kept_document_is_compared_with_a_fresh_one(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    bench = document_kv.bench_document_kv(
        model,
        make_tiny_tokenizer(),
        tmp_path,
        name="tiny",
        document_tokens=700,
        question_tokens=9,
        rounds=2,
    )
    assert bench.logit_difference < 1e-3
    assert bench.chunk_difference < 1e-3  # float32
    assert bench.same_next_token
    assert bench.kept_bytes == bench.predicted_bytes == kv_cache_bytes(spec_of(model), 700)
    assert bench.kept_bytes < bench.file_bytes < bench.kept_bytes + 64 * 1024
    assert bench.fresh.ratio == 1.0
    assert min(bench.fresh.seconds, bench.memory.seconds, bench.disk.seconds) > 0
    assert "times" in document_kv.card(bench)
    json.dumps(bench.to_json())


def test_the_windowed_card_says_whether_memory_is_flat() -> None:
    plan = WindowPlan(num_sinks=4, window=64)
    bench = windowed.bench_windowed(
        check_windowed(tiny_model("llama")), plan, [32, 256, 1024], rounds=1
    )
    peaks = [row.windowed.peak_bytes for row in bench.rows]
    assert bench.peak_growth == peaks[2] / peaks[1]  # the first does not fill the window
    assert bench.peak_growth < 1.1
    assert bench.rows[2].full.peak_bytes > 2 * bench.rows[1].full.peak_bytes
    assert f"at 1,024 tokens to that at 256: {bench.peak_growth:.2f}" in windowed.card(bench)


def test_the_machine_is_named() -> None:
    import torch

    machine = this_machine(torch.device("cpu"))
    assert machine.versions["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in machine.describe()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prefill", "--tokens", "600"], "multiples of 512"),
        (["prefill", "--clock", "moon"], "expected wall or cpu"),
        (["decode", "--clock", "moon"], "expected wall or cpu"),
        (["document-kv", "--clock", "moon"], "expected wall or cpu"),
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments: list[str], expected: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert expected in done.output


@pytest.mark.model
def test_the_verb_prints_a_card_and_one_line_of_json() -> None:
    from rag.errors import ModelFetchError
    from rag.lm.catalog import resolve_model
    from rag.settings import Settings

    try:
        resolve_model("smollm2-135m", Settings())
    except ModelFetchError:
        pytest.skip("smollm2-135m is not fetched (make test fetches it)")
    arguments = ["--context", "8", "--rounds", "1", "--json"]
    done = CliRunner().invoke(app, ["bench", "decode", *arguments])
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["bench"], line["model"]) == ("decode", "smollm2-135m")
    assert "tokens/s" in done.stderr
