"""Document KV: a document's cache is prefilled once and kept for the next question about it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from rag.lm.engine import DocumentPrefix

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

logger = logging.getLogger(__name__)

_FORMAT = "fathom document kv 1"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_LOCK = "document_kv.lock"
# Names, shapes and metadata that stand before the tensors of a file, at most.
_HEADER_BYTES = 64 * 1024
# Read and checked once to know how fast loading is here, before anything was loaded.
_SAMPLE_BYTES = 2**24
# Families that keep a state outside the layers of the cache: the layers alone would not be all.
_STATE_ELSEWHERE = frozenset({"minimax", "recurrent_gemma"})


@dataclass(frozen=True, slots=True)
class KeptPrefix:
    """The cache of one prompt prefix, never changed once kept.

    `layers` holds keys and values of each layer, [1, kv heads, tokens kept, head width], in the
    model's dtype and on its device; of an `EightBitLayer` the bytes that it keeps.
    """

    key: str
    documents: tuple[str, ...]
    num_tokens: int
    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


def prefix_key(model: str, prefix: DocumentPrefix, prompt_ids: list[int]) -> str:
    """Return the name of a prefix: equal names mean the same cache, for the same tenant.

    Args:
        model: whatever tells the model, its weights, dtype, tokenizer and template from others.
        prefix: the tenant, the document versions, and the length of the prefix.
        prompt_ids: the prompt; only its prefix counts.
    """
    ids = prompt_ids[: prefix.num_tokens]
    parts = [_FORMAT, prefix.tenant, list(prefix.documents), model, ids]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def snapshot(cache: Cache, model_type: str) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Return the tensors that a cache holds now; None if they are not all of its state.

    Nothing is copied but what would keep a larger tensor alive. A full layer grows by making a
    new tensor where it has no room, so these stay as they are while the cache goes on. Because a
    kept prefix is only ever used whole, sliding layers beyond their window need no rolling back.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from rag.lm.eight_bit_cache import EightBitLayer
    from rag.lm.native_cache import GrowingLayer, OwningWindowLayer

    if model_type in _STATE_ELSEWHERE:
        return None
    # Exact classes: another subclass may keep more than keys and values.
    whole = {DynamicLayer, GrowingLayer, EightBitLayer}
    whole |= {DynamicSlidingWindowLayer, OwningWindowLayer}
    layers = []
    layer: Any  # the mixins of transformers do not declare what their subclasses have
    for layer in cache.layers:
        if type(layer) not in whole:
            return None
        if layer.keys is None or layer.values is None:
            return None
        layers.append((_own_storage(layer.keys), _own_storage(layer.values)))
    return tuple(layers)


def restore(kept: KeptPrefix, cache: Cache) -> None:
    """Put a kept prefix into a new, empty cache of the same model; the tensors are shared."""
    layer: Any
    for layer, (keys, values) in zip(cache.layers, kept.layers, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = kept.num_tokens


class DocumentKV:
    """Kept prefixes, the least recently used dropped first: in memory, and on disk beyond it.

    Processes share the folder. A file is written beside its place, synced and renamed under a
    lock, so it is whole or absent; it carries a checksum, and one that is wrong is removed and
    counts as absent. A prefix that cannot be kept never fails an answer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory_bytes: int,
        disk_bytes: int,
        is_there: Callable[[tuple[str, ...]], bool] = lambda documents: True,
    ) -> None:
        """Set the budgets; nothing is read or made yet.

        Args:
            folder: where the files lie.
            memory_bytes: most bytes kept in this process; 0 keeps none.
            disk_bytes: most bytes of all files; 0 writes and reads none.
            is_there: whether all of these document versions still exist; asked before keeping, so
                that what was deleted meanwhile is not.
        """
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._is_there = is_there
        self._kept: OrderedDict[str, KeptPrefix] = OrderedDict()  # least recently used first
        self._written: set[str] = set()  # the keys that this process need not write again
        self._bytes_per_second: float | None = None  # of loading from disk
        self._lock = Lock()

    @property
    def memory_used_bytes(self) -> int:
        """Bytes kept in this process now; all of them can be released."""
        with self._lock:
            return sum(kept.num_bytes for kept in self._kept.values())

    def has(self, key: str) -> bool:
        """Say whether a prefix is kept here; that a file is sound is checked when it is loaded."""
        with self._lock:
            return key in self._kept or (self._disk_bytes > 0 and self._path(key).is_file())

    def load_seconds(self, key: str) -> float:
        """Return the seconds that `load` is going to take: 0 in memory, or where nothing is kept.

        From disk they are the file's bytes over the speed of the last loading, or, before the
        first, of reading and checking the beginning of this one.
        """
        with self._lock:
            if key in self._kept or not self._disk_bytes:
                return 0.0
        path = self._path(key)
        try:
            num_bytes = path.stat().st_size
            if self._bytes_per_second is None and num_bytes:
                begun = time.perf_counter()
                with path.open("rb") as file:
                    sample = file.read(_SAMPLE_BYTES)
                hashlib.sha256(sample).digest()
                self._bytes_per_second = len(sample) / (time.perf_counter() - begun)
        except OSError:
            return 0.0
        return num_bytes / self._bytes_per_second if self._bytes_per_second else 0.0

    def load(self, key: str, device: str) -> KeptPrefix | None:
        """Return a kept prefix with its tensors on `device`, None if there is none."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
        if kept is None and self._disk_bytes:
            kept = self._read(key, device)
            if kept is not None:
                self.keep(kept)
        if kept is not None:
            with suppress(OSError):  # its place in the order; there may be no file
                os.utime(self._path(key))
        return kept

    def keep(self, kept: KeptPrefix) -> None:
        """Keep a prefix in memory, if it is not larger than the whole budget."""
        with self._lock:
            if kept.num_bytes > self._memory_bytes or not self._is_there(kept.documents):
                return
            self._kept[kept.key] = kept
            self._kept.move_to_end(kept.key)
            used = sum(other.num_bytes for other in self._kept.values())
            while used > self._memory_bytes:
                used -= self._kept.popitem(last=False)[1].num_bytes

    def release(self, num_bytes: int) -> None:
        """Drop prefixes from memory until `num_bytes` are free or none is left."""
        with self._lock:
            while num_bytes > 0 and self._kept:
                num_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def save(self, kept: KeptPrefix) -> None:
        """Write a prefix to disk durably; where that fails, log it and keep none."""
        from safetensors import SafetensorError

        self._written.add(kept.key)
        if kept.num_bytes + _HEADER_BYTES > self._disk_bytes:
            return
        try:
            with self._locked():
                if self._path(kept.key).exists() or not self._is_there(kept.documents):
                    return
                self._make_room_on_disk(kept.num_bytes + _HEADER_BYTES)
                self._write(kept)
        except (OSError, SafetensorError) as error:
            logger.warning("document KV was not written: %s", error)

    def save_rest(self) -> None:
        """Write what memory holds and was never written: its question was abandoned."""
        with self._lock:
            rest = [kept for key, kept in self._kept.items() if key not in self._written]
        for kept in rest:
            self.save(kept)

    def shrink(self) -> None:
        """Delete the files used longest ago that the budget has no room for; with 0, all of them.

        The budget may have been lowered since they were written.
        """
        try:
            if self._folder.is_dir():
                with self._locked():
                    self._make_room_on_disk(0)
        except OSError as error:
            logger.warning("document KV beyond its budget was not deleted: %s", error)

    def forget(self, documents: set[str]) -> None:
        """Drop every prefix that holds one of these document versions, here and on disk."""
        with self._lock:
            for key in [k for k, kept in self._kept.items() if documents & set(kept.documents)]:
                del self._kept[key]
        if self._folder.is_dir():
            with self._locked():
                for path in self._files():
                    held = _documents_of(path)
                    if held is None or documents & set(held):
                        path.unlink(missing_ok=True)

    def strays(self, documents: set[str]) -> list[tuple[Path, str]]:
        """Return what has no business in the folder, and why; every checksum is compared.

        Args:
            documents: the versions that exist.
        """
        if not self._folder.is_dir():
            return []
        strays = []
        with self._locked():
            found = sorted(p for p in self._folder.iterdir() if p.name != _LOCK and p.is_file())
            for path in found:
                if not _NAME.fullmatch(path.name):
                    strays.append((path, "is not document KV, or was left half-written"))
                    continue
                try:
                    kept = _read_file(path, "cpu")
                except _damage() as error:
                    strays.append((path, f"is damaged: {error}"))
                else:
                    if set(kept.documents) - documents:
                        strays.append((path, "belongs to a document that is gone"))
        return strays

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _files(self) -> list[Path]:
        return [p for p in self._folder.glob("*.safetensors") if _NAME.fullmatch(p.name)]

    def _read(self, key: str, device: str) -> KeptPrefix | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            # Opening a file and mapping its tensors are two steps: nobody may delete it between.
            with self._locked(fcntl.LOCK_SH):
                begun = time.perf_counter()
                kept = _read_file(path, device)
                self._bytes_per_second = kept.num_bytes / (time.perf_counter() - begun)
            self._written.add(key)
            return kept
        except FileNotFoundError:
            return None
        except _damage() as error:
            logger.warning("document KV %s is damaged and was removed: %s", path.name, error)
            with suppress(OSError):
                path.unlink()
            return None

    def _write(self, kept: KeptPrefix) -> None:
        from safetensors.torch import save_file

        tensors = {
            f"{number}.{part}": tensor.cpu().contiguous()
            for number, layer in enumerate(kept.layers)
            for part, tensor in zip(("keys", "values"), layer, strict=True)
        }
        metadata = {
            "format": _FORMAT,
            "key": kept.key,
            "documents": json.dumps(kept.documents),
            "num_tokens": str(kept.num_tokens),
        }
        metadata["sha256"] = _checksum(metadata, tensors)
        temporary = self._folder / f"{kept.key}.tmp"
        try:
            save_file(tensors, temporary, metadata)
            _sync(temporary)
            temporary.replace(self._path(kept.key))
        finally:
            temporary.unlink(missing_ok=True)
        _sync(self._folder)

    def _make_room_on_disk(self, num_bytes: int) -> None:
        """Delete the files used longest ago until `num_bytes` more fit; called under the lock."""
        for path in self._folder.iterdir():
            # Nobody else is writing now: a crash left it, or it was never ours.
            if path.is_file() and path.name != _LOCK and not _NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)
        by_use = [(stat.st_mtime_ns, stat.st_size, p) for p in self._files() for stat in [p.stat()]]
        used = sum(size for _, size, _ in by_use)
        for _, size, path in sorted(by_use):
            if used + num_bytes <= self._disk_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size

    @contextmanager
    def _locked(self, operation: int = fcntl.LOCK_EX) -> Iterator[None]:
        """Hold the folder: many may read from it, one writes to it or deletes from it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, operation)
            yield


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if it is a view that keeps a larger one alive."""
    num_bytes = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == num_bytes else tensor.clone()


def _read_file(path: Path, device: str) -> KeptPrefix:
    """Return what a file holds; one of the errors of `_damage` if it is not what was written."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        # Copied: what lies in memory must not depend on the file, nor count as its page cache.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    expected = metadata.pop("sha256", "")
    if metadata.get("format") != _FORMAT or metadata.get("key") != path.stem:
        raise ValueError("it is another file than its name says")
    if _checksum(metadata, tensors) != expected:
        raise ValueError("its checksum is wrong")
    layers = tuple(
        (tensors[f"{number}.keys"].to(device), tensors[f"{number}.values"].to(device))
        for number in range(len(tensors) // 2)
    )
    documents = tuple(json.loads(metadata["documents"]))
    return KeptPrefix(path.stem, documents, int(metadata["num_tokens"]), layers)


def _documents_of(path: Path) -> tuple[str, ...] | None:
    """Return the document versions that a file says it holds; None if it cannot be read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return tuple(json.loads(file.metadata()["documents"]))
    except _damage():
        return None


def _damage() -> tuple[type[Exception], ...]:
    """Return what reading a file that is not ours, not whole or not right raises."""
    from safetensors import SafetensorError

    # torch raises RuntimeError where a file cannot be mapped.
    return (OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError)


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the metadata and of each tensor's name, shape, dtype and bytes."""
    import torch

    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
