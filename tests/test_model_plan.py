"""Planning a model without its weights: shipped facts, files, gates, numbers by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoConfig, DynamicCache
from typer.testing import CliRunner

from rag.errors import FathomError, UnknownModelError, UnsupportedModelError
from rag.lm.known_models import find_known_model, known_models
from rag.lm.kv_bytes import KVDtype, kv_cache_bytes, measured_kv_bytes
from rag.lm.model_facts import find_model_facts
from rag.lm.peak_bytes import peak_bytes
from rag.lm.prefill_rate import PrefillClock
from rag.lm.spec import ModelSpec
from rag.routing.model_plan import ModelPlan, longest_context, plan_model
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from tiny_families import tiny_config, tiny_model
from ui.cli import app
from ui.plots import draw_model_plan
from ui.verbs.model_plan import parse_kv_dtype, parse_size, remembered_seconds

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def known_spec(name: str, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """Return the spec of a known model by formula alone: the run without weights takes seconds.

    Its families are held to real tensors in test_kv_bytes.py.
    """
    monkeypatch.setattr("rag.lm.spec.measured_layers", lambda model, text: None)
    fields = dict(known_models()[name].config)
    return ModelSpec.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


@pytest.mark.parametrize("name", sorted(known_models()))
def test_every_known_model_is_planned_and_has_the_published_parameters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = known_spec(name, monkeypatch)
    known = known_models()[name]
    assert spec.cache_basis == "verified"
    assert spec.num_parameters == known.num_parameters
    assert spec.dtype_bytes == 2
    assert known.source
    plan = plan_model(spec, 4096, model=name, device_bytes=2**50, reserve_bytes=0)
    assert plan.fits
    assert plan.weights_bytes == 2 * known.num_parameters
    assert sum(plan.kv_bytes_by_kind.values()) == plan.kv_bytes
    assert plan.max_tokens == spec.max_positions


def test_at_least_twelve_models_are_known_and_found_by_any_of_their_names() -> None:
    assert len(known_models()) >= 12
    for name in ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"):
        found = find_known_model(name)
        assert found is not None
        assert found.name == "llama-3.1-8b"
    assert find_known_model("llama") is None


# Elements of one token in all layers, or of all windows, from the published widths.
@pytest.mark.parametrize(
    ("name", "num_tokens", "num_bytes"),
    [
        ("llama-3.1-8b", 131072, 16 * GIB),
        ("llama-3.3-70b", 131072, 40 * GIB),
        ("qwen2.5-7b", 32768, 2 * 32768 * 28 * 2 * 4 * 128),
        ("deepseek-v3", 10000, 2 * 10000 * 61 * (512 + 64)),
        ("gpt-oss-20b", 50000, 2 * 2 * 8 * 64 * (12 * 50000 + 12 * 127)),
        ("gemma-3-27b", 100000, 2 * 2 * 16 * 128 * (10 * 100000 + 52 * 1023)),
        (
            "qwen3-next-80b-a3b",
            9000,
            2 * 9000 * 12 * 2 * 2 * 256
            + 36 * (2 * (2 * 16 * 128 + 32 * 128) * 4 + 4 * 32 * 128 * 128),
        ),
    ],
)
def test_cache_bytes_by_hand(
    name: str, num_tokens: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = known_spec(name, monkeypatch)
    assert kv_cache_bytes(spec, num_tokens) == num_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "qwen3_moe"])
def test_the_plan_of_a_folder_is_what_a_run_of_its_model_holds(
    family: str, tmp_path: Path, settings: Settings
) -> None:
    model = tiny_model(family).bfloat16()
    model.save_pretrained(tmp_path)
    facts = find_model_facts(str(tmp_path), settings)
    plan = plan_model(facts.spec, 60, model="tiny", device_bytes=GIB, reserve_bytes=0)
    cache = DynamicCache(config=model.config)
    ids = torch.arange(2, 62)[None]
    with torch.inference_mode():
        for piece in (ids[:, :-1], ids[:, -1:]):
            model(input_ids=piece, past_key_values=cache, use_cache=True)
    assert plan.kv_bytes == measured_kv_bytes(cache)
    assert plan.weights_bytes == sum(weight.nbytes for weight in model.parameters())
    assert facts.file_bytes == (tmp_path / "model.safetensors").stat().st_size


def tiny_plan(device_bytes: int, tokens: int = 1000, **changes: Any) -> ModelPlan:  # noqa: ANN401
    spec = ModelSpec.from_config(tiny_config("llama"), dtype_bytes=2)
    return plan_model(spec, tokens, model="t", device_bytes=device_bytes, **changes)


def test_weights_cache_peak_and_reserve_have_to_fit_together() -> None:
    spec = ModelSpec.from_config(tiny_config("llama"), dtype_bytes=2)
    reserve = 12345
    needed = spec.weights_bytes + kv_cache_bytes(spec, 1000) + peak_bytes(spec, 1000) + reserve
    exact = tiny_plan(needed, reserve_bytes=reserve)
    assert exact.fits
    assert (exact.max_tokens, exact.num_sequences) == (1000, 1)
    short = tiny_plan(needed - 1, reserve_bytes=reserve)
    assert not short.fits
    assert [gate.gate for gate in short.gates if not gate.passed] == ["kv_bytes"]
    assert (short.max_tokens, short.num_sequences) == (999, 0)
    (gate,) = (gate for gate in exact.gates if gate.gate == "kv_bytes")
    assert gate.value == exact.kv_bytes == gate.limit
    assert tiny_plan(0, reserve_bytes=0).max_tokens == 0


def test_positions_and_a_cap_end_the_context_and_a_slow_prefill_fails() -> None:
    assert tiny_plan(2**40, reserve_bytes=0).max_tokens == 2048
    assert tiny_plan(2**40, reserve_bytes=0, max_context_tokens=700).max_tokens == 700
    plan = tiny_plan(2**40, 2049, reserve_bytes=0, predicted_prefill_seconds=61.0)
    assert [gate.gate for gate in plan.gates if not gate.passed] == [
        "tokens",
        "positions",
        "prefill_seconds",
    ]
    slow = tiny_plan(2**40, reserve_bytes=0, predicted_prefill_seconds=61.0)
    assert slow.fits
    assert not slow.gates[-1].passed


def test_a_quantised_cache_takes_its_share() -> None:
    whole = tiny_plan(GIB, reserve_bytes=0)
    assert tiny_plan(GIB, reserve_bytes=0, kv_dtype=KVDtype.INT8).kv_bytes * 2 == whole.kv_bytes
    assert tiny_plan(GIB, reserve_bytes=0, kv_dtype=KVDtype.INT4).kv_bytes * 4 == whole.kv_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_the_longest_context_is_the_inverse_of_what_it_takes(family: str) -> None:
    spec = ModelSpec.from_config(tiny_config(family), dtype_bytes=2)
    for tokens in (2, 600, 123_456):
        needed = kv_cache_bytes(spec, tokens) + peak_bytes(spec, tokens)
        longest = longest_context(spec, needed)
        assert longest >= tokens
        assert kv_cache_bytes(spec, longest) + peak_bytes(spec, longest) <= needed
        if family != "mistral":  # all of its layers slide: it stops growing
            assert longest_context(spec, needed - 1) < tokens


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GiB", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("1.5 tib", 3 * 2**39),
        ("512M", 512 * 10**6),
        ("1000", 1000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "24 XiB", "-3GiB", "1e9"])
def test_what_is_no_size_or_format_is_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)
    with pytest.raises(typer.BadParameter):
        parse_kv_dtype(text)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plan_is_drawn(suffix: str, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(tiny_config("gemma3_text"), dtype_bytes=2)
    plan = plan_model(spec, 1000, model="tiny gemma", device_bytes=2**22, reserve_bytes=0)
    path = tmp_path / f"plan{suffix}"
    draw_model_plan(plan, spec, path)
    picture = path.read_bytes()
    if suffix == ".png":
        assert picture.startswith(b"\x89PNG")
    else:
        for words in (b"sliding", b"full", b"longest admissible", b"positions end"):
            assert words in picture


def plan_verb(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ui.cli", "plan", "--home", str(home), *arguments],
        cwd=ROOT,
        env={**os.environ, "FATHOM_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_verb_needs_no_library_and_prints_the_contract(tmp_path: Path) -> None:
    home, picture = tmp_path / "home", tmp_path / "plan.png"
    done = plan_verb(
        home,
        *("--model", "Llama-3.1-8B", "--tokens", "131072", "--device-memory", "24GiB"),
        *("--plot", str(picture), "--json"),
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["kv_bytes"] == 16 * GIB
    assert plan["kv_bytes_by_kind"] == {"full": 16 * GIB}
    assert plan["weights_bytes"] == 2 * 8030261248
    assert plan["fits"] is False
    assert 0 < plan["max_tokens"] < 131072
    assert {gate["gate"] for gate in plan["gates"]} == {"tokens", "positions", "kv_bytes"}
    assert {"model", "tokens"} < plan.keys()
    assert picture.is_file()
    assert not home.exists()


def test_the_verb_tells_people_and_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    model = tiny_config("llama")
    model.save_pretrained(tmp_path / "model")
    here = ("--model", str(tmp_path / "model"), "--tokens", "4096")
    done = plan_verb(tmp_path, *here)
    assert done.returncode == 0, done.stderr
    assert "positions  FAILED" in done.stdout
    assert "longest context that fits: 2,048 tokens" in done.stdout
    assert "not measured here" in done.stdout
    for wrong in (("--tokens", "4096", "-d", "1"), ("--plot", "x.png"), (*here, "--plot", "x.doc")):
        assert CliRunner().invoke(app, ["plan", *wrong]).exit_code == 2


def test_a_rate_that_the_library_remembers_is_used(tmp_path: Path, settings: Settings) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    here = settings.model_copy(update={"model": str(tmp_path / "model"), "device": "cpu"})
    facts = find_model_facts(here.model, here)
    assert remembered_seconds(facts.name, facts.spec, 900, here) is None
    assert not here.home.exists()
    clock = PrefillClock(
        facts.spec,
        model_name=facts.name,
        device_type="cpu",
        calibrations=CalibrationStore(Database(here.resolved_database_url)),
    )
    clock.measure(model)
    assert remembered_seconds(facts.name, facts.spec, 900, here) == clock.seconds(900)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_attention_heads": 5}, "heads (5)"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"sliding_window": -7, "model_type": "mistral"}, "sliding_window is -7"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ({"model_type": "gpt-9"}, "gpt-9"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_config_that_lies_is_told(
    changes: dict[str, Any], found: str, tmp_path: Path, settings: Settings
) -> None:
    fields = tiny_config("llama").to_dict() | {"head_dim": None} | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError) as raised:
        find_model_facts(str(tmp_path), settings)
    assert found in raised.value.message
    assert raised.value.hint


def test_what_is_no_model_is_told(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    wrong: dict[str, type[FathomError]] = {
        "gpt-9": UnknownModelError,
        "nobody/nothing": UnknownModelError,
        str(tmp_path): UnsupportedModelError,
        str(tmp_path / "cut.gguf"): UnsupportedModelError,
        str(tmp_path / "absent.gguf"): UnsupportedModelError,
    }
    for name, error in wrong.items():
        with pytest.raises(error) as raised:
            find_model_facts(name, settings)
        assert name in raised.value.message
