"""What a new process leaves out: specs that are known, garbage that is none, blocks too dear."""

import gc
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from conftest import make_tiny_tokenizer
from rag.errors import StorageFullError
from rag.lm.engine import Prompt, ScoreRequest
from rag.lm.lean_forward import lean_pass, use_lean_forward
from rag.lm.loading import _SHORT_READINGS, Weights
from rag.lm.local_engine import LocalEngine
from rag.lm.packed_linear import PackedLinear, can_pack, use_packed_weights
from rag.lm.spec import ModelSpec
from rag.lm.spec_memory import remembered_spec
from rag.runtime import without_collecting
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from tiny_families import tiny_config, tiny_model


@pytest.fixture
def calibrations(tmp_path: Path) -> CalibrationStore:
    return CalibrationStore(Database(f"sqlite:///{tmp_path / 'library.sqlite'}"))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3", "gpt2"])
def test_a_spec_is_worked_out_once_a_config(
    family: str, calibrations: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(family)
    expected = ModelSpec.from_config(config, dtype_bytes=2)
    assert remembered_spec(config, dtype_bytes=2, calibrations=calibrations) == expected

    def never(*_: object, **__: object) -> Any:  # noqa: ANN401
        raise AssertionError("it is remembered")

    with monkeypatch.context() as patched:
        patched.setattr(ModelSpec, "from_config", never)
        found = remembered_spec(tiny_config(family), dtype_bytes=2, calibrations=calibrations)
        with pytest.raises(AssertionError, match="remembered"):
            remembered_spec(config, dtype_bytes=4, calibrations=calibrations)
    assert found == expected
    assert hash(found) == hash(expected)  # tuples all the way down, as caches of plans want it
    assert remembered_spec(config, dtype_bytes=2, calibrations=None) == expected


def test_another_config_has_another_spec(calibrations: CalibrationStore) -> None:
    first = remembered_spec(tiny_config("llama"), dtype_bytes=2, calibrations=calibrations)
    longer = tiny_config("llama", max_position_embeddings=12345)
    second = remembered_spec(longer, dtype_bytes=2, calibrations=calibrations)
    assert first.max_positions != second.max_positions == 12345


def test_a_spec_that_cannot_be_kept_is_worked_out_all_the_same(
    calibrations: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFullError("the disk is full", hint="free some space")

    monkeypatch.setattr(calibrations, "save", full)
    config = tiny_config("llama")
    found = remembered_spec(config, dtype_bytes=2, calibrations=calibrations)
    assert found == ModelSpec.from_config(config, dtype_bytes=2)


def test_garbage_is_collected_again_after_a_block_without() -> None:
    before = gc.get_freeze_count()
    try:
        with without_collecting():
            assert not gc.isenabled()
            with pytest.raises(KeyError), without_collecting():
                raise KeyError
            assert not gc.isenabled()  # the inner block ends, the outer one goes on
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_the_first_short_readings_take_a_model_as_it_is_loaded() -> None:
    made: list[str] = []
    weights = Weights("tiny", num_bytes=1, load=lambda: "model", hasten=made.append)
    for _ in range(_SHORT_READINGS):
        assert weights.loaded(for_short=True) == "model"
    assert made == []
    weights.loaded(for_short=True)
    weights.loaded()
    assert made == ["model"]
    at_once = Weights("tiny", num_bytes=1, load=lambda: "other", hasten=made.append)
    at_once.loaded()
    at_once.loaded(for_short=True)
    assert made == ["model", "other"]


def test_an_engine_scores_the_same_before_it_is_hastened_and_after() -> None:
    model = tiny_model("llama").bfloat16()

    def hasten(loaded: Any) -> None:  # noqa: ANN401
        use_packed_weights(loaded)
        use_lean_forward(loaded)

    engine = LocalEngine(
        lambda: model,
        make_tiny_tokenizer(),
        name="tiny",
        config=model.config,
        dtype_bytes=2,
        hasten=hasten,
    )
    requests = [ScoreRequest((5, 6, 7, 8, 9) * 9, (11, 12, end)) for end in (3, 4)]
    before = engine.score(requests, stop=Event())
    assert lean_pass(model) is None
    prompt = Prompt((), 4, (5, 6, 7, 8))
    list(engine.generate(prompt, max_new_tokens=2, stop=Event()))  # who writes waits for it
    packed = [part for part in model.modules() if isinstance(part, PackedLinear)]
    assert bool(packed) == can_pack()
    engine.forget()  # so that the prompt is read again
    after = engine.score(requests, stop=Event())
    assert before is not None
    assert after is not None
    assert after.values == before.values
