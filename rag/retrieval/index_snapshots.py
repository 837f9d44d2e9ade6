"""Snapshots of an index on disk: whole or absent, never half, and known by their checksum."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rag.errors import StorageFullError


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What a snapshot file must be for it to be trusted, and how well it searches.

    `seq` is the position in the op-log of `library`; `kind` is FAISS's own description;
    `built_for` is the number of vectors when it was last built from the store; `recall_at_10` was
    measured then against exact search, None where search is exact.
    """

    file: str
    sha256: str
    library: str
    seq: int
    dim: int
    embedder: str
    num_vectors: int
    kind: str
    built_for: int
    recall_at_10: float | None


class SnapshotFolder:
    """The snapshots of one embedder's index, in a folder of their own below `root`.

    A file is written beside its place, synced and renamed, then the folder is synced, so that a
    crash leaves the old snapshot or the new one. The manifest comes last: without it, a file
    is a stray.
    """

    def __init__(self, root: Path, embedder: str) -> None:
        self.root = root
        self.path = root / hashlib.sha256(embedder.encode()).hexdigest()[:12]

    def manifests(self) -> list[Path]:
        """Return the manifest files, newest first."""
        return sorted(self.path.glob("index-*.json"), reverse=True)

    def read(self, path: Path) -> tuple[IndexManifest, Path]:
        """Return a manifest and its index file, whose checksum has been compared.

        Raises:
            ValueError, TypeError, OSError: if the snapshot cannot be trusted.
        """
        manifest = IndexManifest(**json.loads(path.read_text()))
        file = self.path / Path(manifest.file).name
        # FAISS notices a truncated file, but loads one with a flipped bit without a word
        with file.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != manifest.sha256:
            raise ValueError("its checksum is wrong")
        return manifest, file

    def write(
        self, manifest: IndexManifest, dump: Callable[[Callable[[bytes], int]], None]
    ) -> Path:
        """Write one snapshot durably; return the index file.

        Args:
            manifest: all but `file` and `sha256`, which are filled in here.
            dump: is given a function that takes the next bytes of the index.

        Raises:
            StorageFullError: if the disk is full; what was there before is untouched.
        """
        name = f"index-{manifest.seq:012d}"
        file = self.path / f"{name}.faiss"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            digest = _write_durably(file, dump)
            manifest = replace(manifest, file=file.name, sha256=digest)
            text = json.dumps(asdict(manifest)).encode()
            _write_durably(file.with_suffix(".json"), lambda take: take(text))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFullError(
                f"the disk is full: the index snapshot {name} was not written",
                hint="free some space; nothing is lost, the index is rebuilt from the store",
            ) from error
        return file

    def drop_all_but_newest(self, keep: int) -> int | None:
        """Delete the older snapshots and stray files; return the position of the oldest kept."""
        kept = self.manifests()[:keep]
        for path in self.path.glob("index-*"):
            if path.with_suffix(".json") not in kept:
                path.unlink(missing_ok=True)
        return int(kept[-1].stem.removeprefix("index-")) if kept else None

    def strays(self) -> list[Path]:
        """Return what no snapshot of this index needs: other embedders', half-written files."""
        if not self.root.is_dir():
            return []
        needed = {path.stem for path in self.manifests()}
        beside = [path for path in self.root.iterdir() if path not in (self.path, self._lock_file)]
        inside = self.path.iterdir() if self.path.is_dir() else []
        return sorted(beside + [p for p in inside if p.suffix == ".tmp" or p.stem not in needed])

    def drop_strays(self) -> None:
        """Delete what `strays` names."""
        for path in self.strays():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, *, wait: bool) -> Iterator[bool]:
        """Hold the right to write below `root`; yield False if another process holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @property
    def _lock_file(self) -> Path:
        return self.root / "snapshot.lock"


def _write_durably(path: Path, dump: Callable[[Callable[[bytes], int]], object]) -> str:
    """Write what `dump` gives, and return its SHA-256: of the bytes meant, not of those on disk."""
    temporary = path.with_name(path.name + ".tmp")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:

            def take(data: bytes) -> int:
                digest.update(data)
                return file.write(data)

            dump(take)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return digest.hexdigest()
