"""FAISS over the chunks' vectors: a cache of the store. The only home of faiss."""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from rag.errors import EmbedderMismatchError, StorageFullError, StoreError
from rag.retrieval.index_snapshots import IndexManifest, SnapshotFolder
from rag.store.oplog import Changes, OpLog

logger = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]
Faiss = Any  # its indexes, selectors and parameters are untyped

SNAPSHOTS_KEPT = 2
RECALL_QUERIES = 100
RECALL_K = 10
HALF_PRECISION_TOLERANCE = 1e-3  # of one component of a unit vector
GPU_MAX_RESULTS = 2048  # faiss's documented limit on a GPU


@dataclass(frozen=True, slots=True)
class IndexSize:
    """The kind of index used up to `max_vectors`, as faiss's index_factory names it."""

    max_vectors: float
    kind: str


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """Where an index changes its kind, and when it is put in order. Chosen: decision 0012."""

    sizes: tuple[IndexSize, ...] = (
        IndexSize(50_000, "Flat"),
        IndexSize(200_000, "SQfp16"),  # half the memory, twice as fast, recall 1.000
        IndexSize(math.inf, "IVF{lists},SQfp16"),
    )
    lists_per_root: float = 4.0  # lists = 4 * sqrt(vectors)
    samples_per_list: int = 64  # faiss warns below 39 and uses no more than 256
    min_recall: float = 0.95
    fold_share: float = 0.05  # delta and tombstones, as a share of the index
    fold_at_least: int = 1000
    gather_at_most: int = 500  # so few chosen chunks are fetched, more are selected by a scan
    max_dead: int = 1000  # each search asks for as many more results

    def size(self, num_vectors: int) -> IndexSize:
        """Return the row of the table for so many vectors."""
        return next(size for size in self.sizes if num_vectors <= size.max_vectors)

    def kind(self, num_vectors: int) -> str:
        """Return faiss's description of the index for so many vectors."""
        lists = max(1, round(self.lists_per_root * math.sqrt(num_vectors)))
        return self.size(num_vectors).kind.format(lists=lists)


@dataclass(frozen=True, slots=True)
class IndexDifferences:
    """Chunks whose vector is missing or another than the stored one, and ids of no chunk."""

    wrong: list[int]
    foreign: list[int]


class VectorIndex:
    """Inner-product search, kept equal to the store by replaying its op-log.

    Any process may hold one: each catches up before it searches. A snapshot only saves time; a
    missing, damaged or foreign one is skipped, and the index is rebuilt from the stored vectors.

    Three parts: `main`, which may be large, trained, and copied to a GPU; `delta`, the vectors
    added since; `dead`, the ids deleted from main since. The two are folded into main before
    they grow, and before a snapshot, so that no deleted vector is ever on disk.
    """

    def __init__(
        self, oplog: OpLog, folder: Path, *, dim: int, embedder: str, plan: IndexPlan | None = None
    ) -> None:
        """Load the newest good snapshot in `folder`, if any; the first search catches up."""
        self._oplog = oplog
        self._snapshots = SnapshotFolder(folder, embedder)
        self._dim = dim
        self._embedder = embedder
        self._plan = plan or IndexPlan()
        self._lock = threading.RLock()
        self._main: Faiss
        self._main_ids: IdArray  # sorted
        self._delta: Faiss
        self._dead: set[int]
        self._gpu_copy: Faiss | None
        self._kind: str
        self._built_for: int
        self._recall: float | None
        self._seq: int
        self._unsaved: int  # changes since the newest snapshot
        self._reset()
        self._load()

    # ---- what it holds -----------------------------------------------------------------------

    @property
    def num_vectors(self) -> int:
        """Vectors in the index as of the last catch-up."""
        with self._lock:
            return int(self._main.ntotal - len(self._dead) + self._delta.ntotal)

    @property
    def kind(self) -> str:
        """What faiss calls the main part, e.g. Flat or IVF2048,SQfp16."""
        return self._kind

    @property
    def recall_at_10(self) -> float | None:
        """Recall@10 against exact search, measured when it was built; None if it is exact."""
        return self._recall

    def ids(self) -> set[int]:
        """Return the chunk ids in the index as of the last catch-up."""
        with self._lock:
            living = set(self._main_ids.tolist()) - self._dead
            return living | set(_ids_of(self._delta).tolist())

    def vectors(self, chunk_ids: Sequence[int]) -> tuple[list[int], FloatArray]:
        """Return those of the given ids that are in the index, and float32 [len(ids), dim]."""
        with self._lock:
            wanted = np.asarray(chunk_ids, dtype=np.int64)
            in_delta = wanted[np.isin(wanted, _ids_of(self._delta))]
            in_main = wanted[_are_in(wanted, self._main_ids)]
            in_main = in_main[~np.isin(in_main, list(self._dead))]
            parts = [
                part.reconstruct_batch(ids)
                for part, ids in ((self._main, in_main), (self._delta, in_delta))
                if len(ids)
            ]
            rows = np.concatenate(parts) if parts else np.empty((0, self._dim), dtype=np.float32)
            return [*in_main.tolist(), *in_delta.tolist()], rows

    def differences(self) -> "IndexDifferences":
        """Compare every vector with the store's, a page at a time."""
        tolerance = 0.0 if self._kind == "Flat" else HALF_PRECISION_TOLERANCE
        wrong: list[int] = []
        matched = 0
        for ids, stored in self._oplog.vectors():
            found, rows = self.vectors(ids)
            place = {chunk_id: row for row, chunk_id in enumerate(found)}
            missing = [chunk_id for chunk_id in ids if chunk_id not in place]
            order = [place[chunk_id] for chunk_id in ids if chunk_id in place]
            theirs = stored[[row for row, chunk_id in enumerate(ids) if chunk_id in place]]
            differ = np.abs(rows[order] - theirs).max(axis=1, initial=0.0) > tolerance
            wrong += missing + [found[row] for row, bad in zip(order, differ, strict=True) if bad]
            matched += len(found)
        foreign: list[int] = []
        if matched != self.num_vectors:
            known = {chunk_id for ids, _ in self._oplog.vectors() for chunk_id in ids}
            foreign = sorted(self.ids() - known)
        return IndexDifferences(wrong, foreign)

    # ---- following the store -----------------------------------------------------------------

    def catch_up(self) -> int:
        """Apply what the store has done since; return the number of chunks that changed.

        Raises:
            EmbedderMismatchError: if the library has changed to another embedder meanwhile.
        """
        with self._lock:
            num_changed = 0
            if not self._oplog.is_current(self._seq):  # it is before most questions
                try:
                    self._oplog.require_active()
                except EmbedderMismatchError:
                    self._reset()  # vectors of an embedder not yet active come without log entries
                    raise
                num_changed = self._replay()
            if self._unsaved > self._fold_at():
                try:
                    self.snapshot()
                except StorageFullError as error:  # searching goes on without a snapshot
                    logger.warning("%s", error.message)
            return num_changed

    def rebuild(self, *, alone: bool = True) -> None:
        """Forget the index and every snapshot of it, and build both anew from the store.

        Args:
            alone: drop the snapshots of other embedders, too.
        """
        with self._lock:
            self._snapshots.drop_all()
            self._reset()
            self.snapshot(keep=1 if alone else SNAPSHOTS_KEPT, wait=True)

    # ---- searching ---------------------------------------------------------------------------

    def search(
        self, query: FloatArray, *, top_k: int, among: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, cosine), best first; equal scores in order of id.

        Args:
            query: float32 [dim], unit length.
            top_k: how many to return at most.
            among: chunk ids to search, exactly and without regard to any other; None searches
                all, approximately where the index is trained.
        """
        question = np.ascontiguousarray(query[None, :], dtype=np.float32)
        with self._lock:
            if among is None:
                found = self._search_all(question, top_k)
            elif len(among) <= self._plan.gather_at_most:
                ids, vectors = self.vectors(among)
                found = list(zip(ids, (vectors @ query).tolist(), strict=True))
            else:
                found = self._search_chosen(question, top_k, np.asarray(among, dtype=np.int64))
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:top_k]

    def _search_all(self, question: FloatArray, top_k: int) -> list[tuple[int, float]]:
        # the dead are left out afterwards, so as many more are asked for: a GPU knows no filter
        num_results = top_k + len(self._dead)
        reader = self._on_gpu() if num_results <= GPU_MAX_RESULTS else self._main
        found = [
            (i, score)
            for i, score in _nearest(reader, question, num_results)
            if i not in self._dead
        ]
        return found + _nearest(self._delta, question, top_k)

    def _search_chosen(
        self, question: FloatArray, top_k: int, among: IdArray
    ) -> list[tuple[int, float]]:
        living = faiss.IDSelectorBatch(among[~np.isin(among, list(self._dead))])
        chosen = faiss.IDSelectorBatch(among)
        every_list = _search_parameters(self._main, sel=living)
        found = _nearest(self._main, question, top_k, every_list)
        return found + _nearest(self._delta, question, top_k, faiss.SearchParameters(sel=chosen))

    def _on_gpu(self) -> Faiss:
        """Return a copy of main on the GPU where there is one, else main; rebuilt after a fold."""
        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            return self._main
        if self._gpu_copy is None:
            self._gpu_copy = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._main)
        return self._gpu_copy

    # ---- snapshots ---------------------------------------------------------------------------

    def snapshot(self, *, keep: int = SNAPSHOTS_KEPT, wait: bool = False) -> Path | None:
        """Catch up, write the index to disk, drop older snapshots and the log they needed.

        Args:
            keep: how many snapshots stay; 1 also drops whatever else lies in the folder.
            wait: for another process that is writing one now, instead of leaving it to that.

        Returns:
            The file, or None if another process is writing one.

        Raises:
            StorageFullError: if the disk is full. With keep=1 the older ones are dropped all the
                same: they may hold what was deleted, and the index can be rebuilt.
        """
        with self._lock, self._snapshots.lock(wait=wait) as held:
            if not held:
                return None
            self._replay()  # under the lock: nothing deleted before can be written after
            if self._unsaved or self._pending() or self._seq not in self._snapshots.positions():
                self._fold()
                self._write_snapshot(drop_on_failure=keep == 1)
            # with the lock and all changes, ours is the newest: one beyond is of another history
            oldest = self._snapshots.drop_all_but(keep, up_to=self._seq)
            if keep == 1:
                self._snapshots.drop_strays()
            self._oplog.truncate(oldest)
            return self._snapshots.file_at(self._seq)

    def _write_snapshot(self, *, drop_on_failure: bool) -> None:
        manifest = IndexManifest(
            file="",
            sha256="",
            library=self._oplog.library(),
            seq=self._seq,
            dim=self._dim,
            embedder=self._embedder,
            num_vectors=self.num_vectors,
            kind=self._kind,
            built_for=self._built_for,
            recall_at_10=self._recall,
        )
        try:
            self._snapshots.write(manifest, self._dump)
        except StorageFullError:
            if drop_on_failure:
                self._snapshots.drop_all()
            raise
        self._unsaved = 0

    def bad_snapshots(self) -> list[str]:
        """Return a sentence for each snapshot that would be skipped, and each stray file.

        Nothing is said while another process writes one: what it is at is no stray.
        """
        with self._snapshots.lock(wait=False) as held:
            if not held:
                return []
            found = []
            for path in self._snapshots.manifests():
                try:
                    self._read(path)
                except (OSError, ValueError, TypeError, RuntimeError) as error:
                    found.append(f"{path.name}: {error}")
            strays = self._snapshots.strays()
            return found + [f"{path.name}: no snapshot needs it" for path in strays]

    def _load(self) -> None:
        for path in self._snapshots.manifests():
            try:
                manifest, self._main = self._read(path)
            except (OSError, ValueError, TypeError, RuntimeError) as error:
                logger.warning("index snapshot %s is skipped: %s", path.name, error)
                continue
            self._main_ids = np.sort(_ids_of(self._main))
            self._seq, self._kind = manifest.seq, manifest.kind
            self._built_for, self._recall = manifest.built_for, manifest.recall_at_10
            return

    def _read(self, path: Path) -> tuple[IndexManifest, Faiss]:
        manifest, file = self._snapshots.read(path)
        if (manifest.dim, manifest.embedder) != (self._dim, self._embedder):
            raise ValueError(f"it was made with {manifest.embedder}")
        if manifest.library != self._oplog.library():
            raise ValueError("it was made of another library")
        if manifest.seq > self._oplog.last_seq():
            raise ValueError(f"it is at {manifest.seq}, beyond the end of the store's log")
        index = faiss.read_index(str(file))
        if (index.d, index.ntotal) != (self._dim, manifest.num_vectors):
            raise ValueError(f"it holds {index.ntotal} vectors of {index.d}")
        return manifest, index

    def _dump(self, take: Callable[[bytes], int]) -> None:
        faiss.write_index(self._main, faiss.PyCallbackIOWriter(take, 2**20))

    # ---- building and folding ----------------------------------------------------------------

    def _reset(self) -> None:
        self._main = _untrained(self._dim, "Flat")
        self._main_ids = np.empty(0, dtype=np.int64)
        self._delta = _untrained(self._dim, "Flat")
        self._dead = set()
        self._gpu_copy = None
        self._kind = "Flat"
        self._built_for = 0
        self._recall = None
        self._seq = -1  # before any log, so that the next catch-up takes all
        self._unsaved = 0

    def _replay(self) -> int:
        num_changed = 0
        while True:
            changes = self._oplog.changes_since(self._seq)
            if changes is None:  # the log was cut beyond our position
                num_changed += self._build()
            elif changes.seq == self._seq:
                return num_changed
            else:
                self._apply(changes)
                num_changed += len(changes.removed)
                if self._pending() > self._fold_at() or len(self._dead) > self._plan.max_dead:
                    self._fold()

    def _apply(self, changes: Changes) -> None:
        removed = np.asarray(changes.removed, dtype=np.int64)
        self._delta.remove_ids(removed)
        self._dead.update(removed[_are_in(removed, self._main_ids)].tolist())
        if changes.added:
            self._require_dim(changes.vectors)
            self._delta.add_with_ids(changes.vectors, np.asarray(changes.added, dtype=np.int64))
        self._seq = changes.seq
        self._unsaved += len(changes.removed)

    def _pending(self) -> int:
        return len(self._dead) + int(self._delta.ntotal)

    def _fold_at(self) -> int:
        return max(self._plan.fold_at_least, int(self._plan.fold_share * self._main.ntotal))

    def _fold(self) -> None:
        """Move delta and tombstones into main; build anew if the size asks for another kind."""
        if self._pending():
            if self._dead:
                self._main.remove_ids(np.fromiter(self._dead, dtype=np.int64))
            if self._delta.ntotal:
                ids = _ids_of(self._delta)
                self._main.add_with_ids(self._delta.reconstruct_batch(ids), ids)
            self._delta, self._dead = _untrained(self._dim, "Flat"), set()
            self._main_ids = np.sort(_ids_of(self._main))
            self._gpu_copy = None
        if self._outgrown():
            self._build()
            self._replay()

    def _outgrown(self) -> bool:
        now, built_for = int(self._main.ntotal), self._built_for
        other = self._plan.size(now) is not self._plan.size(built_for)
        if now > built_for:
            return other or (self._plan.size(now).kind.startswith("IVF") and now > 4 * built_for)
        return other and now < built_for / 2  # half, so that it does not change to and fro

    def _build(self) -> int:
        """Build main from the stored vectors, a page at a time; return how many there are."""
        self._reset()  # first, so that the old index and the new one are never both in memory
        seq, num_vectors = self._oplog.last_seq(), self._oplog.num_vectors()
        kind = self._plan.kind(num_vectors)
        main = _untrained(self._dim, kind)
        recall = None
        if main.is_trained:
            self._fill(main)
        else:
            lists = faiss.extract_index_ivf(main).nlist
            sample_ids, sample = self._sample(lists * self._plan.samples_per_list, num_vectors)
            main.train(sample)
            every = max(1, len(sample) // RECALL_QUERIES)
            asked, questions = sample_ids[::every].copy(), sample[::every].copy()
            del sample
            nearest = self._fill(main, asked, questions)
            recall = _tune(main, asked, questions, nearest, self._plan.min_recall)
            if recall < self._plan.min_recall:
                logger.warning("%s finds %.3f of the nearest; kept flat", kind, recall)
                kind, recall = "SQfp16", None
                main = _untrained(self._dim, kind)
                self._fill(main)
        self._main, self._main_ids = main, np.sort(_ids_of(main))
        self._kind, self._recall, self._built_for, self._seq = kind, recall, num_vectors, seq
        self._unsaved = max(1, num_vectors)
        return num_vectors

    def _sample(self, size: int, num_vectors: int) -> tuple[IdArray, FloatArray]:
        """Return ids and vectors of every n-th stored vector: the same ones at each build."""
        every = max(1, num_vectors // size)
        capacity = num_vectors // every + 1
        ids = np.empty(capacity, dtype=np.int64)
        rows = np.empty((capacity, self._dim), dtype=np.float32)  # filled in place, not joined
        taken = seen = 0
        for page_ids, page in self._oplog.vectors():
            self._require_dim(page)
            first = -seen % every
            part = page[first::every][: capacity - taken]
            rows[taken : taken + len(part)] = part
            ids[taken : taken + len(part)] = page_ids[first::every][: len(part)]
            taken += len(part)
            seen += len(page_ids)
        return ids[:taken], rows[:taken]

    def _fill(
        self,
        main: Faiss,
        asked: IdArray | None = None,
        questions: FloatArray | None = None,
    ) -> IdArray:
        """Add every stored vector to `main`; return the exact nearest ids of the questions.

        The question itself is left out: asked is the id of each. int64 [len(asked), RECALL_K].
        """
        best_ids = np.empty((0 if asked is None else len(asked), 0), dtype=np.int64)
        best_scores = np.empty(best_ids.shape, dtype=np.float32)
        for ids, vectors in self._oplog.vectors():
            self._require_dim(vectors)
            page_ids = np.asarray(ids, dtype=np.int64)
            main.add_with_ids(vectors, page_ids)
            if asked is None or questions is None:
                continue
            scores = np.where(asked[:, None] == page_ids, -np.inf, questions @ vectors.T)
            best_scores = np.concatenate([best_scores, scores], axis=1)
            best_ids = np.concatenate([best_ids, np.broadcast_to(page_ids, scores.shape)], axis=1)
            order = np.argsort(-best_scores, axis=1, kind="stable")[:, :RECALL_K]
            best_scores = np.take_along_axis(best_scores, order, axis=1)
            best_ids = np.take_along_axis(best_ids, order, axis=1)
        return best_ids

    def _require_dim(self, vectors: FloatArray) -> None:
        if vectors.shape[1] != self._dim:
            raise StoreError(
                f"a stored vector has {vectors.shape[1]} dimensions; expected {self._dim}",
                hint="fathom doctor --repair embeds it anew",
            )


def _untrained(dim: int, kind: str) -> Faiss:
    """Return an empty index that keeps our ids, can remove them and gives vectors back."""
    index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return faiss.IndexIDMap2(index)
    ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
    return index


def _ids_of(index: Faiss) -> IdArray:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64)
    lists = ivf.invlists
    parts = [
        faiss.rev_swig_ptr(lists.get_ids(n), lists.list_size(n)).copy()
        for n in range(ivf.nlist)
        if lists.list_size(n)
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _are_in(ids: IdArray, sorted_ids: IdArray) -> npt.NDArray[np.bool_]:
    if len(sorted_ids) == 0:
        return np.zeros(len(ids), dtype=np.bool_)
    at = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    return np.asarray(sorted_ids[at] == ids, dtype=np.bool_)


def _search_parameters(index: Faiss, *, sel: Faiss) -> Faiss:
    """Return parameters for an exact search among the ids that `sel` lets through."""
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return faiss.SearchParameters(sel=sel)
    return faiss.SearchParametersIVF(sel=sel, nprobe=ivf.nlist)


def _nearest(
    index: Faiss,
    question: FloatArray,
    num_results: int,
    parameters: Faiss = None,
) -> list[tuple[int, float]]:
    num_results = min(num_results, int(index.ntotal))
    if num_results == 0:
        return []
    scores, ids = index.search(question, num_results, params=parameters)
    found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
    return [(i, score) for i, score in found if i >= 0]


def _tune(
    main: Faiss,
    asked: IdArray,
    questions: FloatArray,
    nearest: IdArray,
    min_recall: float,
) -> float:
    """Double the number of lists searched until recall@10 suffices; return the last recall.

    A quarter of the lists is the end: beyond it a flat index is as fast.
    """
    ivf = faiss.extract_index_ivf(main)
    ivf.nprobe = 8
    while True:
        _, found = main.search(questions, RECALL_K + 1)
        hits = [
            len(set(row[row != own][:RECALL_K].tolist()) & set(best.tolist())) / len(best)
            for row, own, best in zip(found, asked, nearest, strict=True)
        ]
        recall = float(np.mean(hits))
        if recall >= min_recall or ivf.nprobe * 2 > ivf.nlist // 4:
            return recall
        ivf.nprobe *= 2
