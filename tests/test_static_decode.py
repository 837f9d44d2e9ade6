"""Answers written by one step that is the same each time: what it gives, and that it stays put.

Here the step is called, which is the plain twin of what a GPU records; test_gpu.py records it.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_tiny_tokenizer, prompt_of
from rag.lm.agreement import difference, tolerance
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import DocumentPrefix, GenerationDone, TextPiece
from rag.lm.forward import forward
from rag.lm.kv_bytes import (
    kv_cache_bytes,
    measured_kv_bytes,
    room_bytes,
    static_capacity,
    static_kv_bytes,
)
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import native_cache
from rag.lm.shared_prefix import can_share
from rag.lm.spec import ModelSpec
from rag.lm.static_cache import STATIC_FAMILIES, attend_one, static_refusal
from rag.lm.static_decode import (
    PLAIN_STEPS,
    GraphedStep,
    StaticDecoder,
    can_decode_statically,
    in_place,
)
from rag.types import Decoding, DecodingWay
from tiny_families import FAMILIES, WINDOW, tiny_model

NEW = 24
# One without windows, one with biases, one whose layers have windows of 16 but for each sixth.
TELLING = ["llama", "qwen2", "gemma3_text"]


def ids_of(num_tokens: int, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(n) for n in torch.randint(2, 250, (num_tokens,), generator=generator)]


def spec_of(model: Any) -> ModelSpec:  # noqa: ANN401
    return ModelSpec.from_config(model.config, dtype_bytes=model.dtype.itemsize)


def prefilled(model: Any, num_tokens: int) -> tuple[Any, int]:  # noqa: ANN401
    """Return the cache of a prompt, and the likeliest token after it."""
    cache = native_cache(model.config)
    return cache, int(forward(model, [ids_of(num_tokens)], cache)[0, -1].argmax())


def engine_of(model: Any, *, static: bool, **options: Any) -> LocalEngine:  # noqa: ANN401
    return LocalEngine(
        model, make_tiny_tokenizer(), name="tiny", decodes_statically=static, **options
    )


def answer(
    engine: LocalEngine, num_tokens: int, prefix: DocumentPrefix | None = None
) -> tuple[str, GenerationDone]:
    steps = list(
        engine.generate(
            prompt_of(ids_of(num_tokens)), max_new_tokens=NEW, stop=Event(), prefix=prefix
        )
    )
    done = steps[-1]
    assert isinstance(done, GenerationDone)
    return "".join(step.text for step in steps if isinstance(step, TextPiece)), done


def hiding(slots: torch.Tensor) -> torch.Tensor:
    """Return what is added to scores so that these slots, bool [rows, slots], are not seen."""
    return torch.zeros(slots.shape).masked_fill_(slots, -torch.inf)


def same(found: GenerationDone, expected: GenerationDone) -> bool:
    """Say whether two answers are accounted for alike, seconds aside."""
    names = ("prompt_tokens", "new_tokens", "kv_tokens", "kv_bytes", "stopped", "is_cut_off")
    return all(getattr(found, name) == getattr(expected, name) for name in names)


# ---- what it gives -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "num_tokens"),
    # A window of 16 tokens is full before the answer; after 3 tokens of prompt the answer fills it.
    [*((family, 40) for family in sorted(STATIC_FAMILIES)), *((family, 3) for family in TELLING)],
)
def test_an_answer_is_word_for_word_the_plain_one(family: str, num_tokens: int) -> None:
    model = tiny_model(family)
    text, done = answer(engine_of(model, static=False), num_tokens)
    found, found_done = answer(engine_of(model, static=True), num_tokens)
    assert can_decode_statically(model, spec_of(model))
    assert found == text
    assert same(found_done, done)
    assert done.new_tokens > PLAIN_STEPS + 1
    assert done.decoding == Decoding(DecodingWay.PLAIN)
    assert found_done.decoding == Decoding(DecodingWay.STATIC)  # recorded on a GPU alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TELLING)
def test_its_logits_are_the_plain_ones(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    plain, newest = prefilled(model, 40)
    decoder = StaticDecoder(model, prefilled(model, 40)[0], [newest], max_new_tokens=NEW)
    for _ in range(NEW - 1):
        expected = forward(model, [[newest]], plain)[0, -1]
        decoder.advance()
        if dtype == torch.float32:
            torch.testing.assert_close(decoder.logits[0], expected, rtol=1e-4, atol=1e-5)
        else:
            assert difference(decoder.logits[0], expected) < tolerance(model) / 4
        newest = int(decoder.token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 8, 64])
def test_attention_in_parts_is_attention(dtype: torch.dtype, parts: int) -> None:
    torch.manual_seed(1)
    query = torch.randn(1, 6, 1, 8).to(dtype)
    key, value = (torch.randn(1, 2, 192, 8).to(dtype) for _ in range(2))
    bias = hiding(torch.arange(192)[None] > 100)
    found = attend_one(query, key, value, bias, parts=parts, scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(),
        key[:, :, :101].float(),
        value[:, :, :101].float(),
        scale=0.3,
        enable_gqa=True,
    )
    assert found.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_what_cannot_be_static_is_answered_the_plain_way(family: str) -> None:
    model = tiny_model(family)
    assert static_refusal(model.config)
    assert not can_decode_statically(model, spec_of(model))
    text, done = answer(engine_of(model, static=False), 40)
    found, found_done = answer(engine_of(model, static=True), 40)
    assert found == text
    assert same(found_done, done)
    assert found_done.decoding is not None
    assert "no recorded step" in found_done.decoding.refused


def test_a_quantised_cache_keeps_the_plain_way() -> None:
    model = tiny_model("llama", head_dim=16)
    quantised = spec_of(model).quantised
    assert quantised is not None
    assert not can_decode_statically(model, quantised)


def test_angles_that_follow_the_length_are_refused() -> None:
    config = tiny_model("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "angles" in (static_refusal(config) or "")


def test_a_step_that_gives_something_else_is_found_out_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("gemma3_text")
    right = attend_one

    def blind(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        **options: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        first = torch.arange(bias.shape[-1]) == 0  # a slot too few is seen
        return right(query, key, value, bias + hiding(first), **options)

    with monkeypatch.context() as patch:
        patch.setattr("rag.lm.static_cache.attend_one", blind)
        assert not can_decode_statically(model, spec_of(model))
        assert "logits differ" in caplog.text
    text, _ = answer(engine_of(model, static=False), 40)
    assert answer(engine_of(model, static=True), 40)[0] == text


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_document_that_is_kept_is_gone_on_from_and_not_changed(family: str) -> None:
    model = tiny_model(family)
    prefix = DocumentPrefix(documents=("one@1",), num_tokens=60)
    text, done = answer(engine_of(model, static=False), 80)
    engine = engine_of(
        model,
        static=True,
        document_kv=DocumentKV(Path("unused"), memory_bytes=2**20, disk_bytes=0),
    )
    for reused in (0, 60, 60):
        found, found_done = answer(engine, 80, prefix)
        assert found == text
        assert same(found_done, done)
        assert found_done.reused_tokens == reused


# ---- where it ends ------------------------------------------------------------------------------


def test_the_token_that_ends_an_answer_ends_it_though_the_next_is_on_its_way() -> None:
    model = tiny_model("llama")
    cache, first_id = prefilled(model, 40)
    decoder = StaticDecoder(model, cache, [first_id], max_new_tokens=NEW)
    ids = [first_id, *(decoder.next_ids()[0] for _ in range(NEW - 1))]
    end_id = next(n for n in ids[PLAIN_STEPS + 2 :] if n not in ids[: PLAIN_STEPS + 2])
    model.generation_config.eos_token_id = end_id
    text, done = answer(engine_of(model, static=False), 40)
    found, found_done = answer(engine_of(model, static=True), 40)
    assert done.new_tokens == ids.index(end_id) + 1
    assert not done.is_cut_off
    assert found == text
    assert same(found_done, done)


def test_a_stop_ends_it_and_nothing_is_shown_after_it() -> None:
    model = tiny_model("llama")
    engine = engine_of(model, static=True)
    launched = []
    forward_of = type(model).forward
    head = model.get_output_embeddings()  # each step ends with it, whoever computes it
    hook = head.register_forward_pre_hook(lambda *_: launched.append(1))
    stop, shown = Event(), 0
    for step in engine.generate(prompt_of(ids_of(40)), max_new_tokens=200, stop=stop):
        if isinstance(step, TextPiece):
            assert not stop.is_set()
            shown += 1
            if shown == 5:
                stop.set()
                launched.clear()
        last = step
    hook.remove()
    assert type(model).forward is forward_of
    assert isinstance(last, GenerationDone)
    assert last.stopped
    assert len(launched) <= 1 < last.new_tokens
    assert last.kv_tokens == 40 + last.new_tokens - 1


def test_a_caller_that_goes_away_leaves_the_engine_usable() -> None:
    model = tiny_model("gemma3_text")
    engine = engine_of(model, static=True)
    text, _ = answer(engine, 40)
    steps = engine.generate(prompt_of(ids_of(40)), max_new_tokens=NEW, stop=Event())
    while not isinstance(next(steps), TextPiece):
        pass
    steps.close()  # type: ignore[attr-defined]
    assert model.config._attn_implementation == "sdpa"
    assert answer(engine, 40)[0] == text


# ---- where it stays -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", TELLING)
@pytest.mark.parametrize(("num_tokens", "num_new"), [(3, 8), (40, 24), (40, 25), (41, 24)])
def test_its_bytes_are_those_that_are_predicted(family: str, num_tokens: int, num_new: int) -> None:
    model = tiny_model(family)
    spec = spec_of(model)
    plain, first_id = prefilled(model, num_tokens)
    cache, _ = prefilled(model, num_tokens)
    decoder = StaticDecoder(model, cache, [first_id], max_new_tokens=num_new)
    assert not cache.layers  # what was copied is not held twice
    longest = num_tokens + num_new - 1
    assert decoder.cache.allocated_bytes == static_kv_bytes(spec, longest)
    windows = [layer for layer in spec.layers if layer.window is not None]
    # Within what is reserved for an answer: see `joined_batch_bytes`.
    assert static_kv_bytes(spec, longest) <= (
        kv_cache_bytes(spec, longest)
        + room_bytes(spec, longest)
        + sum(layer.elements_per_token * spec.dtype_bytes for layer in windows)
    )
    newest = first_id
    for _ in range(num_new - 1):
        forward(model, [[newest]], plain)
        [newest] = decoder.next_ids()
        assert (
            decoder.kv_bytes()
            == measured_kv_bytes(plain)
            == kv_cache_bytes(spec, decoder.num_tokens)
        )
    assert decoder.num_tokens == longest
    # It was not written beyond its last slot, and will not be.
    assert int(decoder.cache.position) == longest <= static_capacity(longest)
    with pytest.raises(ValueError, match="no room for more than"):
        decoder.next_ids()
    assert int(decoder.cache.position) == longest


@pytest.mark.parametrize("family", TELLING)
def test_nothing_that_a_step_reads_or_writes_moves(family: str) -> None:
    model = tiny_model(family)
    cache, first_id = prefilled(model, 10)
    decoder = StaticDecoder(model, cache, [first_id], max_new_tokens=2 * WINDOW)

    def addresses() -> list[int]:
        static = decoder.cache
        tensors = [decoder.token, decoder.logits, static.position]
        for layer in static.static_layers:
            tensors += [layer.states, layer.place.slot, layer.place.bias]
        return [tensor.data_ptr() for tensor in tensors]

    before = addresses()
    for _ in range(2 * WINDOW - 1):
        decoder.next_ids()
        assert addresses() == before


def test_its_memory_is_free_at_once_when_an_answer_ends() -> None:
    """Gigabytes on a GPU: they may not wait for Python to look for circles."""
    model = tiny_model("llama")
    kept = []
    gc.collect()
    gc.disable()
    try:
        for ends in (NEW - 1, 2):  # at its end, and when the caller goes away
            cache, first_id = prefilled(model, 40)
            decoder = StaticDecoder(model, cache, [first_id], max_new_tokens=NEW)
            for _ in range(ends):
                decoder.next_ids()
            kept.append(weakref.ref(decoder.cache.static_layers[0].states))
            assert kept[-1]() is not None
            decoder.close()
            del decoder
            assert kept[-1]() is None
    finally:
        gc.enable()


class _Devices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes where the results of each operation are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(
        self,
        function: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.seen.setdefault(str(function), set()).add(tensor.device.type)
        return found


@pytest.mark.parametrize("family", sorted(STATIC_FAMILIES))
def test_a_step_neither_asks_nor_tells_the_host_anything(family: str) -> None:
    """On a device without values, reading one raises, and so does a tensor of the CPU."""
    model = tiny_model(family).to(torch.bfloat16).to("meta")
    cache = native_cache(model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 20, dtype=torch.long, device="meta"), past_key_values=cache)
    decoder = StaticDecoder(model, cache, [5], max_new_tokens=NEW)
    with _Devices() as operations:
        decoder.advance()
    assert "aten.bmm.dtype" in operations.seen  # the products of a GPU
    assert set().union(*operations.seen.values()) == {"meta"}


@pytest.mark.parametrize(
    ("family", "starts_in_place"),
    [*((family, False) for family in TELLING), ("llama", True), ("granite", True)],
)
def test_a_step_is_one_graph_for_every_position(family: str, starts_in_place: bool) -> None:
    """A compiler that may not leave the graph takes it whole, and only once."""
    model = tiny_model(family)
    spec = spec_of(model)
    assert not starts_in_place or can_share(model, spec)
    graphs = []

    def note(graph: Any, _: Any) -> Any:  # noqa: ANN401
        graphs.append(graph)
        return graph.forward

    cache, first_id = prefilled(model, 10)
    plain = StaticDecoder(model, prefilled(model, 10)[0], [first_id], max_new_tokens=2 * WINDOW)
    torch._dynamo.reset()
    decoder = StaticDecoder(
        model,
        in_place(model, spec, cache) if starts_in_place else cache,
        [first_id],
        max_new_tokens=2 * WINDOW,
        wrap=lambda step: torch.compile(step, fullgraph=True, dynamic=False, backend=note),
    )
    for _ in range(2 * WINDOW - 1):
        assert decoder.next_ids() == plain.next_ids()
    assert len(graphs) == 1


class _Card:
    """What of torch.cuda a recording uses, and what is asked of it in which order."""

    def __init__(self, *, can_record: bool) -> None:
        self.done: list[str] = []
        self._can_record = can_record
        self._is_recording = False

    def step(self) -> None:
        self.done.append("recorded" if self._is_recording else "called")

    def replay(self) -> None:
        self.done.append("replayed")

    def wait_stream(self, _: object) -> None:
        """Nothing runs beside the host here."""

    @contextmanager
    def graph(self, *_: object, **options: object) -> Iterator[None]:
        assert options["capture_error_mode"] == "thread_local"
        self._is_recording = True
        try:
            yield
            if not self._can_record:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self._is_recording = False


@pytest.mark.parametrize("can_record", [True, False])
def test_each_step_runs_once_whether_it_can_be_recorded_or_not(
    can_record: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = _Card(can_record=can_record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: card)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: card)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: card)
    monkeypatch.setattr(torch.cuda, "graph", card.graph)
    step = GraphedStep(card.step, torch.device("cuda"))
    for _ in range(PLAIN_STEPS + 4):
        step()
    after = "replayed" if can_record else "called"
    assert card.done == ["called"] * PLAIN_STEPS + ["recorded"] + [after] * 4
    assert step.is_recorded == can_record
    assert ("was not recorded" in caplog.text) != can_record


def test_a_cpu_is_not_asked_to_record_and_does_not_do_so_by_itself() -> None:
    model = tiny_model("llama")
    cache, first_id = prefilled(model, 10)
    decoder = StaticDecoder(model, cache, [first_id], max_new_tokens=NEW)
    for _ in range(NEW - 1):
        decoder.next_ids()
    assert not decoder.is_recorded
    assert set(STATIC_FAMILIES) <= set(FAMILIES)
