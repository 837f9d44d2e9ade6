"""Prefill seconds: the counts by hand, the fit on made-up machines, and what is remembered."""

import itertools
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from conftest import make_tiny_tokenizer, prompt_of
from rag.lm.forward import forward
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.prefill_cost import (
    ChunkWork,
    PrefillRate,
    chunk_work,
    fit_rate,
    prefill_seconds,
    prefill_work,
)
from rag.lm.prefill_rate import PrefillClock, measure_rate, synthetic_cache, time_chunk
from rag.lm.spec import LayerSpec, ModelSpec, PositionRange
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from tiny_families import tiny_model

RATE = PrefillRate(0.06, 5e-12, 1.5e-11, 1.2e-9)


def spec_of(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec(
        model_type="llama",
        layers=layers,
        positions=(PositionRange("all", "default", 65536, 65536),),
        dtype_bytes=2,
        vocab_size=10,
        max_positions=65536,
        num_parameters=150_000_000,
        linear_parameters=100_000_000,
    )


FULL = LayerSpec("full", None, 128, 128, 512)
SLIDING = LayerSpec("sliding", 100, 128, 128, 512)
MIXED = spec_of(*[SLIDING] * 5, FULL)


def spec_of_model(model: Any) -> ModelSpec:  # noqa: ANN401
    return ModelSpec.from_config(model.config, dtype_bytes=model.dtype.itemsize)


# ---- the formula -------------------------------------------------------------------------------


def test_the_work_of_a_prefill_by_hand() -> None:
    work = prefill_work(spec_of(FULL, SLIDING), 1200)
    assert work.num_chunks == 3
    assert work.linear_flops == 2 * 100_000_000 * 1200
    full_pairs = 512 * 512 + 512 * 1024 + 176 * 1200
    sliding_pairs = 512 * 512 + 512 * (99 + 512) + 176 * (99 + 176)
    assert work.attention_flops == 4 * 512 * (full_pairs + sliding_pairs)
    # Nothing stands in the cache before the first chunk, 512 and 1024 tokens before the others.
    assert work.cached_bytes == 2 * 256 * (512 + 1024 + 99 + 99)


def test_what_is_cached_already_costs_no_more_than_being_read() -> None:
    whole = prefill_work(MIXED, 1024 + 40)
    kept = prefill_work(MIXED, 1024)
    rest = prefill_work(MIXED, 1024 + 40, cached_tokens=1024)
    assert rest == chunk_work(MIXED, 40, 1024)
    for name in ("num_chunks", "linear_flops", "attention_flops", "cached_bytes"):
        assert getattr(kept, name) + getattr(rest, name) == getattr(whole, name)
    # A few tokens on a long kept document are not free: a pass is started and the cache is read.
    few = prefill_seconds(MIXED, RATE, 1025, cached_tokens=1024)
    assert few > RATE.chunk_seconds
    assert prefill_work(MIXED, 5, cached_tokens=5) == ChunkWork(0, 0, 0, 0)


def test_seconds_grow_with_every_token_and_shrink_with_every_one_cached() -> None:
    by_length = [prefill_seconds(MIXED, RATE, n) for n in range(1, 3000, 7)]
    assert all(a < b for a, b in itertools.pairwise(by_length))
    by_cached = [prefill_seconds(MIXED, RATE, 3000, cached_tokens=n) for n in range(0, 3000, 512)]
    assert all(a > b for a, b in itertools.pairwise(by_cached))


def test_full_layers_cost_the_square_of_the_length_and_windows_its_multiple() -> None:
    def attention(layer: LayerSpec, num_tokens: int) -> int:
        return prefill_work(spec_of(layer), num_tokens).attention_flops

    assert attention(FULL, 32768) / attention(FULL, 16384) == pytest.approx(4, rel=0.05)
    assert attention(SLIDING, 32768) / attention(SLIDING, 16384) == pytest.approx(2, rel=0.05)


# ---- the fit -----------------------------------------------------------------------------------

KINDS = [(512, 2048), (512, 0), (64, 2048), (64, 0)]


@pytest.mark.parametrize(
    "rate",
    [
        RATE,
        PrefillRate(0.0004, 2e-14, 3e-14, 1e-12),  # a GPU: all but the start is small
        PrefillRate(0.0, 5e-12, 5e-12, 2e-9),
    ],
)
def test_the_fit_finds_the_rates_of_a_made_up_machine(rate: PrefillRate) -> None:
    works = [chunk_work(MIXED, *kind) for kind in KINDS]
    found = fit_rate([(work, rate.seconds(work)) for work in works])
    for name in ("chunk", "linear_flop", "attention_flop", "cached_byte"):
        expected = getattr(rate, f"{name}_seconds")
        unit = getattr(RATE, f"{name}_seconds") * 1e-9
        assert getattr(found, f"{name}_seconds") == pytest.approx(expected, rel=1e-6, abs=unit)
    for num_tokens, cached in ((8192, 0), (1536, 1500), (700, 0)):
        assert prefill_seconds(MIXED, found, num_tokens, cached_tokens=cached) == pytest.approx(
            prefill_seconds(MIXED, rate, num_tokens, cached_tokens=cached)
        )


def test_a_noisy_measurement_gives_no_negative_rate() -> None:
    works = [chunk_work(MIXED, *kind) for kind in KINDS]
    # The small chunk on the longer cache was faster than without one, which cannot be.
    noisy = [1.1, 0.9, 0.7, 1.2]
    found = fit_rate([(w, f * RATE.seconds(w)) for w, f in zip(works, noisy, strict=True)])
    assert min(found.to_json().values()) >= 0
    assert prefill_seconds(MIXED, found, 4096) == pytest.approx(
        prefill_seconds(MIXED, RATE, 4096), rel=0.3
    )


def test_attention_is_never_taken_to_cost_less_than_the_weights() -> None:
    works = [chunk_work(MIXED, *kind) for kind in KINDS]
    # A busy machine: what the long cache adds to both chunks is lost in what others took.
    times = [0.8, 1.3, 0.8, 1.3]
    found = fit_rate([(w, f * RATE.seconds(w)) for w, f in zip(works, times, strict=True)])
    assert found.attention_flop_seconds >= found.linear_flop_seconds > 0
    assert 0.3 < prefill_seconds(MIXED, found, 60_000) / prefill_seconds(MIXED, RATE, 60_000) < 3


# ---- the measurement ---------------------------------------------------------------------------


class MadeUpMachine:
    """A clock that a model's passes advance by what a rate says they take."""

    def __init__(self, spec: ModelSpec, rate: PrefillRate, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0

        def timed(model: Any, rows: Any, cache: Any) -> torch.Tensor:  # noqa: ANN401
            self.now += rate.seconds(chunk_work(spec, len(rows[0]), cache.get_seq_length()))
            return forward(model, rows, cache)

        monkeypatch.setattr("rag.lm.forward.forward", timed)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_measuring_finds_the_machine_it_is_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows included, and gpt2, whose table of positions leaves little room."""
    model = tiny_model(family)
    spec = spec_of_model(model)
    rate = PrefillRate(0.01, 1e-8, 2e-8, 1e-7)
    found = measure_rate(model, spec, clock=MadeUpMachine(spec, rate, monkeypatch))
    for num_tokens, cached in ((900, 0), (640, 600)):
        assert prefill_seconds(spec, found, num_tokens, cached_tokens=cached) == pytest.approx(
            prefill_seconds(spec, rate, num_tokens, cached_tokens=cached), rel=1e-3
        )


def key_shapes(cache: Any) -> list[Any]:  # noqa: ANN401
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [None if states is None else tuple(states.shape) for states in keys]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "lfm2", "gpt_oss"])
def test_a_synthetic_cache_is_taken_like_a_real_one(family: str) -> None:
    model = tiny_model(family)
    spec = spec_of_model(model)
    _, read = time_chunk(model, spec, 24)
    cache = synthetic_cache(read, spec, 300, device_type="cpu")
    assert cache is not None
    assert read.get_seq_length() == 24
    _, went_on = time_chunk(model, spec, 8, cache)
    assert went_on.get_seq_length() == 308
    assert cache.get_seq_length() == 300
    real = time_chunk(model, spec, 308)[1]
    assert key_shapes(went_on) == key_shapes(real)


def test_where_no_cache_can_be_made_up_the_one_that_was_read_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rag.lm.prefill_rate.free_device_bytes", lambda device: 0)
    model = tiny_model("llama")
    spec = spec_of_model(model)
    _, read = time_chunk(model, spec, 24)
    assert synthetic_cache(read, spec, 300, device_type="cpu") is None
    rate = PrefillRate(0.01, 1e-8, 2e-8, 1e-7)
    found = measure_rate(model, spec, clock=MadeUpMachine(spec, rate, monkeypatch))
    assert prefill_seconds(spec, found, 900) == pytest.approx(
        prefill_seconds(spec, rate, 900), rel=1e-3
    )


# ---- what is remembered ------------------------------------------------------------------------


@pytest.fixture
def calibrations(tmp_path: Path) -> CalibrationStore:
    return CalibrationStore(Database(f"sqlite:///{tmp_path / 'library.sqlite'}"))


def clock_of(
    calibrations: CalibrationStore, *, model_name: str = "m", spec: ModelSpec = MIXED
) -> PrefillClock:
    return PrefillClock(spec, model_name=model_name, device_type="cpu", calibrations=calibrations)


def test_rates_are_stored_for_each_model_dtype_and_machine(
    calibrations: CalibrationStore,
) -> None:
    clock = clock_of(calibrations)
    assert not clock_of(calibrations).is_set
    with pytest.raises(RuntimeError, match="not been measured"):
        clock.seconds(100)
    calibrations.save(clock.key, RATE.to_json())
    assert clock.is_set
    assert clock.seconds(5000, cached_tokens=700) == prefill_seconds(
        MIXED, RATE, 5000, cached_tokens=700
    )
    assert clock_of(calibrations).is_set
    assert not clock_of(calibrations, model_name="n").is_set
    other = ModelSpec.from_config(tiny_model("llama").config, dtype_bytes=4)
    assert not clock_of(calibrations, spec=other).is_set
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert not clock_of(calibrations).is_set
    finally:
        torch.set_num_threads(threads)
    for part in ("2 bytes", "weights in blocks", "chunks of 512", torch.__version__):
        assert part in clock.key


def test_an_answer_that_is_off_by_a_quarter_mends_the_rate(
    calibrations: CalibrationStore,
) -> None:
    clock = clock_of(calibrations)
    calibrations.save(clock.key, RATE.to_json())
    assert clock.is_set
    before = clock.seconds(4096)
    clock.observe(4096, 1.2 * before)  # within what a machine varies
    clock.observe(40, 100.0)  # too short to judge by
    clock.observe(4096, 100.0, cached_tokens=4000)  # and so is this
    assert clock.seconds(4096) == before
    clock.observe(4096, 2 * before)
    assert clock.seconds(4096) == pytest.approx(2 * before)
    assert clock.seconds(900, cached_tokens=800) == pytest.approx(
        2 * prefill_seconds(MIXED, RATE, 900, cached_tokens=800)
    )
    assert clock_of(calibrations).is_set
    clock.observe(4096, 0.5 * before)  # and back
    later = clock_of(calibrations)
    assert later.is_set
    assert later.seconds(4096) == pytest.approx(0.5 * before)


def test_an_engine_measures_once_for_all_processes_and_mends_by_its_answers(
    calibrations: CalibrationStore,
) -> None:
    model, tokenizer = tiny_model("llama"), make_tiny_tokenizer()
    first = LocalEngine(model, tokenizer, name="tiny", calibrations=calibrations)
    seconds = first.predicted_prefill_seconds(2000)

    def never() -> Any:  # noqa: ANN401
        raise AssertionError("the weights are not needed to remember")

    later = LocalEngine(
        never, tokenizer, name="tiny", config=model.config, dtype_bytes=4, calibrations=calibrations
    )
    assert seconds is not None
    assert later.predicted_prefill_seconds(2000) == seconds

    key = later._prefill_clock.key
    slow = PrefillRate(**calibrations.load(key)).scaled(1e6)  # of a far slower machine
    calibrations.save(key, slow.to_json())
    engine = LocalEngine(model, tokenizer, name="tiny", calibrations=calibrations)
    found = engine.predicted_prefill_seconds(2000)
    assert found is not None
    assert found > 1e5 * seconds
    list(engine.generate(prompt_of([5] * 600), max_new_tokens=1, stop=Event()))
    found = engine.predicted_prefill_seconds(2000)
    assert found is not None
    assert found < 1e5 * seconds


def test_the_cache_that_is_counted_is_the_one_of_the_formula() -> None:
    assert chunk_work(MIXED, 1, 5000).cached_bytes == kv_cache_bytes(MIXED, 5000)
