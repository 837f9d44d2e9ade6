"""GPU paths against their plain twins; skipped, with the reason, where there is no GPU."""

import faiss
import numpy as np
import pytest
import torch

from conftest import make_tiny_engine
from rag.retrieval.vector_index import IndexPlan
from test_vector_index import FLAT, HALF, TRAINED, Shelf, clustered
from test_vector_index import shelf as shelf

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
