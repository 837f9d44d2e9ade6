"""The benches of the language model, on tiny models: what they count, compare and print."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers import AttentionInterface
from typer.testing import CliRunner

from conftest import make_tiny_tokenizer
from eval.bench import decode, document_kv, generation_peers, prefill, threads, windowed
from eval.bench.decode_quality import decode_quality, describe_quality, load_exact
from eval.bench.decode_ways import decode_with
from eval.bench.machine import this_machine
from eval.bench.reading_quality import reading_quality
from eval.evidence_sets import EvidenceDocument, EvidenceQuestion, EvidenceSet
from rag.errors import SettingsError
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.grouped_attention import grouped_attention, use_grouped_attention
from rag.lm.integer_weights import FILE_NAME
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.lean_forward import lean_pass, use_lean_forward
from rag.lm.prefill_cost import prefill_work
from rag.lm.spec import ModelSpec
from rag.lm.window_kernels import WindowPlan
from rag.lm.windowed_attention import check_windowed
from test_auto_and_gguf import write_gguf
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


def test_peers_are_measured_beside_ours_or_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eval.bench.llama_cpp.is_installed", lambda: False)
    bench = generation_peers.bench_generation(
        tiny_model("llama"),
        tiny_model("llama"),
        [16, 40],
        name="tiny",
        gguf=None,
        new_tokens=2,
        rounds=2,
    )
    for row in bench.rows:
        names = ["fathom", "fathom, drafts", "transformers"]
        lacking = ["fathom, integers", "fathom, integers, drafts", "llama.cpp"]
        assert [way.name for way in row.ways] == names + lacking
        ours, _, plain, *_, missing = row.ways
        assert ours.prefill_ratio == ours.token_ratio == 1.0
        assert plain.prefill_ratio is not None
        assert plain.prefill_ratio > 0
        assert missing.token_seconds is None
        assert missing.note == "not installed"
        assert row.same_text is None
    assert "not installed" in generation_peers.card(bench)
    json.dumps(bench.to_json())


def test_an_answer_that_copies_is_measured_with_drafts_and_without() -> None:
    model = tiny_model("llama")
    use_grouped_attention(model)
    assert use_lean_forward(model)
    bench = generation_peers.bench_generation(
        model,
        tiny_model("llama"),
        [16],
        name="tiny",
        gguf=None,
        new_tokens=8,
        rounds=1,
        copied=lambda number: [5, 6, 7, 8, 9, 10] * 4,
    )
    made_up, copied = bench.rows
    assert (made_up.num_tokens, made_up.same_text) == (16, None)
    assert (copied.num_tokens, copied.same_text) == (24, True)
    assert {way.name: way.token_ratio for way in made_up.ways}["fathom"] == 1.0
    assert {way.name: way.token_ratio for way in copied.ways}["fathom, drafts"] == 1.0
    assert "with drafts the same text as without" in generation_peers.card(bench)
    json.dumps(bench.to_json())


def test_peers_of_kept_documents_and_windows(tmp_path: Path) -> None:
    kept = document_kv.bench_document_kv(
        tiny_model("llama"),
        make_tiny_tokenizer(),
        tmp_path,
        name="tiny",
        document_tokens=600,
        question_tokens=9,
        rounds=1,
        peer=tiny_model("llama"),
    )
    assert kept.peer is not None
    expected = 10 * kept.peer.seconds / (kept.fresh.seconds + 9 * kept.memory.seconds)
    assert kept.ten_questions == expected
    assert "ten questions" in document_kv.card(kept)
    through = windowed.bench_windowed(
        check_windowed(tiny_model("llama")),
        WindowPlan(num_sinks=4, window=64),
        [1200],
        clock="cpu",
        peer=tiny_model("llama"),
    )
    assert through.full == "transformers"
    assert through.rows[0].full.kv_bytes == kv_cache_bytes(spec_of(tiny_model("llama")), 1200)
    assert through.rows[0].windowed.kv_bytes < through.rows[0].full.kv_bytes


def test_threads_are_compared_under_a_load_that_ends_with_the_bench() -> None:
    model = tiny_model("llama")
    before = torch.get_num_threads()
    bench = threads.bench_threads(
        model, spec_of(model), name="tiny", busy=1, prompt_tokens=16, new_tokens=2, rounds=2
    )
    assert torch.get_num_threads() == before
    assert [row.work for row in bench.rows] == ["16 tokens read", "2 tokens written"]
    assert all(row.ratio.wall > 0 for row in bench.rows)
    assert "2 threads" in threads.card(bench)
    json.dumps(bench.to_json())
    with threads.busy_processes(2) as ids:
        assert len(ids) == 2
        assert all(psutil.pid_exists(number) for number in ids)
    assert not any(psutil.pid_exists(number) for number in ids)


def cat_questions() -> EvidenceSet:
    return EvidenceSet(
        "tiny",
        (EvidenceDocument("d", "t", "A cat sat here. " * 20),),
        tuple(
            EvidenceQuestion(str(n), f"who sat {n}?", "d", ((16 * n, 16 * n + 5),), ("cat",))
            for n in range(4)
        ),
        long_spans=False,
    )


def test_what_other_weights_do_to_answers_is_told() -> None:
    model = tiny_model("llama")
    use_grouped_attention(model)
    assert use_lean_forward(model)
    lean = lean_pass(model)
    assert lean is not None
    lean.most_few_rows = 4
    other = tiny_model("llama", hidden_act="relu").get_decoder().layers[0].mlp.act_fn
    lean.few_layers = [replace(layer, act=other) for layer in lean.layers]
    quality = decode_quality(
        model,
        tiny_model("llama"),
        ChatTokenizer(make_tiny_tokenizer()),
        cat_questions(),
        num_questions=4,
        max_new_tokens=8,
    )
    assert quality.num_questions == 4
    assert 4 <= quality.num_tokens <= 4 * 7
    same, changed = quality.ways
    assert (same.way, same.same.mean, same.same_token) == ("stored", 1.0, 1.0)
    assert same.kl == pytest.approx(0, abs=1e-9)
    assert same.gold == quality.gold
    assert same.difference.mean == 0
    assert changed.way == "4-bit"
    assert changed.kl > 1e-6
    head, *lines = describe_quality(quality)
    assert "4 answers beside those of the file's weights" in head
    assert "100.0% [" in lines[0]
    assert lines[1].startswith("       4-bit: ")
    assert lean.most_few_rows == 4


def test_what_reading_does_to_answers_is_told() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    use_grouped_attention(model)
    own_attention = model.config._attn_implementation
    tokenizer, questions = ChatTokenizer(make_tiny_tokenizer()), cat_questions()
    quality = reading_quality(model, plain, tokenizer, questions, num_questions=4, max_new_tokens=8)
    for way in quality.ways:
        assert (way.same.mean, way.same_token, way.difference.mean) == (1.0, 1.0, 0.0)
        assert way.kl == pytest.approx(0, abs=1e-9)
    assert [way.way for way in quality.ways] == ["fathom", "transformers"]
    assert model.config._attn_implementation == own_attention

    # Attention of ours that sees too little is told of ours alone.
    def blind(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        out, weights = grouped_attention(*args, **kwargs)
        return out * 0.5, weights

    AttentionInterface.register(own_attention, blind)
    try:
        ours, theirs = reading_quality(
            model, plain, tokenizer, questions, num_questions=4, max_new_tokens=8
        ).ways
    finally:
        AttentionInterface.register(own_attention, grouped_attention)
    assert ours.kl > 1e-6 > abs(theirs.kl)
    with pytest.raises(SettingsError, match="not those of the GGUF file"):
        reading_quality(tiny_model("llama", vocab_size=300), plain, tokenizer, questions)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is an extra")
def test_whole_numbers_answer_as_the_files_weights_do_in_float32(tmp_path: Path) -> None:
    model, path = model_of_a_file(tmp_path)
    plain = load_exact(path)
    for tensor in GGUFReader(path).tensors:
        if tensor.name.endswith(("ffn_down.weight", "attn_v.weight")):
            layer = plain.get_decoder().layers[int(tensor.name.split(".")[1])]
            is_down = "ffn_down" in tensor.name
            own = (layer.mlp.down_proj if is_down else layer.self_attn.v_proj).weight
            expected = dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(own, torch.from_numpy(expected))
    questions = cat_questions()
    tokenizer = ChatTokenizer(make_tiny_tokenizer())
    quality = decode_quality(model, plain, tokenizer, questions, num_questions=4, max_new_tokens=12)
    ways = {way.way: way for way in quality.ways}
    assert ways["integers"].same.mean == ways["integers"].same_token == 1.0
    assert 0 <= ways["integers"].kl < ways["stored"].kl / 1000
    json.dumps(quality.to_json())
    with pytest.raises(SettingsError, match="not those of the GGUF file"):
        decode_quality(tiny_model("llama"), plain, tokenizer, questions)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is an extra")
def test_whole_numbers_are_measured_beside_the_stored_weights(tmp_path: Path) -> None:
    model, path = model_of_a_file(tmp_path)
    bench = generation_peers.bench_generation(
        model,
        load_exact(path),
        [16],
        name="tiny",
        gguf=None,
        new_tokens=16,
        rounds=1,
        copied=lambda number: [5, 6, 7, 8, 9, 10] * 4,
    )
    made_up, copied = bench.rows
    assert copied.same_text
    assert {way.name: way.token_ratio for way in made_up.ways}["fathom, integers"] == 1.0
    assert {way.name: way.token_ratio for way in copied.ways}["fathom, integers, drafts"] == 1.0
    spec = spec_of(model)
    own = (tmp_path / FILE_NAME).stat().st_size
    decoded = decode.bench_decode(
        model,
        spec,
        [16, 900],
        name="tiny",
        integers_bytes=own,
        rounds=1,
        copied_bytes=2**20,
    )
    assert [(row.context_tokens, row.weights) for row in decoded.rows] == [
        (context, weights) for context in (16, 900) for weights in ("stored", "integers")
    ]
    for stored, integers in zip(decoded.rows[::2], decoded.rows[1::2], strict=True):
        assert integers.bytes_per_token == own + kv_cache_bytes(spec, stored.context_tokens)
        assert integers.bytes_per_token < stored.bytes_per_token
    assert " integers " in decode.card(decoded)


def test_rows_say_what_whole_numbers_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def note() -> str:
        bench = generation_peers.bench_generation(
            tiny_model("llama"), tiny_model("llama"), [16], name="t", gguf=None, rounds=1
        )
        return {way.name: way.note for way in bench.rows[0].ways}["fathom, integers"]

    monkeypatch.setattr("eval.bench.generation_peers.can_compile", lambda: True)
    assert note() == "needs --gguf FILE"
    monkeypatch.setattr("eval.bench.generation_peers.can_compile", lambda: False)
    assert note() == "not installed"


def model_of_a_file(folder: Path) -> tuple[Any, Path]:
    """Return a tiny model in bfloat16 that decodes with the GGUF file that it comes from."""
    kind = GGMLQuantizationType.Q4_1
    path = write_gguf(
        folder / "tiny.gguf",
        hidden=256,
        inner=512,
        kind=kind,
        head_kind=GGMLQuantizationType.Q8_0,
    )
    model = load_exact(path).bfloat16()
    use_grouped_attention(model)
    assert use_lean_forward(model)
    decode_with(model, model.config, path, folder)
    return model, path


def test_the_machine_is_named() -> None:
    import torch

    machine = this_machine(torch.device("cpu"))
    assert machine.versions["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in machine.describe()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prefill", "--tokens", "600"], "multiples of 512"),
        (["prefill", "--clock", "moon"], "'moon' is not one of 'wall'"),
        (["decode", "--clock", "moon"], "'moon' is not one of 'wall'"),
        (["decode", "--data", "."], "its weights are the measure"),
        (["document-kv", "--clock", "moon"], "'moon' is not one of 'wall'"),
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
