"""The engine that runs a transformers model in this process, one request at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from rag.errors import UnsupportedModelError
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.device import free_device_bytes
from rag.lm.document_kv import DocumentKV, KeptPrefix, prefix_key, restore, snapshot
from rag.lm.engine import (
    DocumentPrefix,
    GenerationDone,
    GenerationStep,
    Message,
    PrefillProgress,
    ScoreRequest,
    TextPiece,
)
from rag.lm.forward import forward, prefill_chunks
from rag.lm.kv_bytes import kv_cache_bytes, measured_kv_bytes
from rag.lm.loading import open_model
from rag.lm.prefill_rate import PrefillClock
from rag.lm.spec import ModelSpec
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

# RoPE types whose frequencies follow the length of the prompt: cached keys would not fit another.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class LocalEngine:
    """A transformers model on this machine's CPU or GPU; implements `rag.lm.engine.Engine`.

    Tokenizer and spec are there at once; the weights are read when the first request needs them.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a causal model of transformers, or what loads it
        tokenizer: Any,  # noqa: ANN401 - transformers types it as a union of backends
        *,
        name: str,
        config: PreTrainedConfig | None = None,
        dtype_bytes: int | None = None,
        device_type: str = "cpu",
        calibrations: CalibrationStore | None = None,
        document_kv: DocumentKV | None = None,
        weights_id: str = "",
        kv_reserve_bytes: int = 0,
    ) -> None:
        """Wrap a model that is loaded, or one that a function will load.

        Args:
            model: a causal language model; or a function that returns one, given `config`.
            tokenizer: its tokenizer.
            name: what receipts call the model.
            config: the model's config; by default the model's own.
            dtype_bytes: bytes of one element of the weights; by default those of `config.dtype`.
            device_type: where the model will be loaded; one that is loaded says so itself.
            calibrations: where the prefill rate is remembered; by default each process measures.
            document_kv: where the caches of documents are kept; by default none is.
            weights_id: what tells these weights and their dtype from others of the same name.
            kv_reserve_bytes: device memory that no kept cache may take.

        Raises:
            UnsupportedModelError: if its cache cannot be predicted exactly.
        """
        self._load_model: Callable[[], Any] | None = None
        self._model: Any = None
        if config is None:
            self._model, config = model, model.config
            dtype_bytes = model.dtype.itemsize
        else:
            self._load_model = model
        self._name = name
        self._tokenizer = ChatTokenizer(tokenizer)
        self._spec = ModelSpec.from_config(config, dtype_bytes=dtype_bytes)
        if not self._spec.prefills_in_chunks:
            raise UnsupportedModelError(
                f"{name} of type {self._spec.model_type!r} answers differently when its prompt "
                "enters in pieces, as it does here",
                hint="choose another model; `fathom plan --model` computes its limits all the same",
            )
        self._device_type = device_type if self._model is None else str(self._model.device.type)
        self._prefill_clock = PrefillClock(
            self._spec,
            model_name=name,
            device_type=self._device_type,
            calibrations=calibrations,
        )
        self._document_kv = document_kv
        self._weights_id = weights_id
        self._kv_reserve_bytes = kv_reserve_bytes
        self._lock = Lock()

    @classmethod
    def load(
        cls,
        name: str,
        settings: Settings,
        *,
        calibrations: CalibrationStore | None = None,
        document_kv: DocumentKV | None = None,
    ) -> LocalEngine:
        """Return the engine of a model that has been fetched; its weights are not read yet.

        Args:
            name: a catalog name, a folder, a hub id in the local cache, or auto.
            settings: device, threads and the folder of fetched models.
            calibrations: where the prefill rate is remembered from one process to the next.
            document_kv: where the caches of documents are kept; by default none is.

        Raises:
            UnknownModelError: if nothing is called so.
            ModelFetchError: if it has not been fetched.
            UnsupportedModelError: if its cache cannot be predicted exactly.
            SettingsError: if the device is not there.
        """
        opened = open_model(name, settings)
        if settings.num_threads is not None:
            import torch

            torch.set_num_threads(settings.num_threads)
        return cls(
            opened.load,
            opened.tokenizer,
            name=opened.name,
            config=opened.config,
            dtype_bytes=opened.dtype.itemsize,
            device_type=opened.device.type,
            calibrations=calibrations,
            document_kv=document_kv,
            weights_id=opened.weights_id,
            kv_reserve_bytes=settings.kv_reserve_bytes,
        )

    @property
    def name(self) -> str:
        """The model's catalog name, folder or hub id, as the receipt shows it."""
        return self._name

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and limits."""
        return self._spec

    @property
    def tokenizer_id(self) -> str:
        """A fingerprint of the tokenizer: equal ids give equal token counts."""
        return self._tokenizer.id

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of `text` alone, without any template."""
        return self._tokenizer.count_tokens(text)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Return the token ids of the chat in the model's own template, ready for its reply."""
        return self._tokenizer.encode_chat(messages)

    def free_bytes(self) -> int:
        """Return the bytes of device memory that a request could have, once the weights are there.

        Caches kept for later questions count as free: `generate` drops them where room is short.
        """
        pending = 0 if self.is_loaded else self._spec.num_parameters * self._spec.dtype_bytes
        kept = self._document_kv.memory_used_bytes if self._document_kv else 0
        return max(0, self._unused_bytes() + kept - pending)

    def warm_up(self) -> None:
        """Read the weights now, so that the first request does not wait for them."""
        with self._lock:
            self._loaded_model()

    def predicted_prefill_seconds(self, num_tokens: int, *, cached_tokens: int = 0) -> float:
        """Return the seconds that prefilling `num_tokens` takes here, from a measured rate.

        The first `cached_tokens` of them are in a cache already. Where no rate is remembered for
        this model on this device, the first call loads the weights and times a few chunks.
        """
        if not self._prefill_clock.is_set:
            with self._lock:
                if not self._prefill_clock.is_set:
                    self._prefill_clock.measure(self._loaded_model())
        return self._prefill_clock.seconds(num_tokens, cached_tokens=cached_tokens)

    def cached_tokens(self, prompt_ids: list[int], prefix: DocumentPrefix | None) -> int:
        """Return how many of the prompt's first tokens need no prefill, because they are kept."""
        key = self._kept_as(prompt_ids, prefix)
        if key is None or self._document_kv is None or not self._document_kv.has(key):
            return 0
        return prefix.num_tokens if prefix else 0

    def load_seconds(self, prompt_ids: list[int], prefix: DocumentPrefix | None) -> float:
        """Return the seconds that reading what is kept from disk takes; 0 if it is in memory."""
        key = self._kept_as(prompt_ids, prefix)
        return self._document_kv.load_seconds(key) if key and self._document_kv else 0.0

    def generate(
        self,
        prompt_ids: list[int],
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[GenerationStep]:
        """Prefill the prompt, then decode greedily, yielding each step; GenerationDone is last.

        `stop` is looked at between prefill chunks and between tokens. Requests wait for each other;
        closing the iterator ends its request. The token that ends the answer counts as new, but is
        neither shown nor cached. The cache of a `prefix` that is kept is not computed again; one
        that is not is kept once it is whole, where there is room.

        Raises:
            ValueError: if the prompt is empty or `max_new_tokens` is not positive.
        """
        if not prompt_ids or max_new_tokens < 1:
            raise ValueError("generate needs a prompt and at least one new token")
        with self._lock:
            yield from self._generate(prompt_ids, max_new_tokens, stop, prefix)

    def _generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None,
    ) -> Iterator[GenerationStep]:
        model = self._loaded_model()
        cache = self._new_cache()
        most_bytes = kv_cache_bytes(self._spec, len(prompt_ids) + max_new_tokens)
        key = self._kept_as(prompt_ids, prefix)
        begun = time.perf_counter()
        reused = self._reuse(key, cache)
        load_seconds = time.perf_counter() - begun if reused else 0.0
        self._make_room(most_bytes)
        boundary = prefix.num_tokens if prefix and key and not reused else 0
        kept: KeptPrefix | None = None
        end_ids = self._tokenizer.end_ids(model)
        text = self._tokenizer.stream()
        prefill = decode = 0.0
        new_tokens = 0
        next_id: int | None = None

        for start, end in prefill_chunks(reused, boundary, len(prompt_ids)):
            if stop.is_set():
                break
            next_id, seconds = self._step(prompt_ids[start:end], cache)
            prefill += seconds
            if prefix and key and end == boundary:
                kept = self._keep(key, prefix, cache, most_bytes)
            yield PrefillProgress(end, len(prompt_ids))
        else:
            while next_id is not None:
                new_tokens += 1
                if next_id in end_ids:
                    break
                if piece := text.push(next_id):
                    yield TextPiece(piece)
                if new_tokens == max_new_tokens or stop.is_set():
                    break
                next_id, seconds = self._step([next_id], cache)
                decode += seconds
            if piece := text.flush():
                yield TextPiece(piece)

        if self._document_kv:
            if kept is not None:
                self._document_kv.save(kept)
            self._document_kv.save_rest()
        if cache.get_seq_length() >= len(prompt_ids):
            self._prefill_clock.observe(len(prompt_ids), prefill, cached_tokens=reused)
        ended = new_tokens > 0 and (next_id in end_ids or new_tokens == max_new_tokens)
        yield GenerationDone(
            prompt_tokens=len(prompt_ids),
            reused_tokens=reused,
            kv_tokens=cache.get_seq_length(),
            new_tokens=new_tokens,
            kv_bytes=measured_kv_bytes(cache),
            prefill_seconds=load_seconds + prefill,
            decode_seconds=decode,
            stopped=stop.is_set() and not ended,
        )

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> list[tuple[float, ...]] | None:
        """Return the log-likelihood, in nats, of each token of each request's continuation.

        What all prompts begin with is prefilled once, or taken from what is kept of `prefix`; the
        rest runs in padded batches. None is returned once `stop` is set, which is looked at
        between forward passes.
        """
        from rag.lm.scoring import score_tails, shared_tokens

        if not requests:
            return []
        with self._lock:
            model = self._loaded_model()
            cache = self._new_cache()
            shared = shared_tokens(requests)
            prompt_ids = list(requests[0].prompt_ids)
            longest = max(len(r.prompt_ids) + len(r.continuation_ids) for r in requests)
            most_bytes = 2 * kv_cache_bytes(self._spec, longest)  # one prefix, one row or more
            if prefix and prefix.num_tokens > shared:
                prefix = None
            key = self._kept_as(prompt_ids, prefix)
            reused = self._reuse(key, cache)
            self._make_room(most_bytes)
            boundary = prefix.num_tokens if prefix and key and not reused else 0
            for start, end in prefill_chunks(reused, boundary, shared):
                if stop.is_set():
                    return None
                self._step(prompt_ids[start:end], cache)
                if prefix and key and end == boundary:
                    kept = self._keep(key, prefix, cache, most_bytes)
                    if kept is not None and self._document_kv:
                        self._document_kv.save(kept)
            return score_tails(
                model,
                self._spec,
                requests,
                cache,
                shared=shared,
                free_bytes=max(0, self._unused_bytes() - self._kv_reserve_bytes),
                stop=stop,
            )

    def _kept_as(self, prompt_ids: list[int], prefix: DocumentPrefix | None) -> str | None:
        """Return the key of a prefix; None where it is not kept, or is no proper prefix."""
        if self._document_kv is None or prefix is None:
            return None
        if not 0 < prefix.num_tokens < len(prompt_ids):
            return None
        if any(reach.kind in _LENGTH_DEPENDENT_ROPE for reach in self._spec.positions):
            return None
        import transformers

        tokenizer = (self._tokenizer.id, self._tokenizer.template)
        model = (self._name, self._weights_id, self._device_type, *tokenizer)
        return prefix_key(f"{model} transformers {transformers.__version__}", prefix, prompt_ids)

    def _reuse(self, key: str | None, cache: Cache) -> int:
        """Fill a new cache with the kept prefix, if there is one; return its tokens."""
        if key is None or self._document_kv is None:
            return 0
        kept = self._document_kv.load(key, str(self._model.device))
        if kept is None:
            return 0
        restore(kept, cache)
        return kept.num_tokens

    def _make_room(self, num_bytes: int) -> None:
        """Drop kept caches, least recently used first, where a request would lack room.

        The one that this request continues may be dropped too: its tensors then live in this
        request's cache alone, each until the layer grows.
        """
        if self._document_kv:
            room = self._unused_bytes() - self._kv_reserve_bytes
            self._document_kv.release(num_bytes - room)

    def _keep(
        self, key: str, prefix: DocumentPrefix, cache: Cache, most_bytes: int
    ) -> KeptPrefix | None:
        """Keep what the cache holds at the end of the documents, if there is room beside it.

        The answer grows a second copy, `most_bytes` long, while the kept tensors stay.
        """
        if self._document_kv is None:
            return None
        if self._unused_bytes() - self._kv_reserve_bytes < most_bytes:
            return None
        layers = snapshot(cache, self._spec.model_type)
        if layers is None:
            return None
        kept = KeptPrefix(key, prefix.documents, prefix.num_tokens, layers)
        self._document_kv.keep(kept)
        return kept

    def _unused_bytes(self) -> int:
        return free_device_bytes(self._device_type)

    def _step(self, ids: list[int], cache: Cache) -> tuple[int, float]:
        """Put `ids` into the cache; return the likeliest next token and the seconds it took."""
        begun = time.perf_counter()
        logits = forward(self._model, [ids], cache)
        next_id = int(logits[0, -1].argmax())  # waits for the GPU
        return next_id, time.perf_counter() - begun

    def _loaded_model(self) -> Any:  # noqa: ANN401
        """Return the model, reading its weights on first use; call it with the lock held."""
        if self._model is None and self._load_model is not None:
            self._model = self._load_model()
        return self._model

    def _new_cache(self) -> Cache:
        from rag.lm.native_cache import native_cache

        return native_cache(self._model.config)
