"""Which context lengths are native, extended, out of range or impossible, worked by hand."""

from typing import Any

import pytest
import torch

from rag.lm.positions import PositionVerdict, position_limit, position_verdict
from rag.lm.spec import ModelSpec, PositionRange
from tiny_families import WINDOW, tiny_config, tiny_model

THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    **THETA,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    **THETA,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 4096,
    **THETA,
}


@pytest.mark.parametrize(
    ("family", "longest", "rope", "limit", "verdicts"),
    [
        ("llama", 8192, None, 8192, {8192: "native", 8193: "out-of-range"}),
        (
            "llama",
            8192,
            {"rope_type": "linear", "factor": 4.0, **THETA},
            8192,
            {2048: "native", 2049: "extended", 8193: "out-of-range"},
        ),
        (
            "llama",
            131072,
            LLAMA3,
            131072,
            {8192: "native", 8193: "extended", 131072: "extended", 131073: "out-of-range"},
        ),
        (
            "qwen2",
            32768,
            YARN,
            131072,
            {32768: "native", 32769: "extended", 131073: "out-of-range"},
        ),
        (
            "llama",
            4096,
            {"rope_type": "dynamic", "factor": 2.0, **THETA},
            4096,
            {4096: "native", 4097: "out-of-range"},
        ),
        ("phi3", 131072, LONGROPE, 4096, {4096: "native", 4097: "out-of-range"}),
        ("mistral", 32768, None, 32768, {32768: "native", 32769: "out-of-range"}),
        ("gemma3_text", 32768, None, 32768, {32768: "native", 32769: "out-of-range"}),
        ("opt", 2048, None, 2048, {2048: "native", 2049: "impossible"}),
    ],
)
def test_position_verdicts(
    family: str,
    longest: int,
    rope: dict[str, Any] | None,
    limit: int,
    verdicts: dict[int, str],
) -> None:
    changes: dict[str, Any] = {"max_position_embeddings": longest}
    if rope is not None:
        changes["rope_parameters"] = dict(rope)
    if family == "phi3":
        changes |= {"original_max_position_embeddings": 4096, "sliding_window": None}
    if family == "qwen2":
        changes |= {"use_sliding_window": False}
    spec = ModelSpec.from_config(tiny_config(family, **changes))
    assert position_limit(spec) == limit
    assert {length: str(position_verdict(spec, length)) for length in verdicts} == verdicts


def test_a_learned_table_of_gpt2_ends_at_its_last_row() -> None:
    spec = ModelSpec.from_config(tiny_config("gpt2", max_position_embeddings=1024))
    assert position_limit(spec) == 1024
    assert position_verdict(spec, 1024) is PositionVerdict.NATIVE
    assert position_verdict(spec, 1025) is PositionVerdict.IMPOSSIBLE


def spec_of(family: str, **changes: Any) -> ModelSpec:  # noqa: ANN401
    return ModelSpec.from_config(tiny_config(family, **changes))


@pytest.mark.parametrize(
    ("family", "changes", "ranges"),
    [
        # Partial rotation changes how much of a head is rotated, not how far it was trained.
        ("stablelm", {"partial_rotary_factor": 0.25}, [("all", "default", 2048, 2048, None)]),
        (
            "gemma3_text",
            {"max_position_embeddings": 131072},
            [
                ("sliding_attention", "default", 131072, 131072, WINDOW),
                ("full_attention", "default", 131072, 131072, None),
            ],
        ),
        (
            "gemma4_text",
            {},
            [
                ("sliding_attention", "default", 2048, 2048, WINDOW),
                ("full_attention", "proportional", 2048, 2048, None),
            ],
        ),
        (
            "smollm3",
            {},
            [
                ("with RoPE", "default", 2048, 2048, None),
                ("without RoPE", "none", None, None, None),
            ],
        ),
        (
            "llama4_text",
            {},
            [
                ("with RoPE", "default", 2048, 2048, WINDOW),
                ("without RoPE", "none", None, None, None),
            ],
        ),
        (
            "cohere2",
            {},
            [
                ("with RoPE", "default", 2048, 2048, WINDOW),
                ("without RoPE", "none", None, None, None),
            ],
        ),
        ("mistral", {}, [("all", "default", 2048, 2048, WINDOW)]),
        ("bloom", {}, [("all", "alibi", None, None, None)]),
        ("bloom", {"seq_length": 512}, [("all", "alibi", 512, 512, None)]),
        ("mpt", {"max_seq_len": 1024}, [("all", "alibi", 1024, 1024, None)]),
        ("falcon", {"alibi": True}, [("all", "alibi", None, None, None)]),
        ("gptj", {"max_position_embeddings": 64}, [("all", "table", 64, 64, None)]),
        ("xglm", {}, [("all", "sinusoidal", 2048, 2048, None)]),
        ("jamba", {}, [("all", "none", None, None, None)]),
        ("nemotron_h", {}, [("all", "none", None, None, None)]),
        ("kimi_linear", {}, [("all", "none", None, None, None)]),
        ("granitemoehybrid", {}, [("all", "none", None, None, None)]),
        (
            "granitemoehybrid",
            {"position_embedding_type": "rope"},
            [("all", "default", 2048, 2048, None)],
        ),
        ("lfm2", {}, [("all", "default", 2048, 2048, None)]),
    ],
)
def test_ranges_of_each_group_of_layers(
    family: str, changes: dict[str, Any], ranges: list[tuple[Any, ...]]
) -> None:
    found = spec_of(family, **changes).positions
    assert [(r.layers, r.kind, r.native, r.declared, r.window) for r in found] == ranges


@pytest.mark.parametrize(
    ("family", "changes", "verdicts"),
    [
        ("bloom", {}, {10**6: "native"}),
        ("bloom", {"seq_length": 512}, {512: "native", 513: "out-of-range"}),
        ("mpt", {"max_seq_len": 1024}, {1024: "native", 1025: "impossible"}),
        ("gptj", {"max_position_embeddings": 64}, {64: "native", 65: "impossible"}),
        ("codegen", {"max_position_embeddings": 64}, {64: "native", 65: "impossible"}),
        ("biogpt", {}, {2048: "native", 2049: "impossible"}),
        ("xglm", {}, {2048: "native", 2049: "out-of-range"}),
        ("jamba", {}, {2048: "native", 2049: "out-of-range"}),
        ("smollm3", {}, {2048: "native", 2049: "out-of-range"}),
        # Its rotated layers never look further than a chunk; what it was trained for ends it.
        ("llama4_text", {}, {2048: "native", 2049: "out-of-range"}),
        ("gemma4_text", {}, {2048: "native", 2049: "out-of-range"}),
    ],
)
def test_verdicts_beyond_rope(
    family: str, changes: dict[str, Any], verdicts: dict[int, str]
) -> None:
    spec = spec_of(family, **changes)
    assert {length: str(position_verdict(spec, length)) for length in verdicts} == verdicts


def test_per_layer_rope_is_judged_by_the_worst_layer() -> None:
    linear = {"rope_type": "linear", "factor": 8.0, **THETA}
    ropes = {
        "sliding_attention": {"rope_type": "default", **THETA},
        "full_attention": linear,
    }
    spec = spec_of("gemma3_text", max_position_embeddings=131072, rope_parameters=ropes)
    assert spec.positions[1] == PositionRange("full_attention", "linear", 16384, 131072)
    assert position_verdict(spec, 16384) is PositionVerdict.NATIVE
    assert position_verdict(spec, 16385) is PositionVerdict.EXTENDED
    assert position_verdict(spec, 131073) is PositionVerdict.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"max_position_embeddings": 32}),
        ("opt", {"max_position_embeddings": 32}),
        ("gptj", {"max_position_embeddings": 32}),
        ("codegen", {"max_position_embeddings": 32}),
        ("gpt_bigcode", {"max_position_embeddings": 32}),
        ("biogpt", {"max_position_embeddings": 32}),
        ("mpt", {"max_seq_len": 32}),
    ],
)
def test_impossible_positions_do_fail_in_the_real_code(
    family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes)
    spec = ModelSpec.from_config(model.config)
    assert position_verdict(spec, 33) is PositionVerdict.IMPOSSIBLE
    with torch.inference_mode():
        model(input_ids=torch.full((1, 32), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 33), 5))


@pytest.mark.parametrize(
    ("family", "changes", "reach"),
    [
        ("mistral", {"num_hidden_layers": 3}, 1 + 3 * (WINDOW - 1)),
        ("phi3", {"num_hidden_layers": 2}, 1 + 2 * (WINDOW - 1)),
        ("gemma3_text", {}, None),
        ("llama", {}, None),
        ("qwen3_next", {}, None),
    ],
)
def test_reach_of_models_whose_layers_all_slide(
    family: str, changes: dict[str, Any], reach: int | None
) -> None:
    assert spec_of(family, **changes).reach_tokens == reach


def test_beyond_its_reach_a_token_changes_nothing() -> None:
    model = tiny_model("mistral", num_hidden_layers=3)
    reach = ModelSpec.from_config(model.config).reach_tokens
    assert reach == 46
    ids = torch.randint(2, 250, (1, reach + 4), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        before = model(input_ids=ids).logits[0, -1]
        for distance, changes_it in ((reach, False), (reach - 1, True)):
            altered = ids.clone()
            altered[0, -1 - distance] = 260
            difference = (model(input_ids=altered).logits[0, -1] - before).abs().max()
            assert bool(difference > 0) is changes_it
