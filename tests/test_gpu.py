"""GPU paths against their plain twins; skipped, with the reason, where there is no GPU."""

from pathlib import Path
from threading import Event
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from conftest import make_tiny_engine, make_tiny_tokenizer, prompt_of
from eval.bench.windowed import peak_allocated_bytes
from rag.lm.agreement import difference, tolerance
from rag.lm.chunked_attention import NAME as CHUNKED
from rag.lm.chunked_attention import use_chunked_attention
from rag.lm.engine import DocumentPrefix, GenerationDone, TextPiece
from rag.lm.forward import forward
from rag.lm.lean_step import STEP_FAMILIES, lean_step
from rag.lm.local_engine import LocalEngine
from rag.lm.native_cache import native_cache
from rag.lm.partial_attention import attend, attend_plain, works
from rag.lm.peak_bytes import peak_bytes
from rag.lm.shared_prefix import forward_in_step
from rag.lm.spec import ModelSpec
from rag.lm.static_cache import STATIC_FAMILIES
from rag.lm.static_decode import PLAIN_STEPS, StaticDecoder, can_decode_statically
from rag.retrieval.embedding import open_embedder
from rag.retrieval.gpu_embedder import GpuEmbedder
from rag.retrieval.vector_index import IndexPlan
from test_embedding import tiny_embedder as tiny_embedder
from test_generation import answers
from test_gpu_embedder import SAME, TEXTS, plain_vectors, shrink_lots
from test_peak_bytes import GROUPED, NARROW, beside_the_cache
from test_static_decode import engine_of, same
from test_static_rows import KINDS, PADDING, PREFIX, cache_of, prompts
from test_vector_index import FLAT, HALF, TRAINED, Shelf, clustered
from test_vector_index import shelf as shelf
from tiny_families import tiny_model

WINDOWED = {**NARROW, "sliding_window": 256}
GEMMA = "gemma3_text"  # with windows of its own, so that its rows share nothing
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
needs_gpu_faiss = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources"), reason="this FAISS build has no GPU support"
)


@pytest.mark.gpu
@needs_gpu
@needs_gpu_faiss
@pytest.mark.parametrize("plan", [FLAT, HALF, TRAINED])
def test_gpu_search_finds_what_cpu_search_finds(
    shelf: Shelf, plan: IndexPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy on the GPU answers as main does, also after adds and deletions beside it."""
    documents = [shelf.add(clustered(150, seed)) for seed in range(10)]
    index = shelf.index(plan)
    queries = clustered(20, 50)
    for changed in (False, True):
        if changed:  # a delta and tombstones beside the copy, which stays as it was
            before = index._gpu_copy
            shelf.store.delete(documents[0])
            shelf.add(clustered(20, 60))
            index.catch_up()
            assert index._gpu_copy is before
        on_gpu = [index.search(query, top_k=10) for query in queries]
        assert index._gpu_copy is not None
        with monkeypatch.context() as patch:
            patch.setattr(faiss, "get_num_gpus", lambda: 0)
            on_cpu = [index.search(query, top_k=10) for query in queries]
        for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
            assert len({i for i, _ in gpu} & {i for i, _ in cpu}) >= 9  # near-ties may swap
            assert np.allclose([s for _, s in gpu], [s for _, s in cpu], atol=2e-3)


@pytest.mark.gpu
@needs_gpu
def test_gpu_logits_agree_with_cpu_logits() -> None:
    model = make_tiny_engine()._model
    assert model is not None
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        on_cpu = model(input_ids=ids).logits
        on_gpu = model.to("cuda")(input_ids=ids.to("cuda")).logits.cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "is_lean"),
    [
        *((family, False) for family in sorted(STATIC_FAMILIES)),
        *((family, True) for family in sorted(STEP_FAMILIES)),
    ],
)
def test_a_recorded_step_gives_the_logits_of_the_plain_way(
    family: str, is_lean: bool, dtype: torch.dtype
) -> None:
    """Recorded, called, and calling the model: three ways to the same tokens, fed alike."""
    model = tiny_model(family).to("cuda", dtype)
    assert lean_step(model) is not None or not is_lean
    ids = [(7 + 7919 * index) % 250 for index in range(40)]

    def prefilled() -> Any:  # noqa: ANN401
        cache = native_cache(model.config)
        forward(model, [ids], cache)
        return cache

    plain = prefilled()
    recorded, called = (
        StaticDecoder(
            model,
            prefilled(),
            [7],
            max_new_tokens=24,
            is_lean=is_lean,
            records=records,
        )
        for records in (True, False)
    )
    newest = 7
    for step in range(23):
        expected = forward(model, [[newest]], plain)[0, -1]
        with torch.inference_mode():
            called.token.fill_(newest)
            recorded.token.fill_(newest)
        recorded.advance()
        called.advance()
        torch.cuda.synchronize()
        assert torch.equal(recorded.logits, called.logits)
        assert difference(recorded.logits[0], expected) < tolerance(model)
        newest = int(expected.argmax())
        assert recorded.is_recorded == (step >= PLAIN_STEPS)
    assert not called.is_recorded


@pytest.mark.gpu
@needs_gpu
def test_weights_are_put_one_after_the_other_on_a_gpu_without_a_second_copy() -> None:
    model = tiny_model("llama", num_hidden_layers=4, hidden_size=1024, intermediate_size=8192)
    model.to("cuda", torch.bfloat16)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    peak = peak_allocated_bytes(lambda: lean_step(model), "cuda")
    assert lean_step(model) is not None
    pair = 2 * 8192 * 1024 * 2
    assert peak < 1.25 * pair
    assert torch.cuda.memory_allocated() < allocated + 2**20
    assert torch.cuda.memory_reserved() < reserved + 2 * pair


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_answer_on_a_gpu_is_the_plain_one(family: str) -> None:
    """The whole way: self-test, copy, steps, tokens read one behind, the stop; twice in a row."""
    model = tiny_model(family).to("cuda")
    assert can_decode_statically(model, ModelSpec.from_config(model.config, dtype_bytes=4))

    def answer(*, static: bool) -> tuple[str, GenerationDone]:
        engine = LocalEngine(model, make_tiny_tokenizer(), name="tiny", decodes_statically=static)
        prompt = prompt_of([(7 + 7919 * index) % 250 for index in range(40)])
        steps = list(engine.generate(prompt, max_new_tokens=24, stop=Event()))
        done = steps[-1]
        assert isinstance(done, GenerationDone)
        return "".join(step.text for step in steps if isinstance(step, TextPiece)), done

    text, done = answer(static=False)
    for _ in range(2):
        found, found_done = answer(static=True)
        assert found == text
        assert (found_done.kv_tokens, found_done.kv_bytes) == (done.kv_tokens, done.kv_bytes)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 64, 128])
def test_fused_attention_gives_the_sums_of_two_products(dtype: torch.dtype, width: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert works("flash", device, dtype, width, width)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert works("cudnn", device, dtype, width, width)
    torch.manual_seed(1)
    key, value = (torch.randn(1, 2, 1_111, width, device=device, dtype=dtype) for _ in range(2))
    for num_queries, is_causal in ((1, False), (7, False), (1_030, False), (1_111, True)):
        query = torch.randn(1, 2, num_queries, width, device=device, dtype=dtype)
        out, sums = attend(query, key, value, scale=0.2, is_causal=is_causal)
        plain, plain_sums = attend_plain(query, key, value, scale=0.2, is_causal=is_causal)
        torch.testing.assert_close(out, plain, atol=2e-2, rtol=0)
        torch.testing.assert_close(sums, plain_sums, atol=1e-2, rtol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox"])
def test_a_chunk_in_two_parts_gives_the_logits_of_one_under_a_mask(family: str) -> None:
    """In bfloat16, whose kernels are meant; behind a cache, long enough for either of them."""
    model = tiny_model(family).to("cuda", torch.bfloat16)
    ids = [(7 + 7919 * index) % 250 for index in range(1_500)]

    def read() -> torch.Tensor:
        cache = native_cache(model.config)
        found = [
            forward(model, [ids[start:end]], cache)[0, -1]
            for start, end in ((0, 300), (300, 1_400), (1_400, 1_440), (1_440, 1_441))
        ]
        return torch.stack(found)

    expected = read()
    use_chunked_attention(model)
    assert model.config._attn_implementation == CHUNKED
    assert difference(read(), expected) < tolerance(model)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {}),
        ("llama", NARROW),
        ("gpt_neox", NARROW),
        (GEMMA, WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}),
        (GEMMA, WINDOWED | {"layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_a_prefill_takes_no_more_memory_than_planned(family: str, shape: dict[str, Any]) -> None:
    """In the chunks of a GPU, after one that has allocated the workspaces of its libraries."""
    fields = GROUPED | {"head_dim": 64, "max_position_embeddings": 32_768} | shape
    config = CONFIG_MAPPING[family](**fields)
    spec = ModelSpec.from_config(config, dtype_bytes=2).on_device("cuda")
    assert all(layer.maskless == (layer.window is None) for layer in spec.layers)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model = model.eval().to("cuda")
    use_chunked_attention(model)
    beside_the_cache(model, 5_000, spec.chunk_tokens)
    for num_tokens in (5_000, 10_000, 20_000):
        found = beside_the_cache(model, num_tokens, spec.chunk_tokens)
        assert found <= peak_bytes(spec, num_tokens)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "is_shared"), KINDS)
def test_a_recorded_step_of_rows_gives_the_logits_of_the_plain_way(
    family: str, is_shared: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(family).to("cuda", dtype)
    plain, newest = cache_of(model, is_shared=is_shared)
    recorded, called = (
        StaticDecoder(
            model,
            cache_of(model, is_shared=is_shared)[0],
            newest,
            max_new_tokens=24,
            front_padding=PADDING,
            records=records,
        )
        for records in (True, False)
    )
    for step in range(23):
        expected = forward_in_step(model, [[n] for n in newest], plain, front_padding=PADDING)
        for decoder in (recorded, called):
            with torch.inference_mode():
                decoder.token.copy_(torch.tensor(newest)[:, None])
            decoder.advance()
        torch.cuda.synchronize()
        for by_graph, by_call, row in zip(
            recorded.logits, called.logits, expected[:, -1], strict=True
        ):
            assert difference(by_graph, by_call) < tolerance(model) / 4
            assert difference(by_graph, row) < tolerance(model)
        newest = expected[:, -1].argmax(-1).tolist()
        assert recorded.is_recorded == (step >= PLAIN_STEPS)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("family", "prefix"), [("llama", PREFIX), ("llama", None), (GEMMA, None)])
def test_answers_in_step_on_a_gpu_are_the_plain_ones(
    family: str, prefix: DocumentPrefix | None
) -> None:
    """The whole way: proofs, copy, recorded steps, rows that end; twice in a row."""
    model = tiny_model(family).to("cuda")
    expected = answers(engine_of(model, static=False), prompts(), prefix)
    engine = engine_of(model, static=True)
    for _ in range(2):
        found = answers(engine, prompts(), prefix)
        assert [text for text, _ in found] == [text for text, _ in expected]
        assert all(same(row, plain) for (_, row), (_, plain) in zip(found, expected, strict=True))
    assert can_decode_statically(model, engine.spec, "shared" if prefix else "joined")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_embeds_as_a_cpu_does(tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lots, their batches queued behind one another, read a batch behind; three times."""
    shrink_lots(monkeypatch)
    embedder = open_embedder(tiny_embedder, name="tiny", device="cuda")
    assert isinstance(embedder, GpuEmbedder)
    expected = plain_vectors(tiny_embedder, TEXTS)
    for _ in range(3):  # pinned memory is used anew
        assert np.sum(embedder.embed(TEXTS) * expected, axis=1).min() >= SAME
    assert float(embedder.embed(TEXTS[5:6])[0] @ expected[5]) >= SAME
