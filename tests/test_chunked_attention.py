"""A chunk behind a cache in two parts: the logits of one under a mask, on the CPU's own kernel."""

from typing import Any

import pytest
import torch

from rag.lm.chunked_attention import NAME, use_chunked_attention
from rag.lm.forward import forward
from rag.lm.native_cache import native_cache
from rag.lm.partial_attention import attend, attend_plain, join
from rag.lm.spec import ModelSpec
from tiny_families import FAMILIES, tiny_model

# 40 tokens at once, then behind them; a single one; a few that fold into one head's rows.
_PIECES = ((0, 40), (40, 75), (75, 76), (76, 80))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return queries and keys of every attention that is computed in two parts."""
    seen: list[tuple[int, int]] = []

    def note(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        seen.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr("rag.lm.chunked_attention.attend", note)
    return seen


def read(model: Any, rows: int = 1, padding: tuple[int, ...] | None = None) -> torch.Tensor:  # noqa: ANN401
    cache = native_cache(model.config)
    ids = [(7 + 7919 * index) % 250 for index in range(80)]
    found = [
        forward(model, [ids[start:end]] * rows, cache, front_padding=padding)
        for start, end in _PIECES
    ]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("family", "rows"),
    [*((family, 1) for family in sorted(FAMILIES)), ("llama", 3), ("gemma3_text", 2)],
)
def test_two_parts_give_the_logits_of_one_under_a_mask(
    family: str, rows: int, parts: list[tuple[int, int]]
) -> None:
    model = tiny_model(family)
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        pytest.skip(f"{family} attends by a way of its own")
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        pytest.skip(f"{family} caches latents, whose code asks for sdpa")
    spec = ModelSpec.from_config(model.config).on_device("cuda", has_kernel=bool)
    expected = read(model, rows)
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(read(model, rows), expected, rtol=1e-4, atol=1e-5)
    # The layers that memory is planned for without a mask are those that have none. Layers that
    # share another's keys are planned with one, and some need none.
    num_planned = sum(layer.maskless for layer in spec.layers)
    num_shared = sum(layer.kind == "shared" for layer in spec.layers)
    behind = [pieces for pieces in _PIECES if pieces[0] and pieces[1] - pieces[0] > 1]
    found, rest = divmod(len(parts), 2 * len(behind))
    assert not rest
    assert num_planned <= found <= num_planned + num_shared


def test_only_what_is_behind_a_cache_is_in_parts(parts: list[tuple[int, int]]) -> None:
    model = tiny_model("llama")  # 4 heads that share 2
    model.set_attn_implementation(NAME)
    read(model)
    layers = model.config.num_hidden_layers
    # 35 behind 40 and 4 behind 76: their queries fold into the shared head, then their own.
    assert parts == [(70, 40), (35, 35)] * layers + [(8, 76), (4, 4)] * layers


def test_padded_rows_keep_their_mask(parts: list[tuple[int, int]]) -> None:
    model = tiny_model("llama")
    expected = read(model, 2, (3, 0))
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(read(model, 2, (3, 0)), expected, rtol=1e-4, atol=1e-5)
    assert parts == []


def test_windows_of_their_own_keep_their_mask(parts: list[tuple[int, int]]) -> None:
    model = tiny_model("gemma3_text")
    model.set_attn_implementation(NAME)
    read(model)
    kinds = model.config.layer_types
    assert 0 < kinds.count("full_attention") < len(kinds)
    assert len(parts) == 4 * kinds.count("full_attention")


def test_without_a_kernel_for_the_heads_there_is_a_mask(
    parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    expected = read(model)
    model.set_attn_implementation(NAME)
    monkeypatch.setattr("rag.lm.chunked_attention.has_fused_attention", lambda *_: False)
    torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-5)
    assert parts == []


def test_on_a_cpu_nothing_is_changed() -> None:
    model = tiny_model("llama")
    use_chunked_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_joined_are_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    query = torch.randn(2, 3, 300, 16, dtype=dtype)
    key, value = (torch.randn(2, 3, 340, 16, dtype=dtype) for _ in range(2))
    visible = torch.ones(300, 340, dtype=torch.bool).tril(40)[None, None].expand(2, 1, -1, -1)
    whole, sums = attend_plain(query, key, value, visible, scale=0.3)
    before = attend(query, key[:, :, :40], value[:, :, :40], scale=0.3)
    own = attend(query, key[:, :, 40:], value[:, :, 40:], scale=0.3, is_causal=True)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(join(before, own), whole, atol=close, rtol=0)
    torch.testing.assert_close(torch.logaddexp(before[1], own[1]), sums, atol=1e-3, rtol=0)
