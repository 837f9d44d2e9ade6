"""How fast the nearest vectors are found: beside the memory's speed, and batches beside FAISS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from eval.bench.machine import CLOCKS, Machine, this_machine, timed
from eval.bench.rounds import Seconds, in_turn, middle, ratio

FloatArray = npt.NDArray[np.float32]
TOP_K = 10
QUERIES_AT_ONCE = 64
_CENTRES = 2000  # embeddings of text lie in clusters
_READ_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One way to search all vectors: a query alone, and many at once.

    `read_share` is the bytes of a query alone over what the memory gives in that time; `ratio` is
    FAISS Flat's seconds to its own for many at once.
    """

    name: str
    one: Seconds
    read_share: float
    queries_per_second: float
    ratio: Seconds
    recall_at_10: float


@dataclass(frozen=True, slots=True)
class SearchBench:
    """What `fathom bench search` shows; CPU seconds."""

    machine: Machine
    vectors: int
    dim: int
    rounds: int
    read_bytes_per_second: float
    drift: float
    rows: tuple[SearchRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench search` prints last."""
        return {"bench": "search", **asdict(self)}


def bench_search(
    num_vectors: int,
    dim: int,
    *,
    rounds: int = 3,
    on_progress: Callable[[str], None] = lambda _: None,
) -> SearchBench:
    """Search random clustered unit vectors by FAISS in float32 and float16, and by torch.

    `fp16` is what an index of more than 50,000 chunks searches (docs/decisions/0012); the bfloat16
    product is what a batch of questions could use, and nothing here asks batches yet.
    """
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    device = torch.device("cpu")
    speed = _read_bytes_per_second()
    on_progress("making vectors")
    stored, queries = _vectors(num_vectors, dim)
    flat = faiss.IndexFlatIP(dim)
    half = faiss.IndexScalarQuantizer(
        dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    half.train(stored[:1000])
    for index in (flat, half):
        index.add(stored)
    rows = torch.from_numpy(stored).bfloat16()

    def product(asked: FloatArray) -> npt.NDArray[np.int64]:
        with torch.inference_mode():
            scores = torch.from_numpy(asked).bfloat16() @ rows.T
            found: npt.NDArray[np.int64] = torch.topk(scores, TOP_K).indices.numpy()
            return found

    searches: dict[str, tuple[Callable[[FloatArray], Any], int]] = {
        "FAISS Flat, float32": (lambda asked: flat.search(asked, TOP_K)[1], 4),
        "FAISS SQ, float16": (lambda asked: half.search(asked, TOP_K)[1], 2),
        "torch, bfloat16 product": (product, 2),
    }
    exact = flat.search(queries, TOP_K)[1]
    recall = {name: _recall(search(queries), exact) for name, (search, _) in searches.items()}
    alone = {name: partial(search, queries[:1]) for name, (search, _) in searches.items()}
    together = {name: partial(search, queries) for name, (search, _) in searches.items()}
    one = in_turn(alone, 5 * rounds)
    many = in_turn(together, rounds, on_progress=on_progress)
    end = _read_bytes_per_second()
    first = next(iter(searches))
    return SearchBench(
        machine=this_machine(device),
        vectors=num_vectors,
        dim=dim,
        rounds=rounds,
        read_bytes_per_second=max(speed, end),
        drift=abs(end / speed - 1),
        rows=tuple(
            SearchRow(
                name=name,
                one=middle(one, name),
                read_share=num_vectors
                * dim
                * size
                / min(s.cpu for s in one[name])
                / max(speed, end),
                queries_per_second=len(queries) / middle(many, name).cpu,
                ratio=ratio(many, first, name),
                recall_at_10=recall[name],
            )
            for name, (_, size) in searches.items()
        ),
    )


def _vectors(num_vectors: int, dim: int) -> tuple[FloatArray, FloatArray]:
    """Return float32 [num_vectors, dim] and [QUERIES_AT_ONCE, dim], unit length, clustered."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((_CENTRES, dim), dtype=np.float32)
    stored = centres[rng.integers(0, _CENTRES, num_vectors)]
    stored += rng.standard_normal((num_vectors, dim), dtype=np.float32)
    queries = stored[rng.integers(0, num_vectors, QUERIES_AT_ONCE)]
    queries = queries + 0.05 * rng.standard_normal(queries.shape, dtype=np.float32)
    for rows in (stored, queries):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return stored, queries


def _recall(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64]) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return float(np.mean(hits)) / TOP_K


def _read_bytes_per_second() -> float:
    """Return bytes a second of the best pass over much memory, of a few."""
    import torch

    values = torch.zeros(_READ_BYTES // 4)
    device = torch.device("cpu")
    return _READ_BYTES / min(timed(values.sum, device, clock=CLOCKS["cpu"]) for _ in range(6))


def card(bench: SearchBench) -> str:
    """Return the table for people."""
    lines = [
        bench.machine.describe(),
        f"{bench.vectors:,} vectors of {bench.dim}; CPU seconds, medians of {bench.rounds};"
        f" memory reads {bench.read_bytes_per_second / 1e9:.1f} GB/s",
        f"{'':26}{'one query':>12}{'of memory':>11}{'queries/s':>11}{'ratio':>7}{'recall@10':>11}",
    ]
    lines += [
        f"{row.name:26}{row.one.cpu * 1e3:>9.2f} ms{row.read_share:>11.0%}"
        f"{row.queries_per_second:>11,.0f}{row.ratio.cpu:>7.2f}{row.recall_at_10:>11.3f}"
        for row in bench.rows
    ]
    return "\n".join([*lines, f"queries/s and ratio: {QUERIES_AT_ONCE} at once"])
