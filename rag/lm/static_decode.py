"""An answer written by one step that is the same each time: on a GPU, a graph replayed.

Decoding one token launches hundreds of kernels, each from Python; on a GPU that takes several times
as long as the kernels do. Here the step knows nothing of the host: it reads token and position from
tensors, and writes the next ones there. The first few tokens run it as it is, then it is recorded
(`GraphedStep`), and a token is one launch. On a CPU it is called as it is, which is the plain twin.

The host is a token behind: it reads one while the next is computed, so it can look for the end of
an answer without anybody waiting. What is computed after the end is thrown away.

Source: docs/decisions/0040.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from rag.lm.forward import allocated, forward, is_allocation_failure
from rag.lm.kv_bytes import static_capacity
from rag.lm.native_cache import branch, native_cache
from rag.lm.spec import ModelSpec
from rag.lm.static_cache import ATTENTION, StaticCache, static_copy, static_refusal
from rag.lm.windowed_attention import attention_named, difference, tolerance

logger = logging.getLogger(__name__)

# Steps before the recording: kernels choose their workspaces, and a short answer is not worth it.
PLAIN_STEPS = 3
# Steps of the self-test: the plain ones, the recorded one, and two more.
_TEST_STEPS = PLAIN_STEPS + 3
_TEST_TOKENS = 40

_IS_EXACT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

Step = Callable[[], None]


def can_decode_statically(model: Any, spec: ModelSpec) -> bool:  # noqa: ANN401
    """Say whether the answers of a model can be written so: proven on the model itself.

    A few tokens, recorded where there is a GPU, must have the logits that they have in the plain
    way, a window that is full among them. What fails here keeps the plain way, and that is logged.

    Args:
        model: a causal model of transformers, ready to run.
        spec: its shape; a quantised cache keeps the plain way.

    Raises:
        OutOfMemoryError: if there is no memory for the test.
    """
    if spec.kv_dtype is not None or static_refusal(model.config.get_text_config(decoder=True)):
        return False
    if model not in _IS_EXACT:
        _IS_EXACT[model] = allocated(
            lambda: _is_exact(model, spec), "while static decoding was tried"
        )
    return _IS_EXACT[model]


class StaticDecoder:
    """Writes on from one prefilled prompt, greedily, a token at a time."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        cache: Cache,
        first_id: int,
        *,
        max_new_tokens: int,
        records: bool = True,
        wrap: Callable[[Step], Step] = lambda step: step,
    ) -> None:
        """Copy the cache to where it stays.

        Args:
            model: for which `can_decode_statically` holds.
            cache: the prompt, prefilled, in the layers of `native_cache`; it is empty afterwards.
            first_id: the likeliest token after the prompt.
            max_new_tokens: the longest answer, `first_id` included; its last token is not cached.
            records: False calls the step on a GPU too.
            wrap: what makes of the step the one that is run; a compiler, say.
        """
        self._model = model
        self._device = model.device
        self._prompt_tokens = cache.get_seq_length()
        self._most_steps = max_new_tokens - 1
        capacity = static_capacity(self._prompt_tokens + self._most_steps)
        with torch.inference_mode():
            self.cache: StaticCache = static_copy(cache, capacity)
            self.token = torch.tensor([[first_id]], device=self._device)
            vocab_size = model.config.get_text_config(decoder=True).vocab_size
            self.logits = torch.zeros(1, vocab_size, dtype=model.dtype, device=self._device)
            # Any of four dimensions is handed on as it is; the attention asks the cache instead.
            self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._device)
        run = wrap(self.step)

        def run_named() -> None:
            with attention_named(model, ATTENTION):
                run()

        self._step = GraphedStep(run_named, self._device if records else None)
        self._outbox = _Outbox(self._most_steps, self._device)
        self._num_launched = self._num_read = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, and those of the answer that were needed to read what was read."""
        return self._prompt_tokens + self._num_read

    @property
    def kv_bytes(self) -> int:
        """The logical bytes that the cache holds of these tokens."""
        return self.cache.used_bytes(self.num_tokens)

    @property
    def is_recorded(self) -> bool:
        """Whether the step is replayed, not called."""
        return self._step.is_recorded

    def next_id(self) -> int:
        """Return the next token; the one after it is being computed then, if there may be one.

        Raises:
            ValueError: if the answer is as long as it may become.
            OutOfMemoryError: if memory runs out.
        """
        if self._num_read == self._most_steps:
            raise ValueError(f"there is no room for more than {self._most_steps + 1} new tokens")
        while self._num_launched < min(self._num_read + 2, self._most_steps):
            held = self._prompt_tokens + self._num_launched
            allocated(self._launch, f"with {held:,} tokens in a static cache, at the next one")
        self._num_read += 1
        return self._outbox.read(self._num_read - 1)

    def close(self) -> None:
        """Wait for what is being computed, and let go of step and cache; no token comes any more.

        A graph may not go while it runs. And the step holds its decoder, which holds the step: the
        memory of both would be free no sooner than Python looks for such circles.
        """
        if self._num_launched:
            self._outbox.read(self._num_launched - 1)
        self._step.close()

    def step(self) -> None:
        """Compute the next token from tensors into tensors: what is recorded.

        No shape depends on a value, nothing asks the host, and what it reads and writes stays
        where it is.
        """
        self.cache.point()
        found = self._model(
            input_ids=self.token,
            position_ids=self.cache.position[None],
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
    """Tokens on their way from the device to the host, each in a place of its own."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._ids = torch.zeros(num_tokens, dtype=torch.long, pin_memory=self._is_cuda)
        self._arrived: dict[int, torch.cuda.Event] = {}

    def put(self, index: int, token: Tensor) -> None:
        """Send a token; nobody waits."""
        self._ids[index].copy_(token[0, 0], non_blocking=True)
        if self._is_cuda:
            event = self._arrived[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

    def read(self, index: int) -> int:
        """Return a token that was sent, once it has come."""
        if (event := self._arrived.pop(index, None)) is not None:
            event.synchronize()
        return int(self._ids[index])


def _is_exact(model: Any, spec: ModelSpec) -> bool:  # noqa: ANN401
    """Compare the logits of a few tokens with those of the plain way, fed with the same tokens."""
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    num_tokens = max([_TEST_TOKENS, *(window + 1 for window in windows)])
    # Spread over the vocabulary, none of the special ones at its start.
    prompt = [(7 + 7919 * index) % spec.vocab_size for index in range(num_tokens)]
    plain = native_cache(model.config)
    newest, largest = int(forward(model, [prompt], plain)[0, -1].argmax()), 0.0
    decoder = StaticDecoder(model, branch(plain, 1), newest, max_new_tokens=_TEST_STEPS + 1)
    try:
        for _ in range(_TEST_STEPS):
            expected = forward(model, [[newest]], plain)[0, -1]
            decoder.advance()
            newest = int(decoder.token)
            largest = max(largest, difference(decoder.logits[0], expected))
    except RuntimeError as error:
        if is_allocation_failure(error):
            raise
        logger.warning("answers are decoded in the plain way: the static one failed: %s", error)
        return False
    finally:
        decoder.close()
    if largest > tolerance(model):
        logger.warning(
            "answers are decoded in the plain way: the static one's logits differ by %.1f%%",
            100 * largest,
        )
        return False
    return True
