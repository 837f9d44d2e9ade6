"""What `auto` chooses, and GGUF files: planned from their metadata, converted once, or refused."""

from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

from conftest import make_tiny_tokenizer, prompt_of
from rag.errors import BrokenModelError, UnknownModelError, UnsupportedModelError
from rag.lm import auto_model
from rag.lm.auto_model import CPU_DEFAULT, GPU_DEFAULT, choose_auto, choose_for_gpu
from rag.lm.catalog import FetchedModel, fetch_model, resolve_model
from rag.lm.engine import GenerationDone, model_named
from rag.lm.forward import forward
from rag.lm.four_bit import FILE_NAME, layout, without_four_bit
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.model_facts import find_model_facts
from rag.lm.native_cache import native_cache
from rag.settings import Settings

GIB = 2**30
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    leave_out: str = "",
    hidden: int = HIDDEN,
    inner: int = INNER,
    kind: GGMLQuantizationType | None = None,
    head_kind: GGMLQuantizationType | None = None,
) -> Path:
    """Write a tiny random llama as llama.cpp stores it, without one of its tensors if so named.

    The weights of its linear layers are in the format `kind`, the embeddings, which are its head,
    in `head_kind`, by default in float32.
    """
    vocabulary = make_tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "ab"]
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(vocabulary["<eos>"])
    writer.add_bos_token_id(vocabulary["<eos>"])
    shapes = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    width = KV_HEADS * hidden // HEADS
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (hidden,),
            f"blk.{layer}.ffn_norm.weight": (hidden,),
            f"blk.{layer}.attn_q.weight": (hidden, hidden),
            f"blk.{layer}.attn_k.weight": (width, hidden),
            f"blk.{layer}.attn_v.weight": (width, hidden),
            f"blk.{layer}.attn_output.weight": (hidden, hidden),
            f"blk.{layer}.ffn_gate.weight": (inner, hidden),
            f"blk.{layer}.ffn_up.weight": (inner, hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, inner),
        }
    random = np.random.default_rng(5)
    for name, shape in shapes.items():
        if name != leave_out:
            weights = random.normal(0, 0.05, shape).astype(np.float32)
            if kind is not None and name.startswith("blk") and len(shape) == 2:
                writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
            elif head_kind is not None and name == "token_embd.weight":
                writer.add_tensor(name, quantize(weights, head_kind), raw_dtype=head_kind)
            else:
                writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings whose models are in a temporary folder."""
    return Settings(home=tmp_path / "home", models_dir=tmp_path / "models", device="cpu")


def test_a_gguf_file_is_planned_from_its_metadata(tmp_path: Path, settings: Settings) -> None:
    facts = find_model_facts(str(write_gguf(tmp_path / "tiny.gguf")), settings)
    assert facts.spec.model_type == "llama"
    assert facts.quantization == "GGUF"
    assert facts.file_bytes == (tmp_path / "tiny.gguf").stat().st_size
    assert kv_cache_bytes(facts.spec, 100) == 100 * LAYERS * 2 * KV_HEADS * 8 * 2
    assert not settings.models_dir.exists()


def test_a_gguf_file_is_converted_once_and_answers(tmp_path: Path, settings: Settings) -> None:
    path = write_gguf(tmp_path / "my tiny.gguf")
    engine = LocalEngine.load(str(path), settings)
    *_, done = engine.generate(prompt_of([5, 6, 7]), max_new_tokens=2, stop=Event())
    assert isinstance(done, GenerationDone)
    folder = resolve_model(str(path), settings)
    assert folder.parent == settings.models_dir
    assert folder.name.startswith("my-tiny-")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_model(str(path), settings) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(path)  # other bytes under the same name are another model
    assert fetch_model(str(path), settings) != folder


def test_gguf_files_that_cannot_be_used_are_told(tmp_path: Path, settings: Settings) -> None:
    strange = write_gguf(tmp_path / "strange.gguf", architecture="perceiver")
    with pytest.raises(UnsupportedModelError, match="perceiver"):
        fetch_model(str(strange), settings)
    whole = write_gguf(tmp_path / "cut.gguf")
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(UnsupportedModelError, match=r"cut\.gguf"):
        fetch_model(str(whole), settings)
    lacking = write_gguf(tmp_path / "lacking.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(BrokenModelError, match="up_proj"):
        fetch_model(str(lacking), settings)
    with pytest.raises(UnknownModelError, match=r"none\.gguf"):
        resolve_model(str(tmp_path / "none.gguf"), settings)
    kept = [path for path in settings.models_dir.glob("*") if path.is_dir()]
    assert kept == []


def test_a_cpu_gets_the_smallest_that_answers(settings: Settings) -> None:
    assert choose_auto(settings).name == CPU_DEFAULT
    assert "no GPU" in choose_auto(settings).reason


@pytest.mark.parametrize(
    ("here", "gib", "chosen", "reason"),
    [
        ((), 24, GPU_DEFAULT, "not here yet"),
        ((), 2, CPU_DEFAULT, "so the smallest"),
        ((CPU_DEFAULT, GPU_DEFAULT), 24, GPU_DEFAULT, "the largest that is here and fits"),
        ((CPU_DEFAULT, GPU_DEFAULT), 3, CPU_DEFAULT, f"not {GPU_DEFAULT}, which needs 3.4 GiB"),
        ((GPU_DEFAULT, "gpt-oss-20b"), 24, GPU_DEFAULT, "not gpt-oss-20b, which needs"),
        ((GPU_DEFAULT, "gpt-oss-20b"), 78, "gpt-oss-20b", "of 78.0 GiB"),
        (("smollm2-135m",), 78, GPU_DEFAULT, "not here yet"),
    ],
)
def test_a_gpu_gets_the_largest_that_is_here_and_fits(
    here: tuple[str, ...],
    gib: int,
    chosen: str,
    reason: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = [FetchedModel(name, Path(name), 1, "bfloat16") for name in here]
    monkeypatch.setattr(auto_model, "fetched_models", lambda settings: fetched)
    monkeypatch.setattr("rag.lm.spec.measured_layers", lambda model, text: None)  # takes seconds
    choice = choose_for_gpu(settings, gib * GIB, 1728)
    assert choice.name == chosen
    assert reason in choice.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_choice_names_its_free_memory(settings: Settings) -> None:
    choice = choose_auto(settings.model_copy(update={"device": "cuda"}))
    assert "GiB free on the GPU" in choice.reason


@pytest.mark.skipif(layout() is None, reason="torch has no 4-bit product here")
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
def test_a_gguf_files_own_4_bit_blocks_decode_where_that_is_asked_for(
    tmp_path: Path, settings: Settings, kind: GGMLQuantizationType
) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf", hidden=256, inner=512, kind=kind))
    fetch_model(path, settings)
    fast_settings = settings.model_copy(update={"decode_weights": "4-bit"})
    stored, fast = (LocalEngine.load(path, each) for each in (settings, fast_settings))
    assert fast.name == f"{stored.name} decoding in 4 bits"
    assert model_named(fast.name) == stored.name
    assert fast.model_id != stored.model_id
    assert stored._weights_bytes == stored.spec.weights_bytes
    file_bytes = (resolve_model(path, settings) / FILE_NAME).stat().st_size
    assert fast._weights_bytes >= stored._weights_bytes + file_bytes

    found = []
    for engine in (stored, fast):
        engine.warm_up()
        cache = native_cache(engine._model.config)
        prompt = forward(engine._model, [list(range(5, 30))], cache)
        token = forward(engine._model, [[9]], cache)
        found.append((prompt, token.float()))
    assert torch.equal(found[0][0], found[1][0])  # prompts are read with the stored weights
    assert not torch.equal(found[0][1], found[1][1])
    difference = (found[0][1] - found[1][1]).norm() / found[0][1].norm()
    assert difference < 0.02  # the same weights, but for the rounding of scales
    with without_four_bit(fast._model):
        twin = native_cache(fast._model.config)
        forward(fast._model, [list(range(5, 30))], twin)
        assert torch.equal(forward(fast._model, [[9]], twin).float(), found[0][1])


@pytest.mark.skipif(layout() is None, reason="torch has no 4-bit product here")
@pytest.mark.parametrize("place", ["first weight", "last weight", "checksum"])
def test_a_flipped_bit_of_4_bit_weights_is_found_before_they_write(
    tmp_path: Path, settings: Settings, place: str
) -> None:
    kind = GGMLQuantizationType.Q4_0
    path = str(write_gguf(tmp_path / "tiny.gguf", hidden=256, inner=512, kind=kind))
    file = fetch_model(path, settings) / FILE_NAME
    content = bytearray(file.read_bytes())
    head_end = 8 + int.from_bytes(content[:8], "little")
    at = {
        "first weight": head_end,
        "last weight": len(content) - 1,
        "checksum": content.index(b'"sha256":"') + 12,
    }[place]
    content[at] ^= 1
    file.write_bytes(content)
    engine = LocalEngine.load(path, settings.model_copy(update={"decode_weights": "4-bit"}))
    for _ in range(2):  # it is no better the second time
        with pytest.raises(BrokenModelError, match=rf"{FILE_NAME} is damaged.*SHA-256") as caught:
            list(engine.generate(prompt_of([5, 6, 7]), max_new_tokens=3, stop=Event()))
        assert "FATHOM_DECODE_WEIGHTS=stored" in str(caught.value.hint)
    stored = LocalEngine.load(path, settings)
    *_, done = stored.generate(prompt_of([5, 6, 7]), max_new_tokens=2, stop=Event())
    assert isinstance(done, GenerationDone)


def test_where_there_are_no_4_bit_weights_the_stored_ones_decode(
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind = GGMLQuantizationType.Q4_0
    path = str(write_gguf(tmp_path / "tiny.gguf", hidden=256, inner=512, kind=kind))
    fetch_model(path, settings)
    monkeypatch.setattr("rag.lm.four_bit.layout", lambda: None)  # another CPU
    engine = LocalEngine.load(path, settings.model_copy(update={"decode_weights": "4-bit"}))
    assert "4 bits" not in engine.name
    assert "no 4-bit weights for this device" in caplog.text
    *_, done = engine.generate(prompt_of([5, 6, 7]), max_new_tokens=2, stop=Event())
    assert isinstance(done, GenerationDone)
    assert done.new_tokens == 2
