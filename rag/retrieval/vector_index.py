"""FAISS over the chunks' vectors: a cache of the store. The only home of faiss."""

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from rag.store.oplog import Changes, OpLog

logger = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float32]
SNAPSHOT_AFTER_CHANGES = 1000
SNAPSHOTS_KEPT = 2


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What a snapshot file must be for it to be trusted."""

    file: str
    sha256: str
    seq: int
    dim: int
    embedder: str
    num_vectors: int


class VectorIndex:
    """Exact inner-product search, kept equal to the store by replaying its op-log.

    Any process may hold one: each catches up before it searches. A snapshot only saves time; a
    missing, damaged or foreign one is skipped, and the index is rebuilt from the stored vectors.
    Where faiss sees a GPU, unscoped searches run on a copy there.
    """

    def __init__(self, oplog: OpLog, folder: Path, *, dim: int, embedder: str) -> None:
        """Load the newest good snapshot in `folder`, if any; the first search catches up."""
        self._oplog = oplog
        self._folder = folder
        self._dim = dim
        self._embedder = embedder
        self._lock = threading.RLock()
        self._on_gpu: Any = None
        self._index, self._seq, self._snapshot_seq = self._load()

    @property
    def num_vectors(self) -> int:
        """Vectors in the index as of the last catch-up."""
        return int(self._index.ntotal)

    def ids(self) -> set[int]:
        """Return the chunk ids in the index as of the last catch-up."""
        return {int(i) for i in faiss.vector_to_array(self._index.id_map)}

    def vector(self, chunk_id: int) -> FloatArray:
        """Return one stored vector: float32 [dim]."""
        return np.asarray(self._index.reconstruct(chunk_id), dtype=np.float32)

    def catch_up(self) -> int:
        """Apply what the store has done since; return the number of chunks that changed."""
        with self._lock:
            changes = self._oplog.changes_since(self._seq)
            if changes is None:  # the log was cut beyond our position
                self._index, changes = _empty(self._dim), self._oplog.everything()
            self._apply(changes)
            if self._seq - self._snapshot_seq >= SNAPSHOT_AFTER_CHANGES:
                self.snapshot()
            return len(changes.removed) + len(changes.added)

    def search(
        self, query: FloatArray, *, top_k: int, among: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, cosine), best first.

        Args:
            query: float32 [dim], unit length.
            top_k: how many to return at most.
            among: chunk ids to search; None searches all.
        """
        with self._lock:
            if self._index.ntotal == 0:
                return []
            matrix = np.ascontiguousarray(query[None, :], dtype=np.float32)
            if among is None:
                scores, ids = self._reader().search(matrix, min(top_k, self.num_vectors))
            else:
                selector = faiss.IDSelectorBatch(np.asarray(among, dtype=np.int64))
                scores, ids = self._index.search(
                    matrix,
                    min(top_k, self.num_vectors),
                    params=faiss.SearchParameters(sel=selector),  # type: ignore[call-arg]
                )
        found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        return [(int(i), float(score)) for i, score in found if i >= 0]

    def snapshot(self, *, keep: int = SNAPSHOTS_KEPT) -> Path | None:
        """Write the index to disk and drop older snapshots and the log they no longer need.

        File and manifest are each written beside their place, synced and renamed, so a crash
        leaves the old snapshot or the new one. Returns the file, or None if another process is
        writing one now.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock, (self._folder / "snapshot.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            data = faiss.serialize_index(self._index).tobytes()
            name = f"index-{self._seq:012d}"
            manifest = IndexManifest(
                file=f"{name}.faiss",
                sha256=hashlib.sha256(data).hexdigest(),
                seq=self._seq,
                dim=self._dim,
                embedder=self._embedder,
                num_vectors=self.num_vectors,
            )
            _write_durably(self._folder / manifest.file, data)
            _write_durably(self._folder / f"{name}.json", json.dumps(asdict(manifest)).encode())
            self._snapshot_seq = self._seq
            kept = sorted(self._folder.glob("index-*.json"))[-keep:]
            for path in self._folder.glob("index-*"):
                if path.with_suffix(".json") not in kept:
                    path.unlink()
            self._oplog.truncate(int(kept[0].stem.removeprefix("index-")))
            return self._folder / manifest.file

    def rebuild(self) -> None:
        """Forget the index and every snapshot, and build both anew from the store."""
        with self._lock:
            self._index = _empty(self._dim)
            self._apply(self._oplog.everything())
            self.snapshot(keep=1)

    def bad_snapshots(self) -> list[str]:
        """Return a sentence for each snapshot that would be skipped."""
        found = []
        for path in sorted(self._folder.glob("index-*.json")):
            try:
                self._read(path)
            except (OSError, ValueError, TypeError, RuntimeError) as error:
                found.append(f"{path.name}: {error}")
        return found

    def _load(self) -> tuple[Any, int, int]:
        for path in sorted(self._folder.glob("index-*.json"), reverse=True):
            try:
                manifest, index = self._read(path)
            except (OSError, ValueError, TypeError, RuntimeError) as error:
                logger.warning("index snapshot %s is skipped: %s", path.name, error)
                continue
            return index, manifest.seq, manifest.seq
        return _empty(self._dim), -1, 0  # -1: before any log, so the first catch-up takes all

    def _read(self, path: Path) -> tuple[IndexManifest, Any]:
        manifest = IndexManifest(**json.loads(path.read_text()))
        data = (self._folder / Path(manifest.file).name).read_bytes()
        # faiss notices a truncated file, but loads one with a flipped bit without a word
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise ValueError("its checksum is wrong")
        if (manifest.dim, manifest.embedder) != (self._dim, self._embedder):
            raise ValueError(f"it was made with {manifest.embedder}")
        return manifest, faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))

    def _apply(self, changes: Changes) -> None:
        if changes.removed:
            self._index.remove_ids(np.asarray(changes.removed, dtype=np.int64))
        if changes.added:
            self._index.add_with_ids(changes.vectors, np.asarray(changes.added, dtype=np.int64))
        if changes.removed or changes.added:
            self._on_gpu = None
        self._seq = changes.seq

    def _reader(self) -> Any:  # noqa: ANN401 - faiss is untyped
        """Return the index to search: a copy on the GPU where there is one, else the index."""
        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            return self._index
        if self._on_gpu is None:
            self._on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._index)
        return self._on_gpu


def _empty(dim: int) -> Any:  # noqa: ANN401 - faiss is untyped
    return faiss.IndexIDMap2(faiss.IndexFlatIP(dim))


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
