"""GPU paths against their plain twins; skipped, with the reason, where there is no GPU."""

import faiss
import numpy as np
import pytest
import torch

from conftest import HashEmbedder, make_tiny_engine
from rag.retrieval.vector_index import VectorIndex
from rag.store.oplog import OpLog
from ui.assembly import Fathom

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
needs_gpu_faiss = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources"), reason="this FAISS build has no GPU support"
)


@pytest.mark.gpu
@needs_gpu
@needs_gpu_faiss
def test_gpu_search_finds_what_cpu_search_finds(small_fathom: Fathom) -> None:
    embedder = HashEmbedder()
    index = VectorIndex(
        OpLog(small_fathom.database, embedder.fingerprint),
        small_fathom.settings.index_dir,
        dim=embedder.dim,
        embedder=embedder.fingerprint,
    )
    index.catch_up()
    query = embedder.embed(["north beacon"])[0]
    on_gpu = index.search(query, top_k=3)
    on_cpu = index.search(query, top_k=3, among=sorted(index.ids()))
    assert [i for i, _ in on_gpu] == [i for i, _ in on_cpu]
    assert np.allclose([s for _, s in on_gpu], [s for _, s in on_cpu], atol=1e-4)


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
