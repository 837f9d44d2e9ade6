"""Answers written with the whole numbers of a GGUF file: those of its weights in float32."""

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM

from conftest import prompt_of
from rag.errors import BrokenModelError
from rag.lm import integer_decoder
from rag.lm.catalog import fetch_model, resolve_model
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import DocumentPrefix, GenerationDone, Message, TextPiece
from rag.lm.forward import forward
from rag.lm.gguf_blocks import PARTS, in_halves, read_blocks
from rag.lm.integer_decoder import AnswerPasses, IntegerDecoder
from rag.lm.integer_weights import FILE_NAME, integers_file, load_integers, write_integers
from rag.lm.kv_bytes import measured_kv_bytes
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import branch, native_cache
from rag.lm.prompt_lookup import PromptLookup
from rag.lm.spec import load_config
from rag.settings import Settings
from rag.types import DecodingWay
from test_auto_and_gguf import write_gguf

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is an extra")

KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
# Where the halves of a block stand, of the formats that the package cannot write.
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
PROMPT = list(range(5, 30))


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """Return settings whose models are in a temporary folder, too."""
    return settings.model_copy(update={"models_dir": tmp_path / "models", "device": "cpu"})


def random_blocks(kind: str) -> np.ndarray:
    """Return a matrix in a format of GGUF; of the K formats every bit is random."""
    generator = np.random.default_rng(0)
    if kind not in HALVES:
        weights = generator.standard_normal((6, 512)).astype(np.float32)
        return np.asarray(gguf.quantize(weights, GGMLQuantizationType[kind]))
    _, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = generator.integers(0, 256, (6, 2, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = (generator.random((6, 2, 1)) / 64).astype(np.float16)
        data[..., at : at + 2] = halves.view(np.uint8)
    return data.reshape(6, -1)


def weights_of(blocks: Any) -> np.ndarray:  # noqa: ANN401 - Blocks
    groups = blocks.numbers.reshape(len(blocks.numbers), -1, blocks.group)
    weights = groups * blocks.scales[..., None]
    if blocks.offsets is not None:
        weights = weights + blocks.offsets[..., None]
    return np.asarray(weights.reshape(len(weights), -1))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_weights_that_they_stand_for_to_the_last_bit(kind: str) -> None:
    data = random_blocks(kind)
    blocks = read_blocks(data, kind)
    assert blocks is not None
    assert blocks.is_four_bit == kind.startswith("Q4")
    expected = gguf.dequantize(data, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(weights_of(blocks), expected)


def test_other_formats_are_not_read() -> None:
    assert read_blocks(np.zeros((2, 84), np.uint8), "Q2_K") is None


def model_file(folder: Path, kind: str = "Q4_1", head: str = "Q8_0") -> str:
    path = write_gguf(
        folder / f"{kind}.gguf",
        hidden=256,
        inner=512,
        kind=GGMLQuantizationType[kind],
        head_kind=GGMLQuantizationType[head],
    )
    return str(path)


def plain_twin(path: str, folder: Path) -> Any:  # noqa: ANN401
    """Return transformers' model in float32 with the weights that the file stands for."""
    twin: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    twin.eval()
    names = {
        **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"},
        **{"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"},
        **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        **{"output_norm": "model.norm", "token_embd": "lm_head"},  # tied
    }
    with torch.no_grad():
        for tensor in GGUFReader(path).tensors:
            _, *layer, name, _ = ["", *tensor.name.split(".")]
            place = twin.get_decoder().layers[int(layer[1])] if layer else twin
            weights = np.array(tensor.data)
            if (blocks := read_blocks(weights, tensor.tensor_type.name)) is not None:
                if name in ("attn_q", "attn_k"):
                    blocks = in_halves(blocks, int(twin.config.head_dim))
                weights = weights_of(blocks)
            place.get_submodule(names[name]).weight.copy_(torch.from_numpy(weights))
    return twin


def read(model: Any, ids: list[int]) -> Any:  # noqa: ANN401
    """Return a model's cache of some tokens."""
    cache = native_cache(model.config)
    forward(model, [ids], cache)
    return cache


def loaded(path: str, settings: Settings) -> LocalEngine:
    engine = LocalEngine.load(path, settings)
    engine.warm_up()
    return engine


def answer(engine: LocalEngine, ids: list[int], new: int = 24) -> tuple[str, GenerationDone]:
    steps = list(engine.generate(prompt_of(ids), max_new_tokens=new, stop=Event()))
    done = steps[-1]
    assert isinstance(done, GenerationDone)
    return "".join(step.text for step in steps if isinstance(step, TextPiece)), done


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_logits_are_those_of_the_files_weights_in_float32(
    tmp_path: Path, settings: Settings, kind: str
) -> None:
    path = model_file(tmp_path, kind)
    folder = fetch_model(path, settings)
    model = loaded(path, settings)._model
    cache = read(model, PROMPT)
    twin = plain_twin(path, folder)
    wide = native_cache(twin.config)
    for index, layer in enumerate(cache.layers):
        wide.update(layer.keys.float(), layer.values.float(), index)
    decoder = IntegerDecoder(model, cache)
    tokens = [9, 3, 30, 4, 41, 17]
    for token in tokens:
        expected = forward(twin, [[token]], wide)[0, -1].numpy()
        stored = forward(model, [[token]], cache)[0, -1].float().numpy()
        found = decoder.logits([token])[0]
        error, rounded = (np.abs(each - expected).max() for each in (found, stored))
        # Keys and values are kept in bfloat16; the weights in bfloat16 are further off.
        assert error < 1e-3 * np.abs(expected).max()
        assert error < rounded / 4
    assert decoder.held()[0] == len(PROMPT) + len(tokens)
    decoder.close()


def test_an_answer_is_that_of_a_token_a_pass_with_its_tokens_and_bytes(
    tmp_path: Path, settings: Settings
) -> None:
    path = model_file(tmp_path)
    fetch_model(path, settings)
    engine = loaded(path, settings)
    prompt = PROMPT + PROMPT[:12]  # so that there is something to draft
    text, done = answer(engine, prompt)
    assert done.decoding is not None
    assert done.decoding.way is DecodingWay.INTEGERS

    model = engine._model
    cache = read(model, prompt)
    ids = [int(forward(model, [prompt[-1:]], read(model, prompt[:-1]))[0, -1].argmax())]
    decoder = IntegerDecoder(model, cache)
    while len(ids) < done.new_tokens:
        ids += decoder.read(ids[-1:])
    stream = engine._tokenizer.stream()
    assert text == "".join(stream.push(each) for each in ids) + stream.flush()
    decoder.close()

    stored = loaded(path, settings.model_copy(update={"decode_weights": "stored"}))
    assert stored.model_id != engine.model_id
    _, plain = answer(stored, prompt)
    assert plain.decoding is not None
    assert plain.decoding.way is not DecodingWay.INTEGERS
    assert plain.kv_bytes
    assert plain.kv_tokens
    assert done.kv_tokens
    per_token = plain.kv_bytes / plain.kv_tokens
    assert done.kv_bytes == done.kv_tokens * per_token
    assert done.kv_tokens == len(prompt) + done.new_tokens - 1


def written(
    model: Any,  # noqa: ANN401
    ids: list[int],
    new: int,
    known: list[int] | None = None,
) -> tuple[list[int], int]:
    """Return the tokens after a prompt, and how many drafted ones were right.

    Args:
        model: of an engine.
        ids: the prompt.
        new: how many tokens.
        known: what drafts are taken from; none are made without it.
    """
    decoder = IntegerDecoder(model, read(model, ids))
    lookup = PromptLookup(decoder, known or [])
    found = [ids[-1]]
    for left in range(new, 0, -1):
        found += [lookup.next_id(found[-1], most=left)] if known else decoder.read(found[-1:])
    lookup.take_back()
    held, _ = decoder.held()
    decoder.close()
    assert held == len(ids) + new
    return found, lookup.accepted


@pytest.mark.parametrize("close", [0.0, integer_decoder._CLOSE, 1e9])
def test_drafts_leave_the_text_as_it_is(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, close: float
) -> None:
    """Also where every choice is held to be close, and made again by a pass of one."""
    monkeypatch.setattr(integer_decoder, "_CLOSE", close)
    path = model_file(tmp_path)
    fetch_model(path, settings)
    model = loaded(path, settings)._model
    plain, _ = written(model, PROMPT, 32)
    wrong = [*plain[:20], 3, *plain[21:]]
    for known in (plain, wrong):
        drafted, accepted = written(model, PROMPT, 32, known)
        assert drafted == plain
        assert (accepted > 5) == (close < 1)


def test_what_was_taken_back_is_not_seen(tmp_path: Path, settings: Settings) -> None:
    path = model_file(tmp_path)
    fetch_model(path, settings)
    model = loaded(path, settings)._model
    cache = read(model, PROMPT)
    clean = IntegerDecoder(model, cache)
    expected = clean.logits([7]).copy()
    clean.close()
    decoder = IntegerDecoder(model, cache)
    decoder.logits([8, 9, 10])
    decoder.crop(3)
    assert decoder.held()[0] == len(PROMPT)
    np.testing.assert_allclose(decoder.logits([7]), expected, rtol=1e-3, atol=1e-4)
    decoder.crop(0)
    assert decoder.held()[0] == len(PROMPT) + 1
    decoder.close()


def test_a_cache_that_others_use_is_not_changed(tmp_path: Path, settings: Settings) -> None:
    path = model_file(tmp_path)
    fetch_model(path, settings)
    model = loaded(path, settings)._model
    cache = read(model, PROMPT)
    kept: Any = branch(cache, 1)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in kept.layers]
    decoder = IntegerDecoder(model, cache)
    decoder.read([7])
    decoder.close()
    for layer, (keys, values) in zip(kept.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_a_kept_document_answers_as_one_that_is_read_anew(
    tmp_path: Path, settings: Settings
) -> None:
    path = model_file(tmp_path)
    fetch_model(path, settings)
    kept = DocumentKV(tmp_path / "kv", memory_bytes=2**24, disk_bytes=0)
    engine = LocalEngine.load(path, settings, document_kv=kept)
    prefix = DocumentPrefix(20, ("1:1:a",))
    found = []
    for asked in ([7, 8], [9], [7, 8]):
        steps = engine.generate(
            prompt_of([*PROMPT[:20], *asked]), max_new_tokens=20, stop=Event(), prefix=prefix
        )
        *texts, done = steps
        assert isinstance(done, GenerationDone)
        assert done.decoding is not None
        assert done.decoding.way is DecodingWay.INTEGERS
        found.append((done.reused_tokens, [step for step in texts if isinstance(step, TextPiece)]))
    assert [reused for reused, _ in found] == [0, 20, 20]
    assert found[0][1] == found[2][1] != found[1][1]


def test_two_answers_in_turn_know_nothing_of_each_other(tmp_path: Path, settings: Settings) -> None:
    path = model_file(tmp_path)
    fetch_model(path, settings)
    engine = loaded(path, settings)
    first = answer(engine, PROMPT)[0]
    other = answer(engine, [40, 3, 28, 11, 9])[0]
    assert answer(engine, PROMPT)[0] == first != other


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_is_found_before_it_writes(
    tmp_path: Path, settings: Settings, place: str
) -> None:
    path = model_file(tmp_path)
    file = fetch_model(path, settings) / FILE_NAME
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") if place == "first" else -1] ^= 1
    file.write_bytes(content)
    engine = LocalEngine.load(path, settings)
    for _ in range(2):  # it is no better the second time
        with pytest.raises(BrokenModelError, match=rf"{FILE_NAME} is damaged.*SHA-256") as caught:
            list(engine.generate(prompt_of([5, 6, 7]), max_new_tokens=30, stop=Event()))
        assert "FATHOM_DECODE_WEIGHTS=stored" in str(caught.value.hint)


def test_where_there_is_no_memory_for_a_copy_the_stored_weights_write(
    tmp_path: Path, settings: Settings
) -> None:
    path = model_file(tmp_path)
    fetch_model(path, settings)
    model = loaded(path, settings)._model
    enough = 4 * measured_kv_bytes(read(model, PROMPT))  # float32, and as much room again
    for free_bytes, copied in ((enough - 1, False), (enough, True)):
        cache = read(model, PROMPT)
        with closing(
            AnswerPasses(model, cache, max_new_tokens=30, free_bytes=free_bytes)
        ) as passes:
            tokens, num_bytes = passes.held()
            passes.read([7])
            assert passes.has_integers is copied
            assert bool(passes.refused) is not copied
            assert passes.held() == (tokens + 1, num_bytes // tokens * (tokens + 1))


def test_where_it_cannot_be_compiled_the_stored_weights_write(
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,  # noqa: ANN401
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(integer_decoder, "StepGraph", refuse)
    path = model_file(tmp_path)
    fetch_model(path, settings)
    _, done = answer(LocalEngine.load(path, settings), PROMPT)
    assert done.decoding is not None
    assert done.decoding.way is not DecodingWay.INTEGERS
    assert "no such operation" in caplog.text


def test_a_matrix_in_another_format_leaves_the_stored_weights(
    tmp_path: Path, settings: Settings
) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf", hidden=256, inner=512))
    folder = fetch_model(path, settings)
    assert integers_file(folder) is None
    _, done = answer(LocalEngine.load(path, settings), PROMPT)
    assert done.decoding is not None
    assert done.decoding.way is not DecodingWay.INTEGERS


def test_a_file_with_other_weights_leaves_the_stored_ones(
    tmp_path: Path, settings: Settings
) -> None:
    """What the graph would not compute is not left out: an answer would be another model's."""
    source = GGUFReader(model_file(tmp_path))
    path = tmp_path / "biased.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.0.attn_output.bias", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = load_config(fetch_model(model_file(tmp_path), settings))
    (tmp_path / "out").mkdir()
    assert write_integers(path, tmp_path / "out", config) == 0
    assert write_integers(tmp_path / "Q4_1.gguf", tmp_path / "out", config) > 0


def test_a_group_of_one_weight_has_no_scale_and_is_kept(tmp_path: Path, settings: Settings) -> None:
    """A block that holds one number 32 times is a scale of zero, and an offset."""
    path = model_file(tmp_path)
    reader = GGUFReader(path, "r+")
    (tensor,) = (each for each in reader.tensors if each.name == "blk.0.attn_output.weight")
    flat = gguf.quantize(np.full((1, 32), 0.25, np.float32), GGMLQuantizationType.Q4_1)
    tensor.data[3, 20:40] = flat[0]
    tensor.data[3, 24:40] = 0xFF  # numbers that a scale of zero makes nothing of
    reader.data.flush()
    folder = fetch_model(path, settings)
    file = integers_file(folder)
    assert file is not None
    (matrix,) = load_integers(file).layers[0].parts["out"]
    assert matrix.middles is not None
    pairs = matrix.numbers[3, 16:32]
    numbers = np.stack([pairs & 15, pairs >> 4], axis=-1).ravel().astype(np.float32)
    found = matrix.scales[3, 1] * (numbers - matrix.middles[3, 1])
    np.testing.assert_array_equal(found, np.full(32, 0.25, np.float32))
    assert set(PARTS) == set(load_integers(file).layers[0].parts)


@pytest.mark.parametrize("ask", ["Repeat the two sentences above, word for word.", "What is told?"])
def test_a_fetched_model_writes_the_same_with_drafts_and_without(ask: str) -> None:
    settings = Settings()
    if integers_file(resolve_model("smollm2-135m", settings)) is None:
        pytest.skip("the model was converted by an older version")
    engine = LocalEngine.load("smollm2-135m", settings)
    passage = (
        "The lighthouse of Tarn Head was built in 1871 by Ewan Rae, who kept it for thirty years."
        " It stands 41 metres above the sea and its lamp can be seen for 19 miles on a clear night."
    )
    prompt = engine.encode_chat([Message("user", f"{passage}\n\n{ask}")])
    text, done = answer(engine, list(prompt.ids), 48)
    assert done.decoding is not None
    assert done.decoding.way is DecodingWay.INTEGERS
    if ask.startswith("Repeat"):
        assert done.decoding.accepted > 10

    model = engine._model
    cache = native_cache(model.config)
    ids = [int(forward(model, [list(prompt.ids)], cache)[0, -1].argmax())]
    decoder = IntegerDecoder(model, cache)
    while len(ids) < done.new_tokens:
        ids += decoder.read(ids[-1:])
    decoder.close()
    stream = engine._tokenizer.stream()
    ends = engine._tokenizer.end_ids(model)
    shown = [stream.push(each) for each in ids if each not in ends]
    assert text == "".join(shown) + stream.flush()


@pytest.mark.parametrize("head", ["Q4_1", "Q8_0"])
def test_a_token_enters_as_the_file_has_it(tmp_path: Path, settings: Settings, head: str) -> None:
    path = model_file(tmp_path, head=head)
    file = integers_file(fetch_model(path, settings))
    assert file is not None
    (tensor,) = (each for each in GGUFReader(path).tensors if each.name == "token_embd.weight")
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)[[7, 3]]
    # `scale * (number - middle)` is `scale * number + offset` up to a float32 rounding.
    np.testing.assert_allclose(
        load_integers(file).embeddings.rows([7, 3]), expected, rtol=0, atol=1e-6
    )
