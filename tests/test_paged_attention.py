"""Attention by the CPU's paged kernel, beside float32 and beside what torch makes of bfloat16."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rag.lm import paged_attention as paged
from rag.lm import window_kernels as kernels
from rag.lm.agreement import difference, tolerance
from rag.lm.forward import forward
from rag.lm.grouped_attention import NAME, causal_mask, use_grouped_attention
from rag.lm.native_cache import native_cache
from rag.lm.paged_attention import FEWEST_QUERIES, attend_paged, has_paged_attention
from rag.lm.paged_window import attend_paged_window
from rag.lm.peak_bytes import peak_bytes
from rag.lm.prefill_cost import chunk_work
from rag.lm.spec import ModelSpec
from rag.lm.window_kernels import WindowPlan, WindowStep, attend_pages, attend_sdpa, visible_keys
from rag.lm.windowed_attention import WindowedSession, check_windowed
from tiny_families import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(
    not has_paged_attention(2, 64), reason="no OpenVINO here, or no bfloat16 in the CPU"
)
# A chunk; one behind it that ends within a block; too few for the kernel; a token; a chunk again.
_PIECES = ((0, 96), (96, 203), (203, 223), (223, 224), (224, 300))
_IDS = [(7 + 7919 * index) % 250 for index in range(300)]


def attention_case(
    num_queries: int, num_keys: int, heads: tuple[int, int], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    some = torch.Generator().manual_seed(3)
    queries, keys = heads
    query = torch.randn(1, queries, num_queries, width, generator=some)
    key, value = torch.randn(2, 1, keys, num_keys, width, generator=some)
    return (3 * query).bfloat16(), key.bfloat16(), value.bfloat16()


def in_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    mask = causal_mask(query.shape[2], key.shape[2], query.device)
    out: torch.Tensor = scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(64, 64), (70, 70), (64, 640), (129, 1001), (512, 1536)]
)
@pytest.mark.parametrize(("heads", "width"), [((9, 3), 64), ((4, 4), 128), ((7, 1), 80)])
def test_the_kernel_is_as_near_to_float32_as_torch(
    heads: tuple[int, int], width: int, num_queries: int, num_keys: int
) -> None:
    case = attention_case(num_queries, num_keys, heads, width)
    before = [states.clone() for states in case]
    expected = in_float32(*case, 0.1)
    found = attend_paged(*case, scale=0.1)
    assert found is not None
    mask = causal_mask(num_queries, num_keys, case[0].device)
    theirs = scaled_dot_product_attention(*case, attn_mask=mask, scale=0.1, enable_gqa=True)
    assert difference(found, expected) < 1.5 * difference(theirs.transpose(1, 2), expected) < 0.01
    # The kernel writes the keys of the queries' own tokens to where they are already.
    assert all(torch.equal(*pair) for pair in zip(case, before, strict=True))


def test_what_lies_behind_the_last_key_is_not_read() -> None:
    query, key, value = attention_case(70, 200, (4, 2), 64)
    rooms = [torch.full((1, 2, 300, 64), torch.nan).bfloat16() for _ in range(2)]
    for room, states in zip(rooms, (key, value), strict=True):
        room[:, :, :200] = states
    found = attend_paged(query, rooms[0][:, :, :200], rooms[1][:, :, :200], scale=0.1)
    assert found is not None
    assert torch.equal(found, attend_paged(query, key, value, scale=0.1))  # type: ignore[arg-type]


def test_the_result_is_the_same_whoever_computes_and_with_any_threads() -> None:
    case = attention_case(512, 1024, (8, 2), 64)
    alone = attend_paged(*case, scale=0.1)
    assert alone is not None
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: attend_paged(*case, scale=0.1), range(16)):
            assert torch.equal(found, alone)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads if threads in (1, 2) else 1)
        other = attend_paged(*case, scale=0.1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(other, alone)  # type: ignore[arg-type]


def test_what_the_kernel_is_not_for_is_left_alone() -> None:
    query, key, value = attention_case(FEWEST_QUERIES, 200, (4, 2), 64)
    assert attend_paged(query, key, value, scale=0.1) is not None
    assert attend_paged(query[:, :, 1:], key, value, scale=0.1) is None
    assert attend_paged(query.float(), key.float(), value.float(), scale=0.1) is None
    assert attend_paged(query, key, value[..., :32], scale=0.1) is None
    rows = (states.expand(2, -1, -1, -1) for states in (query, key, value))
    assert attend_paged(*rows, scale=0.1) is None
    narrow = (states[..., :33].contiguous() for states in (query, key, value))
    assert attend_paged(*narrow, scale=0.1) is None


def test_a_kernel_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paged._kernel.cache_clear()
    right = paged.PagedKernel.attend
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(paged.PagedKernel, "attend", lambda *args: 1.1 * right(*args))
        assert not has_paged_attention(2, 64)
    assert "differs by 10" in caplog.text
    paged._kernel.cache_clear()
    assert has_paged_attention(2, 64)


# ---- models --------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return queries and keys of every attention that the kernel computes."""
    seen: list[tuple[int, int]] = []

    def note(query: Any, key: Any, value: Any, *, scale: float) -> Any:  # noqa: ANN401
        found = attend_paged(query, key, value, scale=scale)
        if found is not None:
            seen.append((query.shape[2], key.shape[2]))
        return found

    monkeypatch.setattr("rag.lm.grouped_attention.attend_paged", note)
    return seen


def read(model: Any, rows: int = 1) -> torch.Tensor:  # noqa: ANN401
    cache = native_cache(model.config)
    found = [forward(model, [_IDS[start:end]] * rows, cache) for start, end in _PIECES]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_say_the_same_as_under_a_mask(family: str, calls: list[tuple[int, int]]) -> None:
    model = tiny_model(family).bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2).on_device("cpu")
    expected = read(model)
    use_grouped_attention(model)
    assert difference(read(model), expected) <= tolerance(model)
    # The layers that memory is planned for without a mask are those that have none. Layers that
    # share another's keys are planned with one, and some need none.
    num_planned = sum(layer.maskless for layer in spec.layers)
    num_shared = sum(layer.kind == "shared" for layer in spec.layers)
    long = [piece for piece in _PIECES if piece[1] - piece[0] >= FEWEST_QUERIES]
    if family == "biogpt":  # it makes its own mask for all that is behind a cache
        assert (num_planned, calls) == (0, [(96, 96)] * 2)
        return
    found, rest = divmod(len(calls), len(long))
    assert not rest
    if model.config._attn_implementation == NAME:
        assert num_planned <= found <= num_planned + num_shared
    else:
        assert found == 0


def test_a_plain_model_is_read_by_the_kernel(calls: list[tuple[int, int]]) -> None:
    model = tiny_model("llama").bfloat16()
    use_grouped_attention(model)
    read(model)
    assert calls == [(96, 96)] * 2 + [(107, 203)] * 2 + [(76, 300)] * 2
    calls.clear()
    read(model, rows=2)
    assert calls == []


def test_without_the_kernel_there_is_a_mask_and_every_bit_is_torchs(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, int]]
) -> None:
    model = tiny_model("llama").bfloat16()
    spec = ModelSpec.from_config(model.config, dtype_bytes=2)
    expected = read(model)
    use_grouped_attention(model)
    monkeypatch.setattr(paged, "_kernel", lambda *_: None)
    assert torch.equal(read(model), expected)
    assert calls == []
    assert spec.on_device("cpu") == spec


# ---- memory and time -----------------------------------------------------------------------------


def test_planned_bytes_and_work_by_hand() -> None:
    model = tiny_model("llama")  # 2 layers, 4 heads that share 2, of 8
    spec = ModelSpec.from_config(model.config, dtype_bytes=2)
    pages = spec.on_device("cpu", has_kernel=bool, num_threads=3)
    assert (pages.num_threads, spec.num_threads) == (3, 1)
    assert all(layer.maskless for layer in pages.layers)
    longer = peak_bytes(pages, 200_000) - peak_bytes(pages, 100_000)
    # A token more: scores of 32 queries in float32 a thread, and 4 copies of 8 numbers.
    assert longer == 100_000 * (3 * 32 * 4 + 4 * 8 * 2)
    assert chunk_work(spec, 100, 50).attention_flops == 4 * 2 * 32 * 100 * (50 + 100)
    assert chunk_work(pages, 100, 50).attention_flops == 4 * 2 * 32 * (100 * 50 + 100 * 101 // 2)
    assert spec.on_device("cpu", has_kernel=lambda _: False) == spec
    assert spec.on_device("cpu", num_threads=1).layers[0].maskless
    wide = ModelSpec.from_config(model.config, dtype_bytes=4)
    assert not any(layer.maskless for layer in wide.on_device("cpu").layers)


_MEASURE = """
import psutil, sys, torch
from rag.lm.paged_attention import attend_paged
torch.set_num_threads(2)
query = torch.zeros(1, 14, 512, 64, dtype=torch.bfloat16)
key = torch.zeros(1, 2, 65_500, 64, dtype=torch.bfloat16)
attend_paged(query, key[:, :, :600].contiguous(), key[:, :, :600].contiguous(), scale=0.125)
before = psutil.Process().memory_info().rss
attend_paged(query, key, key, scale=0.125)
sys.stdout.write(str(psutil.Process().memory_info().rss - before))
"""


def test_the_kernel_takes_the_memory_that_is_planned() -> None:
    """What it has allocated stays with it until the next call, so that it can be seen."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    planned = 65_500 * (2 * 32 * 4 + 4 * 64 * 2) + 512 * 2 * 14 * 64 * 2
    assert 0.6 * planned < int(done.stdout) < planned + 2**22


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_scores", [False, True])
@pytest.mark.parametrize("held", [0, 31, 64, 10**6])
@pytest.mark.parametrize(
    ("sinks", "window", "num_queries"),
    [(4, 100, 96), (1, 32, 64), (70, 64, 129), (4, 1024, 512), (9, 333, 257)],
)
def test_a_window_with_sinks_by_pages(
    sinks: int, window: int, num_queries: int, held: int, own_scores: bool
) -> None:
    plan = WindowPlan(sinks, window)
    num_keys = sinks + min(window - 1, held) + num_queries
    query, key, value = attention_case(num_queries, num_keys, (6, 2), 32)
    scores = None
    if not own_scores:  # those of sinks that are nearer than they are
        scores = 3 * torch.randn(1, 6, num_queries, sinks)
    mask = visible_keys(plan, num_queries, num_keys, query.device)
    step = WindowStep(sinks, window, mask, None, frozenset(), attend_pages)
    expected = attend_sdpa(query.float(), key.float(), value.float(), step, scores, 0.2)
    seen = []

    def note(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        seen.append(attend_paged_window(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "attend_paged_window", note)
        found = attend_pages(query, key, value, step, scores, 0.2)
    assert len(seen) == 1
    assert seen[0] is not None
    assert difference(found, expected) < 0.006


@pytest.mark.parametrize(("sinks", "window"), [(0, 64), (4, 31)])
def test_windows_that_the_kernel_is_not_for_keep_their_mask(sinks: int, window: int) -> None:
    plan = WindowPlan(sinks, window)
    num_keys = sinks + window - 1 + 80
    case = attention_case(80, num_keys, (4, 2), 32)
    mask = visible_keys(plan, 80, num_keys, case[0].device)
    step = WindowStep(sinks, window, mask, None, frozenset(), attend_pages)
    assert torch.equal(attend_pages(*case, step, None, 0.2), attend_sdpa(*case, step, None, 0.2))


def test_a_session_reads_a_text_by_pages_as_it_does_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    plan = WindowPlan(num_sinks=6, window=100)
    ids = _IDS * 2

    def last(model: Any) -> torch.Tensor:  # noqa: ANN401
        session = WindowedSession(check_windowed(model), plan)
        session.read(ids[:6])
        session.read(ids[6:500])
        branch = session.fork()
        branch.read(ids[500:])
        return session.logits(ids[500:])

    expected = last(model)
    used = []

    def note(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        found = attend_paged_window(*args, **options)
        used.append(found is not None)
        return found

    monkeypatch.setattr(kernels, "attend_paged_window", note)
    found = last(tiny_model("llama").bfloat16())
    assert sum(used) > 10
    assert difference(found, expected) <= tolerance(model.bfloat16())
