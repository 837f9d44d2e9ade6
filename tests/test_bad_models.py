"""Checkpoints that are damaged, incomplete or belie their config: one clear error each."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tiny_engine, make_tiny_tokenizer, prompt_of
from rag.errors import BrokenModelError, ModelError, UnsupportedModelError
from rag.lm.engine import GenerationDone
from rag.lm.loading import open_model
from rag.lm.local_engine import LocalEngine
from rag.settings import Settings
from tiny_families import tiny_model

Damage = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a whole tiny model: config, weights, tokenizer."""
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return path


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:  # noqa: ANN401
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


NORM = "model.layers.1.input_layernorm.weight"


def put(value: float) -> Damage:
    """Return the damage that writes one value into one weight."""

    def damage(folder: Path) -> None:
        change_weights(folder, lambda tensors: tensors[NORM].__setitem__(3, value))

    return damage


def reshape(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({NORM: torch.ones(31)}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda folder: change_weights(folder, lambda t: t.pop(NORM)), f"{NORM} is missing"),
        (lambda folder: change_config(folder, num_hidden_layers=3), "more weights are missing"),
        (lambda folder: change_config(folder, num_hidden_layers=1), "no layer that the config"),
        (reshape, f"{NORM} has the shape (31,), and the config says (32,)"),
        (lambda folder: change_config(folder, vocab_size=400), "(320, 32)"),
        (lambda folder: change_config(folder, intermediate_size=50), "(32, 48)"),
        (put(float("nan")), f"{NORM} holds values that are not finite"),
        (put(float("-inf")), f"{NORM} holds values that are not finite"),
        (cut, "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (index_of_nothing, "model-00001-of-00002.safetensors"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    damage: Damage, found: str, folder: Path, settings: Settings
) -> None:
    damage(folder)
    with pytest.raises(BrokenModelError) as raised:
        open_model(str(folder), settings).load()
    assert found in raised.value.message
    assert str(folder) in raised.value.message
    assert raised.value.hint


def test_a_whole_model_loads_with_its_own_weights(folder: Path, settings: Settings) -> None:
    loaded = open_model(str(folder), settings).load()
    for name, weight in tiny_model("llama").state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "gpt2", "deepseek_v3"])
def test_tied_fused_and_ignored_weights_are_not_taken_for_missing(
    family: str, tmp_path: Path, settings: Settings
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    loaded = open_model(str(tmp_path), settings).load()
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: [path.unlink() for path in folder.glob("token*")],
        lambda folder: (folder / "tokenizer.json").write_text("{"),
    ],
)
def test_a_model_without_a_usable_tokenizer_is_refused(
    damage: Damage, folder: Path, settings: Settings
) -> None:
    damage(folder)
    with pytest.raises(BrokenModelError, match="no usable tokenizer") as raised:
        open_model(str(folder), settings)
    assert "tokenizer.json" in raised.value.hint


def test_the_tokenizer_of_a_larger_model_is_refused(folder: Path, settings: Settings) -> None:
    change_config(folder, vocab_size=100)
    with pytest.raises(BrokenModelError, match="has 257 tokens, the model 100"):
        open_model(str(folder), settings)


def test_code_of_a_checkpoint_is_not_run(folder: Path, settings: Settings) -> None:
    ran = folder / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    wants = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    change_config(folder, auto_map=wants)
    assert open_model(str(folder), settings).load() is not None  # a type that transformers knows
    change_config(folder, model_type="own")
    with pytest.raises(UnsupportedModelError, match=r"code of its own \(modeling_own.Own"):
        open_model(str(folder), settings)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ({"model_type": "mamba"}, "mamba"),
    ],
)
def test_the_engine_refuses_a_config_that_lies_before_it_reads_weights(
    fields: dict[str, Any], found: str, folder: Path, settings: Settings
) -> None:
    change_config(folder, **fields)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=found):
        LocalEngine.load(str(folder), settings)


def test_generate_refuses_one_token_beyond_the_positions() -> None:
    engine = make_tiny_engine(max_position_embeddings=64)
    *_, done = engine.generate(prompt_of([5] * 60), max_new_tokens=4, stop=Event())
    assert isinstance(done, GenerationDone)
    with pytest.raises(ModelError, match="61 prompt tokens and 4 new ones do not fit the 64"):
        list(engine.generate(prompt_of([5] * 61), max_new_tokens=4, stop=Event()))
