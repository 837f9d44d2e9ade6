"""Several tokens of an answer in one pass, where it copies: drafts that are kept only if right.

An answer about a document says again what the document said. Where its last three tokens, or as
long as drafts are of use its last two, stood before, what followed them there is a draft. One pass
reads the newest token and the draft; as far as the draft is what the model chooses itself, each
token of it is a pass saved, and the first that is not is taken from the model. What was read in
vain leaves the cache. A pass of a few tokens costs little more than one of one, as it reads the
same weights.

The text is the one without drafts, for the logits of each token are those that it has alone, bit
for bit: that is tried before the first draft of a process, and there are none where it does not
hold.

Source: Saxena, Prompt Lookup Decoding, 2023; docs/decisions/0034.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rag.lm.forward import allocated, forward
from rag.lm.kv_bytes import measured_row_bytes
from rag.lm.lean_forward import LeanPass, lean_pass
from rag.lm.native_cache import GrowingLayer
from rag.lm.row_check import check_rows

logger = logging.getLogger(__name__)

NO_DRAFTS = "no drafts: products of several tokens round otherwise here"

# Tokens of a pass, the newest included: more after each draft that was right to its end.
_LENGTHS = (4, 8, 16)
# After drafts that were of no use, in a row, so many tokens are written without one at most.
_LONGEST_PAUSE = 8

# Of each model's lean pass: the threads it was tried with, and whether it holds.
_TRIED: WeakKeyDictionary[LeanPass, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def without_drafts(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let a model write token by token meanwhile: the plain twin, for comparisons."""
    lean = lean_pass(model)
    tried = _TRIED.get(lean) if lean else None
    if lean:
        _TRIED[lean] = torch.get_num_threads(), False
    try:
        yield
    finally:
        if lean:
            _TRIED.pop(lean)
        if lean and tried:
            _TRIED[lean] = tried


class Passes(Protocol):
    """What reads tokens behind a text: they enter its cache."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a pass that pays, the newest included; empty where no pass of several does."""

    def read(self, ids: list[int]) -> list[int]:
        """Return the likeliest token after each of `ids`; fewer where one is not certain.

        Those behind the last one returned have not entered then.
        """

    def crop(self, num_tokens: int) -> None:
        """Remove the last tokens."""

    def are_exact(self) -> bool:
        """Say whether a pass of several tokens chooses as passes of one do."""

    def held(self) -> tuple[int, int]:
        """Return the tokens in the cache, and their logical bytes."""


class ModelPasses:
    """Passes of a model of transformers into its cache."""

    def __init__(self, model: Any, cache: Any) -> None:  # noqa: ANN401
        """Take a model ready to run; without a lean pass every pass is of one token."""
        self._model, self._cache = model, cache
        self._lean = lean_pass(model)

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `Passes`."""
        is_plain = all(type(layer) is GrowingLayer for layer in self._cache.layers)
        return _LENGTHS if self._lean is not None and is_plain else ()

    def read(self, ids: list[int]) -> list[int]:
        """See `Passes`."""
        if len(ids) == 1:
            return [int(forward(self._model, [ids], self._cache)[0, -1].argmax())]
        lean = self._lean
        assert lean is not None

        def chosen() -> list[int]:
            with torch.inference_mode():
                found: list[int] = lean.logits([ids], self._cache)[0].argmax(-1).tolist()
            return found

        held = self._cache.get_seq_length()
        return allocated(chosen, f"with {held:,} tokens in the cache, at the next {len(ids)}")

    def crop(self, num_tokens: int) -> None:
        """See `Passes`."""
        if num_tokens:
            self._cache.crop(-num_tokens)

    def held(self) -> tuple[int, int]:
        """See `Passes`."""
        return self._cache.get_seq_length(), measured_row_bytes(self._cache, 0)

    def are_exact(self) -> bool:
        """See `Passes`; tried once a model and threads."""
        lean, threads = self._lean, torch.get_num_threads()
        assert lean is not None
        tried = _TRIED.get(lean)
        if tried is None or tried[0] != threads:
            tried = threads, check_rows(self._model, lean, _LENGTHS)
            _TRIED[lean] = tried
            if not tried[1]:
                logger.info(NO_DRAFTS)
        return tried[1]


class PromptLookup:
    """Writes one answer; what it reads ahead is in the cache until it is asked for.

    `drafted` tokens were read ahead so far, `accepted` of them were asked for. `refused` says that
    there was a draft, and that passes of several tokens are not exact here.
    """

    def __init__(self, passes: Passes, prompt_ids: Sequence[int]) -> None:
        """Begin behind a prompt.

        Args:
            passes: read tokens behind the prompt.
            prompt_ids: all its tokens.
        """
        self._passes = passes
        self._ids = np.array(prompt_ids)
        self._ahead: deque[int] = deque()
        self._length = 0  # of the next draft's pass, in the lengths of passes
        self._useless = 0
        self._pause = 0
        self.drafted = self.accepted = 0
        self.refused = False

    def next_id(self, newest: int, *, most: int) -> int:
        """Return the token that the model chooses after `newest`.

        Args:
            newest: the last token of the text, the last one returned if there was one.
            most: tokens that the answer may still get; no pass reads beyond them.
        """
        self._ids = np.append(self._ids, newest)
        if self._ahead:
            self.accepted += 1
            return self._ahead.popleft()
        draft = self._draft(most)
        chosen = self._passes.read([newest, *draft])
        right = 0
        while right < len(chosen) - 1 and draft[right] == chosen[right]:
            right += 1
        if draft:
            self._passes.crop(len(chosen) - 1 - right)
            self._learn(right, len(draft))
            self.drafted += len(draft)
        self._ahead.extend(chosen[1 : right + 1])
        return chosen[0]

    def take_back(self) -> None:
        """Remove from the cache what was read ahead and not asked for."""
        if self._ahead:
            self._passes.crop(len(self._ahead))
            self._ahead.clear()

    def _draft(self, most: int) -> list[int]:
        """Return what stood after the last tokens before, as many as the next pass takes."""
        lengths = self._passes.lengths
        if not lengths:
            return []
        if self._pause:
            self._pause -= 1
            return []
        begin = _place(self._ids, two=not self._useless)
        if begin is None:
            return []
        reach = min(lengths[self._length], most, len(self._ids) - begin + 1)
        length = max((length for length in lengths if length <= reach), default=0)
        if not length:
            return []
        if not self._passes.are_exact():
            self.refused = True
            return []
        draft: list[int] = self._ids[begin : begin + length - 1].tolist()
        return draft

    def _learn(self, right: int, drafted: int) -> None:
        """Draft more where drafts are right, and less often where they are not."""
        if right == drafted:
            self._length = min(self._length + 1, len(self._passes.lengths) - 1)
        else:
            self._length = 0
        self._useless = 0 if right else self._useless + 1
        self._pause = min(2**self._useless - 1, _LONGEST_PAUSE)


def _place(ids: np.ndarray, *, two: bool) -> int | None:
    """Return where the last three tokens stood before: after them, the latest place.

    Args:
        ids: the text so far.
        two: whether the last two will do where three were nowhere.
    """
    if len(ids) < 3:
        return None
    ends = np.flatnonzero((ids[:-2] == ids[-2]) & (ids[1:-1] == ids[-1])) + 2
    threes = ends[(ends > 2) & (ids[ends - 3] == ids[-3])]
    found = ends if two and not len(threes) else threes
    return int(found[-1]) if len(found) else None
