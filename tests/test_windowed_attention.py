"""Windows fitted to RoPE models, against dense references; and native windows that hold no more."""

import copy
import json
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)

from eval.bench.windowed import bench_windowed, card, peak_allocated_bytes
from rag.errors import FathomError, UnsupportedModelError
from rag.lm.catalog import resolve_model
from rag.lm.kv_bytes import held_kv_bytes, kv_cache_bytes, measured_kv_bytes, room_bytes
from rag.lm.native_cache import native_cache
from rag.lm.spec import ModelSpec
from rag.lm.window_kernels import WindowPlan, WindowStep, attend_flex, attend_sdpa, visible_keys
from rag.lm.windowed_attention import WINDOWED_FAMILIES, WindowedSession, check_windowed
from rag.settings import load_settings

NUM_TOKENS = 110
# A few sinks; none; more than the window and than a chunk, as a question is.
PLANS = [WindowPlan(4, 24), WindowPlan(0, 24), WindowPlan(45, 9)]
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OWN: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {"head_dim": 24, **EXPERTS},
    "starcoder2": {"sliding_window": None},
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in sorted(WINDOWED_FAMILIES)] + [
    ("llama", {"rope_parameters": rope}) for rope in (YARN, LINEAR, LLAMA3)
]


def tiny_model(family: str, **changes: Any) -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**TINY, **OWN.get(family, {}), **changes})
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # large enough for attention to be far from uniform
                weight.normal_(0, 0.15)
    return model.float().eval()


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(3, 256, (num_tokens,), generator=generator)]


def read_in_pieces(session: WindowedSession, ids: list[int], chunk: int, decoded: int) -> Tensor:
    """Return the logits after every token: chunks, then `decoded` tokens one by one."""
    prefilled = len(ids) - decoded
    pieces = [ids[start : min(start + chunk, prefilled)] for start in range(0, prefilled, chunk)]
    return torch.cat(
        [session.logits(piece) for piece in [*pieces, *([i] for i in ids[prefilled:])]]
    )


def dense_mask(plan: WindowPlan, num_tokens: int) -> Tensor:
    i, j = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    return (j <= i) & ((j > i - plan.window) | (j < plan.num_sinks))


def dense_logits(model: Any, ids: list[int], mask: Tensor) -> Tensor:  # noqa: ANN401
    """The model's own attention under a dense mask: true distances."""
    with torch.inference_mode():
        logits: Tensor = model(
            input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False
        ).logits[0]
    return logits


def streaming_logits(
    model: Any,  # noqa: ANN401
    ids: list[int],
    plan: WindowPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    """StreamingLLM spelt out: unrotated queries and keys, each pair at its position in the cache.

    The modelling code's rotation is switched off; every query is turned twice here, once for the
    window and once for the sinks, and one dense matrix of scores holds both.
    """
    num_tokens = len(ids)
    code = sys.modules[type(model).__module__]
    rotate, rotary = code.apply_rotary_pos_emb, model.get_decoder().rotary_emb
    mask = dense_mask(plan, num_tokens)
    true = torch.arange(num_tokens)[None]
    in_cache = true.clamp(max=plan.num_sinks + plan.window - 1)

    def attention(
        module: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, None]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))

        def turned(states: Tensor, positions: Tensor) -> Tensor:
            if not getattr(module, "use_rope", True):
                return states
            cos, sin = rotary(states, positions)
            width = cos.shape[-1]
            part = states[..., :width]
            return torch.cat([rotate(part, part, cos, sin)[0], states[..., width:]], -1)

        at_window = turned(query, true) @ turned(key, true).mT
        at_sinks = turned(query, in_cache) @ turned(key, true).mT
        is_sink = torch.arange(num_tokens) < plan.num_sinks
        scores = torch.where(is_sink, at_sinks, at_window) * scaling
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_streaming", attention)
    with monkeypatch.context() as patch:
        # Partial rotary hands only the part that turns to this function and joins the rest.
        patch.setattr(code, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
        model.set_attn_implementation("test_streaming")
        logits = dense_logits(model, ids, mask)
        model.set_attn_implementation("sdpa")
    return logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_seventeen_families_and_more_are_allowed() -> None:
    assert len(WINDOWED_FAMILIES) >= 17


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_chunks_equal_the_dense_streaming_reference(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(family, **changes), random_ids(NUM_TOKENS)
    checked = check_windowed(model)
    for plan in PLANS:
        expected = streaming_logits(model, ids, plan, monkeypatch)
        for chunk in (NUM_TOKENS, 37, 8):
            found = read_in_pieces(WindowedSession(checked, plan), ids, chunk, decoded=20)
            assert relative_error(found, expected) < 1e-4, (plan, chunk)
    # The window is no small change, and neither is the distance of the sinks.
    true_distances = dense_logits(model, ids, dense_mask(PLANS[2], NUM_TOKENS))
    assert relative_error(expected, true_distances) > 1e-3
    assert (
        relative_error(
            expected, dense_logits(model, ids, dense_mask(WindowPlan(0, 999), NUM_TOKENS))
        )
        > 1e-3
    )


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_true_distances_equal_the_models_own_attention_under_a_dense_mask(
    family: str, changes: dict[str, Any]
) -> None:
    model, ids = tiny_model(family, **changes), random_ids(NUM_TOKENS)
    checked = check_windowed(model)
    for sinks, window in [(4, 24), (45, 9)]:
        plan = WindowPlan(sinks, window, caps_sink_distance=False)
        found = read_in_pieces(WindowedSession(checked, plan), ids, 37, decoded=20)
        expected = dense_logits(model, ids, dense_mask(plan, NUM_TOKENS))
        assert relative_error(found, expected) < 1e-4


def test_half_precision_is_accepted_and_stays_close() -> None:
    model, ids = tiny_model("llama"), random_ids(NUM_TOKENS)
    exact = WindowedSession(check_windowed(model), PLANS[2]).read(ids)
    half = WindowedSession(check_windowed(model.to(torch.bfloat16)), PLANS[2]).read(ids)
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), exact) < 0.06


def test_layers_without_rotation_are_found() -> None:
    assert check_windowed(tiny_model("smollm3")).turning_layers == {0, 1, 2}


def test_a_window_that_holds_everything_changes_nothing() -> None:
    model, ids = tiny_model("llama"), random_ids(NUM_TOKENS)
    session = WindowedSession(check_windowed(model), WindowPlan(4, NUM_TOKENS))
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    assert relative_error(read_in_pieces(session, ids, 37, decoded=5), expected) < 1e-5


def test_a_long_text_looks_to_one_layer_like_its_sinks_and_its_end() -> None:
    """No distance grows: far beyond the trained range the logits are those of a short text."""
    model, plan = tiny_model("llama", num_hidden_layers=1), WindowPlan(5, 16)
    checked, ids = check_windowed(model), random_ids(3000)
    assert len(ids) > 5 * model.config.max_position_embeddings
    far = WindowedSession(checked, plan).read(ids)
    near = WindowedSession(checked, plan).read(ids[:5] + ids[-16:])
    assert relative_error(far, near) < 1e-4
    true = WindowedSession(checked, WindowPlan(5, 16, caps_sink_distance=False)).read(ids)
    assert relative_error(true, near) > 1e-2


def test_scan_reads_the_question_once_slides_and_asks_at_every_stride() -> None:
    """The usage block of the module, with everything a branch and the session may get wrong."""
    checked = check_windowed(tiny_model("qwen2"))
    question, document, cue = random_ids(30, 1), random_ids(400, 2), random_ids(7, 3)
    plan = WindowPlan(num_sinks=len(question), window=64)
    session = WindowedSession(checked, plan)
    session.read(question)
    read = list(question)
    findings = []
    for start in range(0, len(document), 100):
        session.read(document[start : start + 100])
        read += document[start : start + 100]
        branch = session.fork()
        logits = branch.read(cue)
        answer: list[int] = []
        while (token := int(logits.argmax())) != 2 and len(answer) < 10:
            answer.append(token)
            logits = branch.read([token])
        fresh = WindowedSession(checked, plan)
        fresh.read(read)
        fresh.read(cue)
        expected = fresh.read(answer) if answer else fresh.read([])
        assert relative_error(logits, expected) < 1e-4
        assert session.num_read == len(read)
        assert branch.num_read == len(read) + len(cue) + len(answer)
        findings.append(answer)
    assert len({tuple(answer) for answer in findings}) > 1  # what was just read matters
    straight = WindowedSession(checked, plan)
    straight.read(question)
    assert relative_error(session.read(cue), straight.read(document + cue)) < 1e-4


def test_a_fork_costs_nothing_until_it_reads() -> None:
    session = WindowedSession(check_windowed(tiny_model("llama")), WindowPlan(8, 64))
    session.read(random_ids(200))
    branch = session.fork()
    layers: Any = zip(session._cache.layers, branch._cache.layers, strict=True)
    assert all(mine.keys is theirs.keys for mine, theirs in layers)


def test_the_caches_bytes_are_predicted_held_and_constant() -> None:
    model, plan = tiny_model("llama"), WindowPlan(8, 64)
    spec = ModelSpec.from_config(model.config, dtype_bytes=4)
    session = WindowedSession(check_windowed(model), plan)
    sizes = []
    for length in (5, 60, 6, 1, 500, 1, 1000):
        session.read(random_ids(length))
        expected = kv_cache_bytes(spec, plan.kept_tokens(session.num_read))
        assert session.kv_bytes == held_kv_bytes(session._cache) == expected
        sizes.append(expected)
    assert sizes[-1] == sizes[2] > sizes[0]


def test_memory_of_a_4096_token_prefill_is_that_of_1024() -> None:
    checked = check_windowed(tiny_model("llama"))
    peaks, cached = {}, {}
    for num_tokens in (256, 1024, 4096):
        session = WindowedSession(checked, WindowPlan(16, 128))
        read = partial(session.read, random_ids(num_tokens))
        peaks[num_tokens] = peak_allocated_bytes(read, "cpu")
        cached[num_tokens] = session.kv_bytes
    assert cached[256] == cached[1024] == cached[4096]
    assert peaks[4096] == pytest.approx(peaks[1024], rel=0.01)
    # The same measure does see a cache that grows.
    full = {}
    for num_tokens in (1024, 4096):
        session = WindowedSession(checked, WindowPlan(0, num_tokens))
        read = partial(session.read, random_ids(num_tokens))
        full[num_tokens] = peak_allocated_bytes(read, "cpu")
    assert full[4096] > 2 * full[1024]
    assert full[1024] > peaks[1024]


def test_the_bench_reports_both_sides_of_the_same_run() -> None:
    model, plan = tiny_model("llama"), WindowPlan(16, 128)
    bench = bench_windowed(check_windowed(model), plan, [256, 2048], rounds=2)
    spec = ModelSpec.from_config(model.config, dtype_bytes=4)
    for row in bench.rows:
        assert row.full.kv_bytes == kv_cache_bytes(spec, row.num_tokens)
        assert row.windowed.kv_bytes == kv_cache_bytes(spec, plan.kept_tokens(row.num_tokens))
        assert row.peak_ratio == row.full.peak_bytes / row.windowed.peak_bytes
        assert row.full.tokens_per_second == row.num_tokens / row.full.seconds
    assert bench.rows[1].peak_ratio > 1.5
    assert bench.rows[1].windowed.peak_bytes < 1.05 * bench.rows[0].windowed.peak_bytes
    line = json.loads(json.dumps(bench.to_json()))
    assert line["bench"] == "windowed"
    assert line["rows"][1]["speed_ratio"] == bench.rows[1].speed_ratio
    assert "2,048" in card(bench)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grouped", [1, 3])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_flex_attention_agrees_with_its_plain_twin(
    num_queries: int, with_sinks: bool, grouped: int
) -> None:
    query, key, value, step, scores = attention_case(num_queries, with_sinks, grouped)
    plain = attend_sdpa(query, key, value, step, scores, 0.3)
    flex = attend_flex(query, key, value, step, scores, 0.3)
    torch.testing.assert_close(flex, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_queries", [3, 33, 90])
def test_flex_attention_reads_the_sinks_themselves(num_queries: int) -> None:
    """The first chunk: its first queries see sinks alone, each no further than to itself."""
    case = attention_case(num_queries, False, 3, held=0)
    torch.testing.assert_close(
        attend_flex(*case, 0.3), attend_sdpa(*case, 0.3), rtol=1e-4, atol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("num_queries", [33, 512])
def test_compiled_flex_attention_agrees_with_its_plain_twin(
    num_queries: int, with_sinks: bool
) -> None:
    case = attention_case(num_queries, with_sinks, 3, device="cuda")
    plain, flex = attend_sdpa(*case, 0.3), attend_flex(*case, 0.3)
    torch.testing.assert_close(flex, plain, rtol=2e-3, atol=2e-3)


def attention_case(
    num_queries: int, with_sinks: bool, grouped: int, device: str = "cpu", held: int = 36
) -> tuple[Tensor, Tensor, Tensor, WindowStep, Tensor | None]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    plan, num_keys = WindowPlan(5, 32), held + num_queries
    step = WindowStep(
        num_sinks=min(5, num_keys),
        window=32,
        mask=visible_keys(plan, num_queries, num_keys, torch.device(device)),
        turn=None,
        turning_layers=frozenset(),
        attend=attend_sdpa,
    )
    key, value = random(2, 2, num_keys, 16), random(2, 2, num_keys, 16)
    scores = random(2, 2 * grouped, num_queries, 5) if with_sinks else None
    return random(2, 2 * grouped, num_queries, 16), key, value, step, scores


# How each family that a window cannot be fitted to is refused.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({}, "learned table"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 64}, "learned table"),
    "bloom": ({}, "ALiBi"),
    "mpt": ({}, "ALiBi"),
    "deepseek_v3": ({}, "MLA"),
    "qwen3_next": ({}, "hybrid"),
    "mamba": ({}, "hybrid"),
    "falcon_h1": ({}, "hybrid"),
    "gemma3_text": ({}, "windows of its own"),
    "gpt_oss": ({}, "windows of its own"),
    "llama4_text": ({}, "windows of its own"),
    "falcon": ({}, "not among the verified families"),
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_is_not_exact_is_refused_with_its_reason(family: str) -> None:
    changes, reason = REFUSED[family]
    with torch.device("meta"):  # refused by the config, before anything is computed
        config = CONFIG_MAPPING[family](**{**({} if family == "mamba" else TINY), **changes})
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        check_windowed(model)
    assert family in raised.value.message
    assert "llama" in raised.value.hint


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_ropes_that_change_with_the_length_are_refused(kind: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **factors}
    rope |= {"original_max_position_embeddings": 128}
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*stale"):
        check_windowed(tiny_model("llama", rope_parameters=rope))


def test_the_self_test_finds_positions_that_do_not_turn() -> None:
    model = tiny_model("llama")
    table = torch.randn(512, 64) * 0.3

    def add_positions(layer: Any, inputs: Any, named: Any) -> Any:  # noqa: ANN401
        return (inputs[0] + table[named["position_ids"]], *inputs[1:]), named

    model.model.layers[2].register_forward_pre_hook(add_positions, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="layer 2 does not turn"):
        check_windowed(model)


def test_the_self_test_finds_rotations_other_than_the_models_own() -> None:
    model = tiny_model("llama")
    other = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 50.0})

    def other_turn(layer: Any, inputs: Any, named: Any) -> Any:  # noqa: ANN401
        turn = other.model.rotary_emb(inputs[0], named["position_ids"])
        return inputs, {**named, "position_embeddings": turn}

    model.model.layers[1].register_forward_pre_hook(other_turn, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="layer 1 does not turn"):
        check_windowed(model)


def test_the_self_test_finds_scores_that_are_not_plain() -> None:
    """Attention of the model's own that does more than scores and a mask."""
    model = tiny_model("llama")
    sdpa: Any = AttentionInterface._global_mapping["sdpa"]

    def louder(module: Any, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> Any:  # noqa: ANN401
        return sdpa(module, query, key, 2 * value, mask, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", louder)
        with pytest.raises(UnsupportedModelError, match="differ from a dense mask's"):
            check_windowed(model)
    check_windowed(model)


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError):
        check_windowed(model)


def test_a_session_leaves_its_model_and_all_others_as_they_were() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    ids = random_ids(50)
    before = dense_logits(model, ids, dense_mask(WindowPlan(0, 99), 50))
    session = WindowedSession(check_windowed(model), WindowPlan(2, 8))
    beside: list[str] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda *_: beside.append(other.config._attn_implementation)
    )
    session.read(ids)
    hook.remove()
    assert set(beside) == {"sdpa"}
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(dense_logits(model, ids, dense_mask(WindowPlan(0, 99), 50)), before)

    def fail(*_: Any) -> None:  # noqa: ANN401
        raise MemoryError

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        session.read(ids)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_in_use_by_a_session_does_not_answer_wrongly_to_others() -> None:
    model = tiny_model("llama")
    session = WindowedSession(check_windowed(model), WindowPlan(2, 8))
    inside = False

    def intrude(*_: Any) -> None:  # noqa: ANN401
        nonlocal inside
        if not inside:
            inside = True
            model(input_ids=torch.tensor([random_ids(20)]))

    model.model.layers[0].register_forward_hook(intrude)
    with pytest.raises(RuntimeError, match="in use by a windowed session"):
        session.read(random_ids(20))


@pytest.mark.parametrize(("sinks", "window"), [(-1, 8), (4, 0), (0, -3)])
def test_a_plan_that_makes_no_sense_is_refused(sinks: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"num_sinks is {sinks} and window {window}"):
        WindowPlan(sinks, window)


def test_what_left_the_window_cannot_be_cropped_back() -> None:
    session = WindowedSession(check_windowed(tiny_model("llama")), WindowPlan(2, 8))
    session.read(random_ids(20))
    assert not session._cache.is_croppable
    with pytest.raises(RuntimeError, match="fork before"):
        session._cache.crop(-1)
    with pytest.raises(ValueError, match="at least one token"):
        session.read([])


# Native windows --------------------------------------------------------------------------------

NATIVE: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6},
    "gpt_oss": {"head_dim": 16, "sliding_window": 16, "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mistral": {"sliding_window": 16},
    "olmo3": {"sliding_window": 16},
    "phi3": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "llama": {},
}


@pytest.mark.parametrize("family", sorted(NATIVE))
def test_native_windows_hold_what_they_show_and_give_the_same_logits(family: str) -> None:
    model = tiny_model(family, **NATIVE[family])
    ids = torch.tensor([random_ids(90)])
    cache, stock = native_cache(model.config), DynamicCache(config=model.config)
    spec = ModelSpec.from_config(model.config, dtype_bytes=4)
    num_tokens, pinned = 0, 0
    with torch.inference_mode():
        for piece in torch.tensor_split(ids, (70, 85, 86, 87, 88, 89), dim=1):
            found, expected = (
                model(input_ids=piece, past_key_values=each, use_cache=True).logits
                for each in (cache, stock)
            )
            assert torch.equal(found, expected)
            assert measured_kv_bytes(cache) == measured_kv_bytes(stock)
            if not num_tokens:  # a whole prompt: nothing is held but what is cached
                assert held_kv_bytes(cache) == measured_kv_bytes(cache)
                pinned = held_kv_bytes(stock) - held_kv_bytes(cache)
            num_tokens += piece.shape[1]
            room = held_kv_bytes(cache) - measured_kv_bytes(cache)
            assert 0 <= room <= room_bytes(spec, num_tokens)
    copied = copy.deepcopy(cache)
    assert held_kv_bytes(copied) == held_kv_bytes(cache)
    # What is fixed is there: the stock cache holds more, wherever there is a window.
    assert (pinned > 0) == (family != "llama")


def test_a_native_cache_can_be_rolled_back_as_the_stock_one() -> None:
    model = tiny_model("gemma3_text", **NATIVE["gemma3_text"])
    ids = torch.tensor([random_ids(60)])
    cache: Any = native_cache(model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :50], past_key_values=cache, use_cache=True)
        cache.activate_past_recording()
        first = model(input_ids=ids[:, 50:], past_key_values=cache, use_cache=True).logits
        cache.crop(-10)
        kept = [layer.keys for layer in cache.layers if layer.is_sliding]
        assert all(keys.untyped_storage().nbytes() == keys.numel() * 4 for keys in kept)
        assert {keys.shape[-2] for keys in kept} == {15}
        again = model(input_ids=ids[:, 50:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, first)


# A real model ----------------------------------------------------------------------------------


def smollm2_is_here() -> bool:
    try:
        resolve_model("smollm2-135m", load_settings())
    except FathomError:
        return False
    return True


@pytest.mark.model
@pytest.mark.skipif(
    not smollm2_is_here(), reason="smollm2-135m is not fetched: make test fetches it"
)
def test_smollm2_through_a_window_equals_the_dense_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = resolve_model("smollm2-135m", load_settings())
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "\n".join(str(each.__doc__) for each in (str, dict, int, list, bytes, memoryview))
    ids = tokenizer(text).input_ids[:300]
    assert len(ids) == 300
    checked = check_windowed(model.eval())
    for plan in (WindowPlan(4, 128), WindowPlan(100, 64)):
        expected = streaming_logits(model, ids, plan, monkeypatch)
        found = read_in_pieces(WindowedSession(checked, plan), ids, 120, decoded=8)
        assert relative_error(found, expected) < 1e-4
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    true = WindowPlan(4, 128, caps_sink_distance=False)
    found = read_in_pieces(WindowedSession(checked, true), ids, 120, decoded=8)
    assert relative_error(found, dense_logits(model, ids, dense_mask(true, 300))) < 1e-4
    everything = dense_logits(model, ids, dense_mask(WindowPlan(0, 300), 300))
    assert relative_error(found, everything) > 1e-2
