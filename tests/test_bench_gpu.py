"""`fathom bench gpu` on small shapes: what it does on a card, tried on whatever is here."""

import json

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from eval.bench.gpu import REAL, SMALL, bench_gpu, card
from rag.lm.spec import ModelSpec
from ui.cli import app


def test_the_bench_on_small_shapes() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = bench_gpu(SMALL, device)
    ways = {(row.model, row.way, row.num_tokens) for row in bench.prefill}
    assert ways == {
        ("tiny-llama", "full", 128),
        ("tiny-llama", "full", 640),
        ("tiny-llama", "windowed", 128),
        ("tiny-llama", "windowed", 640),
        ("tiny-gemma3_text", "full", 128),
        ("tiny-gemma3_text", "full", 640),
    }
    assert all(row.kv_bytes_predicted == row.kv_bytes_actual for row in bench.prefill)
    assert [row.model for row in bench.decode] == ["tiny-llama", "tiny-gemma3_text"]
    assert [row.agrees for row in bench.twins] == [True, True, True]
    assert bench.search or any("FAISS" in reason for reason in bench.left_out)
    shown = card(bench)
    assert "tiny-gemma3_text" in shown
    assert all(reason in shown for reason in bench.left_out)


def test_the_real_shapes_are_an_8b_without_windows_and_one_with() -> None:
    plain, windowed = (AutoConfig.for_model(**facts) for _, facts in REAL.models)
    assert ModelSpec.from_config(plain, dtype_bytes=2).num_parameters == 8_030_261_248
    assert windowed.sliding_window == 1024


def test_what_the_time_does_not_allow_is_named() -> None:
    bench = bench_gpu(SMALL, torch.device("cpu"), deadline_seconds=0.0)
    assert not bench.prefill
    assert not bench.decode
    assert "tiny-llama: full prefill of 640 tokens: the time was up" in bench.left_out


def test_the_verb_prints_a_card_and_one_line_of_json() -> None:
    done = CliRunner().invoke(app, ["bench", "gpu", "--small", "--json"])
    assert done.exit_code == 0
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["bench"] == "gpu"
    assert "left out" in done.stderr or line["left_out"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_bench_says_so() -> None:
    done = CliRunner().invoke(app, ["bench", "gpu"])
    assert done.exit_code == 1
    assert "no CUDA device" in str(done.exception)
