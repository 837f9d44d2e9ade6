"""What a new process leaves out: specs that are known, garbage that is none."""

import gc
from pathlib import Path
from typing import Any

import pytest

from rag.lm.spec import ModelSpec
from rag.lm.spec_memory import remembered_spec
from rag.runtime import without_collecting
from rag.store.calibrations import CalibrationStore
from rag.store.database import Database
from tiny_families import tiny_config


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
