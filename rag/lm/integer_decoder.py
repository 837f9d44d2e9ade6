"""Answers written with the weights that the model's file holds, in float32, on a CPU.

A prompt is read in bfloat16, which multiplies many tokens fastest. A written token is bound by the
bytes of the weights instead: as whole numbers they are half or a quarter of those in bfloat16, and
none is rounded. So an answer is begun from the cache of its prompt, and written by a graph of its
own (`rag.lm.openvino_step`). Its words are those of the same weights computed plainly in float32.

Several tokens are read in one pass where the answer copies (`rag.lm.prompt_lookup`). A pass of four
adds up in another order than four of one: where the two likeliest tokens are nearer than that could
matter, the choice is made again by a pass of one.

Source: docs/decisions/0034.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import Cache

from rag.lm.forward import allocated
from rag.lm.integer_weights import load_integers
from rag.lm.kv_bytes import measured_row_bytes
from rag.lm.native_cache import GrowingLayer
from rag.lm.openvino_step import Heads, StepGraph
from rag.lm.prompt_lookup import ModelPasses

logger = logging.getLogger(__name__)

# More tokens than this a pass and OpenVINO decodes the weights anew for each.
_LENGTHS = (4,)
# Of the largest logit: passes of one and of four differed by up to 2e-4 of it.
_CLOSE = 2e-3
# For fewer tokens the cache is not copied.
_FEWEST_TOKENS = 8
_NO_ROOM = "no room for the cache in float32, so with the stored weights"
# Copied, a cache takes float32, and has room for as many tokens again.
_COPY_BYTES_PER_ELEMENT = 8


class IntegerModel:
    """What writes with a model's whole numbers; compiled when it first does."""

    def __init__(self, model: Any, path: Path) -> None:  # noqa: ANN401 - of transformers
        """Take a model of `rag.lm.lean_forward.LEAN_FAMILIES` and the file beside it."""
        decoder = model.get_decoder()
        attention = decoder.layers[0].self_attn
        keys = model.config.get_text_config(decoder=True).num_key_value_heads
        self._heads = Heads(
            queries=int(keys) * int(attention.num_key_value_groups),
            keys=int(keys),
            width=int(attention.head_dim),
            epsilon=float(decoder.norm.variance_epsilon),
        )
        self._path = path
        self._rotary = decoder.rotary_emb
        self._graph: StepGraph | None = None
        self._threads = 0

    def graph(self) -> StepGraph:
        """Return the graph, compiled for the threads that torch has.

        Raises:
            RuntimeError: if OpenVINO cannot compile it.
            BrokenModelError: if the file is damaged.
        """
        threads = torch.get_num_threads()
        if self._graph is None or self._threads != threads:
            self._graph = None  # two at once would be twice the memory
            self._graph = StepGraph(load_integers(self._path), self._heads, num_threads=threads)
            self._threads = threads
        return self._graph

    def angles(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines of some positions, float32 [positions, width]."""
        with torch.inference_mode():
            like = torch.empty(1, dtype=torch.float32)
            cos, sin = self._rotary(like, position_ids=torch.arange(begin, end)[None])
        return cos[0].numpy(), sin[0].numpy()


_MODELS: WeakKeyDictionary[Any, IntegerModel] = WeakKeyDictionary()


def use_integers(model: Any, path: Path) -> None:  # noqa: ANN401
    """Let a model's answers be written with the whole numbers of a file.

    Args:
        model: one that `rag.lm.lean_forward.use_lean_forward` took.
        path: what `integers_file` gave.
    """
    _MODELS[model] = IntegerModel(model, path)


def has_integers(model: Any) -> bool:  # noqa: ANN401
    """Say whether a model's answers can be written so; compile what writes them."""
    own = _MODELS.get(model)
    if own is None:
        return False
    try:
        own.graph()
    except RuntimeError as error:
        logger.warning("answers are written with the stored weights: %s", error)
        del _MODELS[model]
        return False
    return True


class IntegerDecoder:
    """Writes on from one prefilled prompt: the passes that `PromptLookup` asks for."""

    lengths = _LENGTHS

    def __init__(self, model: Any, cache: Cache) -> None:  # noqa: ANN401
        """Copy the cache to where it is written on.

        Args:
            model: for which `has_integers` holds.
            cache: of the prompt; it is not changed.
        """
        self._model = _MODELS[model]
        self._graph = self._model.graph()
        self._tokens = cache.get_seq_length()
        self._token_bytes = measured_row_bytes(cache, 0) / self._tokens
        layers: Any = cache.layers

        def held(kind: str, layer: int) -> np.ndarray:
            states: np.ndarray = getattr(layers[layer], kind).float().contiguous().numpy()
            return states

        allocated(
            lambda: self._graph.begin(held), f"where a cache of {self._tokens:,} tokens was copied"
        )
        # What is added to the score of each slot: some hold tokens that were taken back.
        self._hidden = np.zeros(self._tokens, np.float32)

    def held(self) -> tuple[int, int]:
        """See `rag.lm.prompt_lookup.Passes`."""
        return self._tokens, round(self._token_bytes * self._tokens)

    def read(self, ids: list[int]) -> list[int]:
        """See `rag.lm.prompt_lookup.Passes`."""
        logits = self.logits(ids)
        found: list[int] = logits.argmax(-1).tolist()
        if len(ids) > 1:
            best, second = -np.partition(-logits, 1, axis=-1)[:, :2].T
            is_close = best - second < _CLOSE * np.abs(logits).max()
            if is_close.any():
                place = int(is_close.argmax())
                self.crop(len(ids) - place)
                return [*found[:place], int(self.logits([ids[place]])[0].argmax())]
        return found

    def crop(self, num_tokens: int) -> None:
        """Hide the last tokens of the text; their slots stay."""
        shown = np.flatnonzero(self._hidden == 0)
        self._hidden[shown[len(shown) - num_tokens :]] = -np.inf
        self._tokens -= num_tokens

    def are_exact(self) -> bool:
        """See `rag.lm.prompt_lookup.Passes`: what is close is chosen by a pass of one."""
        return True

    def close(self) -> None:
        """Let go of the cache."""
        self._graph.end()

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return logits [tokens, vocabulary] of tokens, which enter the cache."""
        own = np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)
        before = np.broadcast_to(self._hidden, (len(ids), len(self._hidden)))
        cos, sin = self._model.angles(self._tokens, self._tokens + len(ids))
        found = allocated(
            lambda: self._graph.logits(ids, cos, sin, np.concatenate([before, own], axis=1)),
            f"with {self._tokens:,} tokens in the cache, at the next {len(ids)}",
        )
        self._hidden = np.append(self._hidden, np.zeros(len(ids), np.float32))
        self._tokens += len(ids)
        return found


class AnswerPasses:
    """The passes of one answer, by an `IntegerDecoder` where there can be one.

    That is seen when the second token is wanted: whoever waits for the first does not wait for what
    writes the others. `refused` says why there is none, where it is for want of memory.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        cache: Any,  # noqa: ANN401
        *,
        max_new_tokens: int,
        free_bytes: int,
    ) -> None:
        """Begin behind a prompt.

        Args:
            model: ready to run.
            cache: of the prompt; it is empty once it has been copied.
            max_new_tokens: the longest answer.
            free_bytes: of memory; where a copy of the cache does not fit, there is none.
        """
        self._model, self._cache = model, cache
        is_plain = all(type(layer) is GrowingLayer for layer in cache.layers)
        elements = measured_row_bytes(cache, 0) // model.dtype.itemsize if is_plain else 0
        fits = elements * _COPY_BYTES_PER_ELEMENT <= free_bytes
        could = is_plain and max_new_tokens >= _FEWEST_TOKENS and model in _MODELS
        self._wants_integers = could and fits
        self.refused = _NO_ROOM if could and not fits else ""
        self._passes: ModelPasses | IntegerDecoder = ModelPasses(model, cache)

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `Passes`."""
        return self._chosen().lengths

    @property
    def has_integers(self) -> bool:
        """Whether what was written so far, the first token aside, was written so."""
        return isinstance(self._passes, IntegerDecoder)

    def read(self, ids: list[int]) -> list[int]:
        """See `Passes`."""
        return self._chosen().read(ids)

    def crop(self, num_tokens: int) -> None:
        """See `Passes`."""
        self._passes.crop(num_tokens)

    def are_exact(self) -> bool:
        """See `Passes`."""
        return self._passes.are_exact()

    def held(self) -> tuple[int, int]:
        """See `Passes`."""
        return self._passes.held()

    def close(self) -> None:
        """Let go of what a decoder has copied."""
        if isinstance(self._passes, IntegerDecoder):
            self._passes.close()

    def _chosen(self) -> ModelPasses | IntegerDecoder:
        if self._wants_integers:
            self._wants_integers = False
            if has_integers(self._model):
                self._passes = IntegerDecoder(self._model, self._cache)
                self._cache.layers.clear()  # what is kept of a document has layers of its own
        return self._passes
