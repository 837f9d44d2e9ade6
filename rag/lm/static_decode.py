"""Answers written by one step that is the same each time: on a GPU, a graph replayed.

Decoding one token launches hundreds of kernels, each from Python; on a GPU that takes several times
as long as the kernels do. Here the step knows nothing of the host: it reads token and position from
tensors, and writes the next ones there. The first few tokens run it as it is, then it is recorded
(`GraphedStep`), and a token is one launch. On a CPU it is called as it is, which is the plain twin.

The host is a token behind: it reads one while the next is computed, so it can look for the end of
an answer without anybody waiting. What is computed after the end is thrown away. So it is with a
row of several in step that has ended: it goes on in the recording, and nobody reads it.

Source: docs/decisions/0040.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from rag.lm.agreement import difference, tolerance
from rag.lm.forward import allocated, forward, is_allocation_failure
from rag.lm.lean_step import give_up_lean_step, lean_step
from rag.lm.native_cache import merge, native_cache
from rag.lm.shared_prefix import SharedPrefixCache, can_share, forward_in_step
from rag.lm.spec import ModelSpec
from rag.lm.static_cache import ATTENTION, StaticCache, static_copy, static_refusal
from rag.lm.windowed_attention import attention_named

logger = logging.getLogger(__name__)

# Steps before the recording: kernels choose their workspaces, and a short answer is not worth it.
PLAIN_STEPS = 3
# Steps of the self-test: the plain ones, the recorded one, and two more.
_TEST_STEPS = PLAIN_STEPS + 3
_TEST_TOKENS = 40
# By how many tokens the second of two rows is shorter there.
_TEST_PADDING = 13

# Who is written: one row alone, rows with a cache each, rows that share what they begin with.
Rows = Literal["one", "joined", "shared"]
Step = Callable[[], None]

_IS_EXACT: WeakKeyDictionary[Any, dict[Rows, bool]] = WeakKeyDictionary()


def can_decode_statically(
    model: Any,  # noqa: ANN401
    spec: ModelSpec,
    rows: Rows = "one",
) -> bool:
    """Say whether the answers of a model can be written so: proven on the model itself.

    A few tokens, recorded where there is a GPU, must have the logits that they have in the plain
    way, a window that is full among them. Where the lean step's differ, the step is the model's own
    code; where those of that differ, answers are written in the plain way. Either is logged.

    Args:
        model: a causal model of transformers, ready to run.
        spec: its shape; a quantised cache keeps the plain way.
        rows: who is written; `shared` where `can_share` holds.

    Raises:
        OutOfMemoryError: if there is no memory for the test.
    """
    if spec.kv_dtype is not None or static_refusal(model.config.get_text_config(decoder=True)):
        return False
    proven = _IS_EXACT.setdefault(model, {})
    if rows not in proven:

        def is_proven() -> bool:
            if lean_step(model) is not None:
                if _is_exact(model, spec, rows):
                    return True
                give_up_lean_step(model)
                proven.clear()  # what was proven was the lean step
            return _is_exact(model, spec, rows)

        proven[rows] = allocated(is_proven, "while static decoding was tried")
    return proven[rows]


def in_place(model: Any, spec: ModelSpec, cache: Cache) -> Cache:  # noqa: ANN401
    """Return what the answer to one prompt goes on from without a copy of its cache.

    The prompt is what its only row shares with others that there might be. So it is read as it is
    by a kernel that wants no mask. Models with windows or with scores that are bent are copied.
    """
    return SharedPrefixCache(cache) if can_share(model, spec) else cache


class StaticDecoder:
    """Writes on from prefilled prompts, greedily, all in step, a token each at a time."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        cache: Cache,
        first_ids: Sequence[int],
        *,
        max_new_tokens: int,
        front_padding: Sequence[int] | None = None,
        is_lean: bool = True,
        records: bool = True,
        wrap: Callable[[Step], Step] = lambda step: step,
    ) -> None:
        """Copy the cache to where it stays.

        Args:
            model: for which `can_decode_statically` holds.
            cache: the prompts, prefilled, in the layers of `native_cache` or behind a prefix that
                they share; it is empty afterwards.
            first_ids: the likeliest token after each prompt.
            max_new_tokens: the longest answer, its first token included; its last is not cached.
            front_padding: how many of the first tokens of each row, a shared prefix aside, stand
                for nothing; by default there is one row, without any.
            is_lean: False has the step computed by the model's own code, as where no lean one is.
            records: False calls the step on a GPU too.
            wrap: what makes of the step the one that is run; a compiler, say.
        """
        self._model = model
        self._lean = lean_step(model) if is_lean else None
        self._device = model.device
        self._prompt_tokens = cache.get_seq_length()
        self._most_steps = max_new_tokens - 1
        rows = len(first_ids)
        with torch.inference_mode():
            self.cache: StaticCache = static_copy(
                cache, self._most_steps, front_padding=front_padding
            )
            self.token = torch.tensor([[first_id] for first_id in first_ids], device=self._device)
            vocab_size = model.config.get_text_config(decoder=True).vocab_size
            self.logits = torch.zeros(rows, vocab_size, dtype=model.dtype, device=self._device)
            # Any of four dimensions is handed on as it is; the attention asks the cache instead.
            self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        run = wrap(self.step)

        def run_named() -> None:
            with attention_named(model, ATTENTION):
                run()

        self._step = GraphedStep(run_named, self._device if records else None)
        self._outbox = _Outbox(self._most_steps, rows, self._device)
        self._rows = list(range(rows))  # those that are read
        self._num_launched = self._num_read = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest prompt, and those of an answer that were needed to read it so far.

        A row holds as many, less its padding.
        """
        return self._prompt_tokens + self._num_read

    def kv_bytes(self, padding: int = 0) -> int:
        """Return the logical bytes that the cache holds of a row with so much padding."""
        return self.cache.used_bytes(self.num_tokens - padding)

    @property
    def is_recorded(self) -> bool:
        """Whether the step is replayed, not called."""
        return self._step.is_recorded

    def select(self, rows: Sequence[int]) -> None:
        """Read only these of the rows that were read until now; the others are computed in vain."""
        self._rows = [self._rows[row] for row in rows]

    def next_ids(self) -> list[int]:
        """Return each row's next token; those after them are being computed then, if any may be.

        Raises:
            ValueError: if the answers are as long as they may become.
            OutOfMemoryError: if memory runs out.
        """
        if self._num_read == self._most_steps:
            raise ValueError(f"there is no room for more than {self._most_steps + 1} new tokens")
        while self._num_launched < min(self._num_read + 2, self._most_steps):
            held = self._prompt_tokens + self._num_launched
            allocated(self._launch, f"with {held:,} tokens in a static cache, at the next one")
        self._num_read += 1
        ids = self._outbox.read(self._num_read - 1)
        return [ids[row] for row in self._rows]

    def close(self) -> None:
        """Wait for what is being computed, and let go of step and cache; no token comes any more.

        A graph may not go while it runs. And the step holds its decoder, which holds the step: the
        memory of both would be free no sooner than Python looks for such circles.
        """
        if self._num_launched:
            self._outbox.read(self._num_launched - 1)
        self._step.close()

    def step(self) -> None:
        """Compute the next tokens from tensors into tensors: what is recorded.

        No shape depends on a value, nothing asks the host, and what it reads and writes stays
        where it is.
        """
        self.cache.point()
        if self._lean is not None:
            found = self._lean.logits(self.token, self.cache)
        else:
            found = self._model(
                input_ids=self.token,
                position_ids=self.cache.position_ids,
                attention_mask=self._mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                fathom_static=self.cache,
            ).logits[:, -1]
        self.logits.copy_(found)
        self.token.copy_(found.argmax(-1, keepdim=True))
        self.cache.position.add_(1)

    def advance(self) -> None:
        """Run the step once, in whatever way it is run by now; nobody waits for the device."""
        # Entered anew for each token: a generator must not leave it on in its caller's thread.
        with torch.inference_mode():
            self._step()

    def _launch(self) -> None:
        self.advance()
        self._outbox.put(self._num_launched, self.token)
        self._num_launched += 1


class GraphedStep:
    """A function without arguments: on a GPU recorded once it has run a few times, then replayed.

    Where recording fails, it goes on being called; that is logged.
    """

    def __init__(self, step: Step, device: torch.device | None) -> None:
        """Take what is run; it must read and write tensors that stay where they are.

        Args:
            step: runs once.
            device: where it is recorded, if that is a GPU.
        """
        self._function: Step | None = step
        self._num_runs = 0
        self._graph: Any = None
        # Recording wants a stream of its own, on which the kernels have run before.
        is_cuda = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]

    @property
    def is_recorded(self) -> bool:
        """Whether it is replayed from now on."""
        return self._graph is not None

    def __call__(self) -> None:
        """Run the step once."""
        assert self._function is not None  # it is not closed
        if self._stream is not None and self._num_runs == PLAIN_STEPS:
            self._record(self._function)
        self._num_runs += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._stream is None:
            self._function()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._function()
            torch.cuda.current_stream().wait_stream(self._stream)

    def close(self) -> None:
        """Let go of the function, and of its recording."""
        self._function = self._graph = None

    def _record(self, function: Step) -> None:
        """Record the step, which does not run it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Whatever ends the recording, this thread is back on its stream. Other threads may
            # use the GPU meanwhile: it is this one's calls that are recorded.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError as error:
            logger.warning("the step of decoding was not recorded, and is called: %s", error)
        else:
            self._graph = graph


class _Outbox:
    """Tokens on their way from the device to the host, those of each step in a place of its own."""

    def __init__(self, num_steps: int, num_rows: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._ids = torch.zeros(num_steps, num_rows, dtype=torch.long, pin_memory=self._is_cuda)
        self._arrived: dict[int, torch.cuda.Event] = {}

    def put(self, index: int, tokens: Tensor) -> None:
        """Send a step's tokens, [rows, 1]; nobody waits."""
        self._ids[index].copy_(tokens[:, 0], non_blocking=True)
        if self._is_cuda:
            event = self._arrived[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

    def read(self, index: int) -> list[int]:
        """Return the tokens that were sent, once they have come."""
        if (event := self._arrived.pop(index, None)) is not None:
            event.synchronize()
        ids: list[int] = self._ids[index].tolist()
        return ids


# ---- the proof ---------------------------------------------------------------------------------


def _is_exact(model: Any, spec: ModelSpec, rows: Rows) -> bool:  # noqa: ANN401
    """Compare the logits of a few tokens with those of the plain way, fed with the same tokens."""
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    num_tokens = max([_TEST_TOKENS, *(window + 1 for window in windows)])
    # Spread over the vocabulary, none of the special ones at its start.
    prompt = [(7 + 7919 * index) % spec.vocab_size for index in range(num_tokens)]
    padding = [0] if rows == "one" else [0, _TEST_PADDING]
    plain, newest = _prefilled(model, prompt, padding, is_shared=rows == "shared")
    copied, _ = _prefilled(model, prompt, padding, is_shared=rows == "shared")
    if rows == "one":
        copied = in_place(model, spec, copied)
    decoder = StaticDecoder(
        model, copied, newest, max_new_tokens=_TEST_STEPS + 1, front_padding=padding
    )
    what = (
        "answers are decoded in the plain way: the static one"
        if lean_step(model) is None
        else "decoding's step is the model's own code: the lean one"
    )
    largest = 0.0
    try:
        for _ in range(_TEST_STEPS):
            expected = forward_in_step(
                model, [[each] for each in newest], plain, front_padding=padding
            )
            decoder.advance()
            newest = decoder.token[:, 0].tolist()
            for found, row in zip(decoder.logits, expected[:, -1], strict=True):
                largest = max(largest, difference(found, row))
    except RuntimeError as error:
        if is_allocation_failure(error):
            raise
        logger.warning("%s failed: %s", what, error)
        return False
    finally:
        decoder.close()
    if largest > tolerance(model):
        logger.warning("%s's logits differ by %.1f%%", what, 100 * largest)
        return False
    return True


def _prefilled(
    model: Any,  # noqa: ANN401
    prompt: Sequence[int],
    padding: Sequence[int],
    *,
    is_shared: bool,
) -> tuple[Cache, list[int]]:
    """Return a cache of rows that lack so many of the prompt's first tokens, and what comes next.

    Shared, each row is that behind the whole prompt.
    """
    tails = [list(prompt[pad:]) for pad in padding]
    if is_shared:
        prefix = native_cache(model.config)
        forward(model, [prompt], prefix)
        cache: Cache = SharedPrefixCache(prefix)
        padded = [[0] * pad + tail for pad, tail in zip(padding, tails, strict=True)]
        logits = forward_in_step(model, padded, cache, front_padding=padding)
    else:
        caches = [native_cache(model.config) for _ in tails]
        logits = torch.cat(
            [forward(model, [tail], each) for tail, each in zip(tails, caches, strict=True)]
        )
        cache = merge(caches)
    return cache, logits[:, -1].argmax(-1).tolist()
