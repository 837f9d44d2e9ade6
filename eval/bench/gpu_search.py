"""Exact search on a GPU: FAISS on the card and on the CPU, and a product of float16 rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.bench.gpu_run import Run

if TYPE_CHECKING:
    import torch

_NUM_QUERIES = 256
_DIM = 384
_TOP_K = 10
# Rows whose scores are in memory at once: as many as come to so many scores, but no fewer.
_BLOCK_ROWS = 2**20
_BLOCK_SCORES = 2**25
# Scores of which one reading takes the best.
_GROUP_ROWS = 64
_CHECKED_QUERIES = 16


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One FAISS index, on the card and on the CPU, over the same queries, a batch of them at once.

    `overlap_at_10` is the share of the CPU's ten nearest that the card finds too.
    """

    kind: str
    num_vectors: int
    cpu_queries_per_second: float
    gpu_queries_per_second: float
    ratio: float
    overlap_at_10: float


@dataclass(frozen=True, slots=True)
class ExactRow:
    """All vectors in float16 scored with a batch of queries, the ten nearest kept.

    The limit reads the vectors once, or multiplies them, whichever takes longer; `share` is that
    of the limit. `recall_at_10` is against float32.
    """

    way: str
    num_vectors: int
    num_queries: int
    seconds: float
    queries_per_second: float
    share: float
    recall_at_10: float


def exact_limit_seconds(
    num_vectors: int, num_queries: int, *, bytes_per_second: float, flops_per_second: float
) -> float:
    """Return the least seconds of an exact search of float16 vectors."""
    read_seconds = 2 * num_vectors * _DIM / bytes_per_second
    return max(read_seconds, 2 * num_vectors * _DIM * num_queries / flops_per_second)


def bench_exact(run: Run, num_vectors: int, batches: Sequence[int]) -> list[ExactRow]:
    """Search so many vectors exactly, one query and many at once, by a product and by FAISS."""
    import torch

    what = f"exact search of {num_vectors:,} vectors"
    rows: list[ExactRow] = []
    if run.too_late(what):
        return rows
    with run.section(what), torch.inference_mode():
        generator = torch.Generator(run.device).manual_seed(7)

        def random(count: int) -> torch.Tensor:
            size = (count, _DIM)
            made = torch.randn(size, generator=generator, device=run.device, dtype=torch.float16)
            return torch.nn.functional.normalize(made, dim=1)

        stored = torch.empty(num_vectors, _DIM, dtype=torch.float16, device=run.device)
        for start in range(0, num_vectors, _BLOCK_ROWS):
            block = stored[start : start + _BLOCK_ROWS]
            block.copy_(random(len(block)))
        queries = random(max(*batches, _CHECKED_QUERIES))
        few = queries[:_CHECKED_QUERIES]
        wanted = nearest(stored, few.float())

        def add(way: str, search: Callable[[torch.Tensor], Any]) -> None:
            found = search(few)
            recall = _overlap(found, wanted)
            for count in batches:
                asked = queries[:count]
                seconds = run.middle(lambda asked=asked: search(asked))  # type: ignore[misc]
                limit = exact_limit_seconds(
                    num_vectors,
                    count,
                    bytes_per_second=run.copy_bytes_per_second,
                    flops_per_second=run.matmul_flops_per_second,
                )
                rows.append(
                    ExactRow(
                        way, num_vectors, count, seconds, count / seconds, limit / seconds, recall
                    )
                )

        add("product", lambda asked: nearest(stored, asked))
        what = f"FAISS Flat in float16 of {num_vectors:,} vectors"
        if not run.too_late(what):
            with run.section(what):
                index = _faiss_flat(run, stored)
                if index is not None:
                    add("FAISS", lambda asked: index.search(asked.float().cpu().numpy(), _TOP_K)[1])
    return rows


def nearest(stored: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return the rows of the ten nearest of each query, [queries, 10], by blocks of products.

    To find ten of a million scores takes longer than to compute them. The ten best are in the ten
    groups with the best best, so that the scores are read once for those.

    Args:
        stored: [vectors, dim].
        queries: [queries, dim], multiplied in their own dtype.
    """
    import torch

    best: tuple[torch.Tensor, torch.Tensor] | None = None
    num_rows = max(_BLOCK_ROWS, _BLOCK_SCORES // len(queries))
    for start in range(0, len(stored), num_rows):
        block = stored[start : start + num_rows].to(queries.dtype)
        scores = queries @ block.T
        # A group is every so-manieth score, so that one reading of whole lines finds all maxima.
        num_groups = len(block) // _GROUP_ROWS
        if num_groups > _TOP_K:
            grouped = scores[:, : num_groups * _GROUP_ROWS]
            grouped = grouped.view(len(queries), _GROUP_ROWS, num_groups)
            groups = torch.topk(grouped.amax(1), _TOP_K).indices  # [queries, 10]
            members = torch.arange(_GROUP_ROWS, device=groups.device) * num_groups
            rest = torch.arange(num_groups * _GROUP_ROWS, len(block), device=groups.device)
            rows = torch.cat(
                [
                    (groups[..., None] + members).flatten(1),
                    rest.expand(len(queries), -1),
                ],
                dim=1,
            )
            found, places = torch.topk(scores.gather(1, rows), _TOP_K)
            rows = start + rows.gather(1, places)
        else:
            found, rows = torch.topk(scores, min(_TOP_K, len(block)))
            rows = rows + start
        if best is not None:
            found, rows = torch.cat([best[0], found], 1), torch.cat([best[1], rows], 1)
            found, order = torch.topk(found, _TOP_K)
            rows = rows.gather(1, order)
        best = found, rows
    assert best is not None
    return best[1]


def _faiss_flat(run: Run, stored: torch.Tensor) -> Any:  # noqa: ANN401
    """Return FAISS's own index of these vectors on the card; None, and said, if it has none."""
    import faiss

    if not hasattr(faiss, "GpuIndexFlatConfig") or faiss.get_num_gpus() == 0:
        run.left_out.append("FAISS Flat on the card: this build of FAISS has no GPU part")
        return None
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), _DIM, config)
    for start in range(0, len(stored), _BLOCK_ROWS):
        index.add(stored[start : start + _BLOCK_ROWS].float().cpu().numpy())
    return index


def bench_faiss(run: Run, num_vectors: int) -> list[SearchRow]:
    """Search in the indexes that a library of this size would have, on the card and beside it."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        run.left_out.append("FAISS on the card: this build of FAISS has no GPU part")
        return []
    from rag.retrieval.vector_index import IndexPlan

    generator = np.random.default_rng(7)
    centres = generator.standard_normal((1_000, _DIM), dtype=np.float32)

    def vectors(count: int) -> Any:  # noqa: ANN401
        noise = generator.standard_normal((count, _DIM), dtype=np.float32)
        found = centres[generator.integers(0, len(centres), count)] + noise
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    rows: list[SearchRow] = []
    stored, queries = vectors(num_vectors), vectors(_NUM_QUERIES)
    for kind in ("Flat", "SQfp16", IndexPlan().kind(num_vectors)):
        what = f"FAISS {kind}"
        if run.too_late(what):
            continue
        with run.section(what):
            index = faiss.index_factory(_DIM, kind, faiss.METRIC_INNER_PRODUCT)
            index.train(stored[: max(50_000, 40 * math.isqrt(num_vectors))])
            index.add(stored)
            on_card = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
            on_card.search(queries, _TOP_K)
            gpu_seconds = run.timed(lambda index=on_card: index.search(queries, _TOP_K))  # type: ignore[misc]
            cpu_seconds = run.timed(lambda index=index: index.search(queries, _TOP_K))  # type: ignore[misc]
            found, expected = (i.search(queries, _TOP_K)[1] for i in (on_card, index))
            rows.append(
                SearchRow(
                    kind=kind,
                    num_vectors=num_vectors,
                    cpu_queries_per_second=_NUM_QUERIES / cpu_seconds,
                    gpu_queries_per_second=_NUM_QUERIES / gpu_seconds,
                    ratio=cpu_seconds / gpu_seconds,
                    overlap_at_10=_overlap(found, expected),
                )
            )
    return rows


def _overlap(found: Any, expected: Any) -> float:  # noqa: ANN401
    """Return the share of the expected neighbours that were found."""
    pairs = zip(found.tolist(), expected.tolist(), strict=True)
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in pairs]))


def lines(faiss_rows: Sequence[SearchRow], exact: Sequence[ExactRow]) -> list[str]:
    """Return the figures for people."""
    found = []
    if faiss_rows:
        found += [
            "",
            f"{'search':<14} {'vectors':>10} {'GPU q/s':>10} {'CPU q/s':>10} {'ratio':>7}",
        ]
        found += [
            f"{row.kind:<14} {row.num_vectors:>10,} {row.gpu_queries_per_second:>10,.0f}"
            f" {row.cpu_queries_per_second:>10,.0f} {row.ratio:>7.1f}"
            f"  overlap@10 {row.overlap_at_10:.3f}"
            for row in faiss_rows
        ]
    if exact:
        found += [
            "",
            f"{'exact, float16':<14} {'vectors':>10} {'queries':>8} {'ms':>8} {'q/s':>10}"
            f" {'share':>6}",
        ]
        found += [
            f"{row.way:<14} {row.num_vectors:>10,} {row.num_queries:>8,} {row.seconds * 1e3:>8.2f}"
            f" {row.queries_per_second:>10,.0f} {row.share:>6.0%}  recall@10 {row.recall_at_10:.3f}"
            for row in exact
        ]
    return found
