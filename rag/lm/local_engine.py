"""The engine that runs a transformers model in this process, one request at a time.

What it does with the model stands elsewhere: `prefill` (a prompt into a cache), `generation` (the
answer), `scoring` (likelihoods). Here are the parts put together, and the lock.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from rag.errors import ModelError, OutOfMemoryError, UnsupportedModelError
from rag.lm.batch_generation import BatchGeneration
from rag.lm.chat_tokenizer import ChatTokenizer
from rag.lm.document_kv import DocumentKV
from rag.lm.engine import (
    DocumentPrefix,
    GenerationStep,
    Message,
    Prompt,
    ScoreRequest,
    Scores,
    name_with_cache,
)
from rag.lm.forward import PassStoppedError, is_allocation_failure
from rag.lm.integer_decoder import has_integers
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.loading import Weights, open_model
from rag.lm.positions import position_limit
from rag.lm.prefill import Prefill
from rag.lm.prefill_rate import PrefillClock
from rag.lm.scoring import Scorer
from rag.lm.spec import ModelSpec
from rag.lm.spec_memory import remembered_spec
from rag.lm.strides import read_once, read_strides, take_apart
from rag.settings import Settings
from rag.store.calibrations import CalibrationStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rag.lm.windowed_attention import WindowedModel

logger = logging.getLogger(__name__)


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
        extra_weights_bytes: int = 0,
        decodes_statically: bool = False,
        hasten: Callable[[Any], None] | None = None,
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
            extra_weights_bytes: what the function will load beside the model's own weights.
            decodes_statically: answers are written by a `rag.lm.static_decode` where the model can
                be: sooner on a GPU, not on a CPU.
            hasten: makes the loaded model faster before it writes, see `rag.lm.loading.Weights`.

        Raises:
            UnsupportedModelError: if its cache cannot be predicted exactly.
        """
        load: Callable[[], Any] | None = None
        if config is None:
            config = model.config
            dtype_bytes, device_type = model.dtype.itemsize, str(model.device.type)
        else:
            model, load = None, model
        self._name = name
        self._weights_id = weights_id
        self._tokenizer = ChatTokenizer(tokenizer)
        spec = remembered_spec(config, dtype_bytes=dtype_bytes, calibrations=calibrations)
        self._spec = spec.on_device(device_type)
        if not self._spec.prefills_in_chunks:
            raise UnsupportedModelError(
                f"{name} of type {self._spec.model_type!r} answers differently when its prompt "
                "enters in pieces, as it does here",
                hint="choose another model; `fathom plan --model` computes its limits all the same",
            )
        self._weights_bytes = self._spec.weights_bytes + extra_weights_bytes
        self._weights = Weights(
            name, num_bytes=self._weights_bytes, model=model, load=load, hasten=hasten
        )
        self._prefill_clock = PrefillClock(
            self._spec,
            model_name=name,
            device_type=device_type,
            calibrations=calibrations,
        )
        self._new_prefill = partial(
            Prefill,
            model_id=_identity(name, weights_id, self._spec, self._tokenizer),
            device_type=device_type,
            document_kv=document_kv,
            reserve_bytes=kv_reserve_bytes,
        )
        self._prefill = self._new_prefill(self._spec)
        self._decodes_statically = decodes_statically
        self._windowed: WindowedModel | None = None
        self._scorer = Scorer(self._prefill)
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
            extra_weights_bytes=opened.extra_bytes,
            decodes_statically=settings.cuda_graphs and opened.device.type == "cuda",
            hasten=opened.hasten,
        )

    @property
    def name(self) -> str:
        """The model's catalog name, folder or hub id; and its cache, if it is quantised."""
        return self._name

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and limits."""
        return self._spec

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of prompt and answer together whose positions exist."""
        return position_limit(self._spec)

    @property
    def can_score(self) -> bool:
        """Whether `score` works."""
        return True

    @property
    def model_id(self) -> str:
        """A fingerprint of what decides an answer: weights, dtype, cache, tokenizer, template."""
        tokenizer = self._tokenizer
        parts: tuple[str, ...] = (
            self._weights_id or self._name,
            tokenizer.id,
            tokenizer.template,
        )
        if self._spec.kv_dtype:
            parts = (*parts, self._spec.kv_dtype)
        return hashlib.sha256(str(parts).encode()).hexdigest()[:16]

    @cached_property
    def quantised(self) -> LocalEngine | None:
        """This engine with its cache in 8 bits; None where `ModelSpec.quantised` is.

        Weights, tokenizer, lock, prefill rate and kept documents are shared, each of the latter in
        the format that it was read in. It answers otherwise than this one: see `model_id`.
        """
        spec = self._spec.quantised
        if spec is None:
            return None
        engine = copy.copy(self)
        engine._name = name_with_cache(self._name, str(spec.kv_dtype))
        engine._spec = spec
        engine._prefill = self._new_prefill(spec)
        engine._scorer = Scorer(engine._prefill)
        return engine

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

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` alone, without any template or special token."""
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: list[Message]) -> Prompt:
        """Return the chat in the model's own template, ready for its reply."""
        ids = tuple(self._tokenizer.encode_chat(messages))
        return Prompt(tuple(messages), len(ids), ids)

    def free_bytes(self) -> int:
        """Return the bytes of device memory that a request could have, once the weights are there.

        Caches kept for later questions count as free: `generate` drops them where room is short.
        """
        pending = 0 if self.is_loaded else self._weights_bytes
        return max(0, self._prefill.free_bytes() - pending)

    def warm_up(self) -> None:
        """Read the weights now, and compile what writes, so that no request waits for them."""
        with self._lock:
            has_integers(self._loaded_model())

    def forget(self) -> None:
        """Drop the prompt that `score` holds for the next call: it may quote a deleted document."""
        self._scorer.forget()
        if self.quantised is not None:
            self.quantised.forget()

    def predicted_prefill_seconds(self, num_tokens: int, *, cached_tokens: int = 0) -> float | None:
        """Return the seconds that prefilling `num_tokens` takes here, from a measured rate.

        The first `cached_tokens` of them are in a cache already. Where no rate is remembered for
        this model on this device, the first call loads the weights and times a few chunks. None
        where there is no memory even for that: whether a prompt fits is for another gate to say.
        """
        if not self._prefill_clock.is_set:
            with self._lock:
                if not self._prefill_clock.is_set and not self._measure_rate():
                    return None
        return self._prefill_clock.seconds(num_tokens, cached_tokens=cached_tokens)

    def cached_tokens(self, prompt: Prompt, prefix: DocumentPrefix | None) -> int:
        """Return how many of the prompt's first tokens need no prefill, because they are kept."""
        return self._prefill.cached_tokens(prompt.ids, prefix)

    def load_seconds(self, prompt: Prompt, prefix: DocumentPrefix | None) -> float:
        """Return the seconds that reading what is kept from disk takes; 0 if it is in memory."""
        return self._prefill.load_seconds(prompt.ids, prefix)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[GenerationStep]:
        """Prefill the prompt, then decode greedily, yielding each step; GenerationDone is last.

        See `generate_many`, which does the same with one prompt.
        """
        steps = self.generate_many(
            [prompt], max_new_tokens=max_new_tokens, stop=stop, prefix=prefix
        )
        for _, step in steps:
            yield step

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Answer several prompts, as many in step as the memory holds; yield each one's steps.

        `stop` is looked at between the layers of a prefill, and between tokens. Requests wait for
        each other; closing the iterator ends its request. The token that ends an answer counts as
        new, but is neither shown nor cached. The cache of a `prefix` that is kept is not computed
        again; one that is not is kept once it is whole, where there is room, and the prompts that
        begin with it share it in any case.

        Yields:
            The number of a prompt and a step of it, its GenerationDone last.

        Raises:
            ValueError: if a prompt is empty or `max_new_tokens` is not positive.
            ModelError: if a prompt and its answer are longer than the model's positions.
            OutOfMemoryError: if memory runs out; every prompt not yet done is lost.
        """
        if not all(prompt.ids for prompt in prompts) or max_new_tokens < 1:
            raise ValueError("generate needs a prompt and at least one new token")
        limit = self.context_tokens
        longest = max((prompt.num_tokens for prompt in prompts), default=0)
        if limit is not None and longest + max_new_tokens > limit:
            raise ModelError(
                f"{longest:,} prompt tokens and {max_new_tokens:,} new ones do not fit the"
                f" {limit:,} positions of {self._name}",
                hint="shorten the prompt, or lower FATHOM_MAX_NEW_TOKENS",
            )
        if prefix and any(prefix.num_tokens >= len(prompt.ids) for prompt in prompts):
            prefix = None  # of each prompt something is left to compute
        with self._lock:
            batch = BatchGeneration(
                self._loaded_model(),
                self._prefill,
                self._tokenizer,
                self._prefill_clock,
                max_new_tokens=max_new_tokens,
                stop=stop,
                decodes_statically=self._decodes_statically,
            )
            yield from batch.answer(prompts, prefix)
            if not stop.is_set():  # who stops does not wait for the disk
                self._prefill.save()

    def generate_in_strides(
        self,
        prompts: Sequence[Prompt],
        frames: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Event,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Reply to prompts that differ in their middle alone, which is read as one running text.

        See `rag.lm.strides`. The window is proven on the model itself before it is first used.

        Raises:
            UnsupportedModelError: if no window can be fitted to the model exactly.
            OutOfMemoryError: if memory runs out.
        """
        strides = take_apart([p.ids for p in prompts], [p.ids for p in frames])
        held = len(strides.front) + strides.window(max_new_tokens)
        yield from self._through_window(
            held,
            lambda checked, end_ids: read_strides(
                checked,
                strides,
                end_ids=end_ids,
                new_stream=self._tokenizer.stream,
                max_new_tokens=max_new_tokens,
                stop=stop,
            ),
        )

    def generate_windowed(
        self,
        prompts: Sequence[Prompt],
        prefix: DocumentPrefix,
        *,
        num_sinks: int,
        window: int,
        max_new_tokens: int,
        stop: Event,
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Answer prompts that begin with `prefix`, which is read once through a sliding window.

        See `rag.lm.strides.read_once`: what left the window is gone.

        Raises:
            UnsupportedModelError: if no window can be fitted to the model exactly.
            OutOfMemoryError: if memory runs out.
        """
        shared = prefix.num_tokens
        yield from self._through_window(
            num_sinks + window,
            lambda checked, end_ids: read_once(
                checked,
                prompts[0].ids[:shared],
                [prompt.ids[shared:] for prompt in prompts],
                num_sinks=num_sinks,
                window=window,
                end_ids=end_ids,
                new_stream=self._tokenizer.stream,
                max_new_tokens=max_new_tokens,
                stop=stop,
            ),
        )

    def _through_window(
        self,
        held_tokens: int,
        read: Callable[[WindowedModel, frozenset[int]], Iterator[tuple[int, GenerationStep]]],
    ) -> Iterator[tuple[int, GenerationStep]]:
        """Read with the model once a window is proven exact on it; `held_tokens` are cached."""
        from rag.lm.windowed_attention import check_windowed

        with self._lock:
            model = self._loaded_model()
            self._prefill.release(2 * kv_cache_bytes(self._spec, held_tokens))
            try:
                if self._windowed is None:
                    self._windowed = check_windowed(model)
                yield from read(self._windowed, self._tokenizer.end_ids(model))
                return
            except PassStoppedError:
                return  # what was being read is dropped with its session
            except (RuntimeError, MemoryError) as error:
                if not is_allocation_failure(error):
                    raise
        # Raised here, where the error that holds the pass's tensors is gone.
        raise OutOfMemoryError(f"memory ran out while a window of {held_tokens:,} tokens was read")

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        stop: Event,
        prefix: DocumentPrefix | None = None,
    ) -> Scores | None:
        """Return the log-likelihood, in nats, of each token of each request's continuation.

        What all prompts begin with is prefilled once, or taken from what is kept of `prefix`; the
        rest runs in padded batches. None is returned once `stop` is set, which is looked at
        between the layers of a forward pass.

        Raises:
            OutOfMemoryError: if memory runs out.
        """
        if not requests:
            return Scores(())
        with self._lock:
            model = self._loaded_model(for_short=True)
            return self._scorer.score(model, requests, stop=stop, prefix=prefix)

    def _measure_rate(self) -> bool:
        model = self._loaded_model()
        try:
            self._prefill_clock.measure(model)
        except (RuntimeError, MemoryError, OutOfMemoryError) as error:
            if not is_allocation_failure(error):
                raise
            logger.warning("memory ran out while the rate of a prefill was measured")
            return False
        return True

    @property
    def _model(self) -> Any:  # noqa: ANN401
        """The model, None as long as its weights are not read."""
        return self._weights.model

    def _loaded_model(self, *, for_short: bool = False) -> Any:  # noqa: ANN401
        """Return the model, reading its weights on first use; call it with the lock held."""
        return self._weights.loaded(for_short=for_short)


def _identity(name: str, weights_id: str, spec: ModelSpec, tokenizer: ChatTokenizer) -> str:
    """Return what must be equal for a kept cache to be this model's: code and kernels, too."""
    import transformers

    masks = sum(not layer.maskless for layer in spec.layers)
    parts = (name, weights_id, spec.device_type, masks, tokenizer.id, tokenizer.template)
    return f"{parts} transformers {transformers.__version__}"
