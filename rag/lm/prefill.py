"""A prompt enters a cache: in chunks that can be stopped, past whatever of it is kept already."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any

from rag.errors import OutOfMemoryError
from rag.lm.device import free_device_bytes
from rag.lm.document_kv import DocumentKV, KeptPrefix, prefix_key, restore, snapshot
from rag.lm.eight_bit_cache import new_cache
from rag.lm.engine import DocumentPrefix
from rag.lm.forward import PassStoppedError, forward, prefill_chunks
from rag.lm.kv_bytes import kv_cache_bytes, read_copy_bytes
from rag.lm.native_cache import branch
from rag.lm.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import Cache

# RoPE types whose frequencies follow the length of the prompt: cached keys would not fit another.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(slots=True)
class Prefilled:
    """How far one prompt has come: the first `num_tokens` of it are in `cache`.

    `reused_tokens` of them were not computed for it, but fetched in `load_seconds`; the rest took
    `seconds`. `next_id` is the likeliest token after them, None as long as nothing was computed.
    Where a stop came within a chunk, the cache is dropped: it is empty, and `num_tokens` is 0.
    """

    cache: Cache
    num_tokens: int
    reused_tokens: int
    seconds: float = 0.0
    load_seconds: float = 0.0
    next_id: int | None = None


class Prefill:
    """Prefills the prompts of one engine, sharing what they begin with.

    What is kept of documents, and for how long, is the business of `DocumentKV`; here it is looked
    up before a prompt is computed and handed over once its documents are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        model_id: str,
        device_type: str,
        document_kv: DocumentKV | None,
        reserve_bytes: int,
    ) -> None:
        """Take what does not change from prompt to prompt.

        Args:
            spec: of the model.
            model_id: tells the model, its weights, dtype and tokenizer from all others.
            device_type: cpu or cuda.
            document_kv: where the caches of documents are kept; None keeps none.
            reserve_bytes: device memory that no cache may take.
        """
        self.spec = spec
        self._model_id = model_id
        self._device_type = device_type
        self._document_kv = document_kv
        self._reserve_bytes = reserve_bytes
        self._unsaved: KeptPrefix | None = None

    def free_bytes(self) -> int:
        """Return the device memory that is free; caches kept for later count, they make room."""
        kept = self._document_kv.memory_used_bytes if self._document_kv else 0
        return self._unused_bytes() + kept

    def usable_bytes(self) -> int:
        """Return what of the free memory a cache may take: all but the reserve."""
        return max(0, self.free_bytes() - self._reserve_bytes)

    def cached_tokens(self, prompt_ids: Sequence[int], prefix: DocumentPrefix | None) -> int:
        """Return how many of the prompt's first tokens are kept."""
        key = self._key(prompt_ids, prefix)
        if key is None or self._document_kv is None or not self._document_kv.has(key):
            return 0
        return prefix.num_tokens if prefix else 0

    def load_seconds(self, prompt_ids: Sequence[int], prefix: DocumentPrefix | None) -> float:
        """Return the seconds that reading what is kept from disk takes; 0 if it is in memory."""
        key = self._key(prompt_ids, prefix)
        return self._document_kv.load_seconds(key) if key and self._document_kv else 0.0

    def release(self, num_bytes: int) -> None:
        """Drop kept caches, least recently used first, until `num_bytes` are free or none is left.

        The one that a prompt goes on from may be dropped too: its tensors then live in that
        prompt's cache alone, each until the layer grows.
        """
        if self._document_kv:
            self._document_kv.release(num_bytes - (self._unused_bytes() - self._reserve_bytes))

    def read(
        self,
        model: Any,  # noqa: ANN401 - a causal model of transformers
        prompts: Sequence[Sequence[int]],
        *,
        most_bytes: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[tuple[int, Prefilled]]:
        """Prefill several prompts one after the other, each into a cache of its own.

        A `prefix` that they share is computed for the first of them at most. It is kept in memory
        once it is whole, where there is room, and on disk with `save`.

        Args:
            model: ready to run.
            prompts: token ids; one that should end before its last tokens is given without them.
            most_bytes: what all caches will take together before the request is over.
            stop: looked at before each layer; prompts that were not begun are not yielded then.
            prefix: what the prompts begin with.

        Yields:
            The prompt's number and its state, at its start and after each of its chunks. The state
            of a prompt is one object that goes on changing.

        Raises:
            OutOfMemoryError: if the memory does not hold the next chunk.
        """
        boundary = prefix.num_tokens if prefix else 0
        if any(tuple(p[:boundary]) != tuple(prompts[0][:boundary]) for p in prompts):
            boundary, prefix = 0, None
        key = self._key(prompts[0], prefix)
        first = new_cache(model, self.spec)
        begun = time.perf_counter()
        reused = self._reuse(key, first, model)
        load_seconds = time.perf_counter() - begun if reused else 0.0
        self.release(most_bytes)  # only now: what is reused may be what goes
        is_shared = len(prompts) > 1 and boundary > 0
        base = branch(first, 1) if is_shared and reused else None
        for number, ids in enumerate(prompts):
            if stop.is_set():
                break
            if number == 0:
                state = Prefilled(first, reused, reused, load_seconds=load_seconds)
            elif base is not None:
                state = Prefilled(branch(base, 1), boundary, boundary)
            else:
                state = Prefilled(new_cache(model, self.spec), 0, 0)
            yield number, state
            for start, end in prefill_chunks(
                state.num_tokens, boundary, len(ids), self.spec.chunk_tokens
            ):
                if stop.is_set():
                    break
                self._check_room(start, end)
                begun = time.perf_counter()
                try:
                    logits = forward(model, [ids[start:end]], state.cache, stop=stop)
                except PassStoppedError:
                    state.cache, state.num_tokens = new_cache(model, self.spec), 0
                    state.seconds += time.perf_counter() - begun
                    break
                state.next_id = int(logits[0, -1].argmax())  # waits for the GPU
                state.seconds += time.perf_counter() - begun
                state.num_tokens = end
                if end == boundary and not state.reused_tokens:
                    if prefix and key:
                        self._keep(key, prefix, state.cache, most_bytes)
                    if is_shared:
                        base = branch(state.cache, 1)
                yield number, state

    def save(self) -> None:
        """Write to disk what was kept since the last time; an answer should not wait for that."""
        if self._document_kv:
            if self._unsaved is not None:  # the memory may have no room for it
                self._document_kv.save(self._unsaved)
            self._document_kv.save_rest()
        self._unsaved = None

    def _check_room(self, start: int, end: int) -> None:
        """Refuse a chunk that the memory does not hold, before the kernel ends the process for it.

        A layer that grows stands in memory twice for a moment, and a quantised one is copied to be
        read.
        """
        after = kv_cache_bytes(self.spec, end)
        needed = after - kv_cache_bytes(self.spec, start) + after // self.spec.num_layers
        needed += max(read_copy_bytes(self.spec, layer, end) for layer in self.spec.layers)
        free = self._unused_bytes()
        if needed > free:
            raise OutOfMemoryError(
                f"memory ran out after {start:,} tokens of the prompt: the next {end - start:,}"
                f" take {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free"
            )

    def _key(self, prompt_ids: Sequence[int], prefix: DocumentPrefix | None) -> str | None:
        """Return the key of a prefix; None where it is not kept, or is not all in the prompt."""
        if self._document_kv is None or prefix is None:
            return None
        if not 0 < prefix.num_tokens <= len(prompt_ids):
            return None
        if any(reach.kind in _LENGTH_DEPENDENT_ROPE for reach in self.spec.positions):
            return None
        model = f"{self._model_id} cache in {self.spec.kv_dtype}" if self.spec.kv_dtype else ""
        return prefix_key(model or self._model_id, prefix, list(prompt_ids))

    def _reuse(self, key: str | None, cache: Cache, model: Any) -> int:  # noqa: ANN401
        """Fill a new cache with the kept prefix, if there is one; return its tokens."""
        if key is None or self._document_kv is None:
            return 0
        kept = self._document_kv.load(key, str(model.device))
        if kept is None:
            return 0
        restore(kept, cache)
        return kept.num_tokens

    def _keep(self, key: str, prefix: DocumentPrefix, cache: Cache, most_bytes: int) -> None:
        """Keep what the cache holds at the end of the documents, if there is room beside it.

        The answer grows a second copy, `most_bytes` long, while the kept tensors stay.
        """
        if self._document_kv is None or self._unused_bytes() - self._reserve_bytes < most_bytes:
            return
        layers = snapshot(cache, self.spec.model_type)
        if layers is not None:
            kept = KeptPrefix(key, prefix.documents, prefix.num_tokens, layers)
            self._document_kv.keep(kept)
            self._unsaved = kept

    def _unused_bytes(self) -> int:
        return free_device_bytes(self._device_type)
