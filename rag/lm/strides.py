"""A long text read once through a sliding window, with a question to it at every stride.

Prompts that differ only in their middle, one a stride of the text, are taken apart: what they all
begin with is read once and stays in the cache as the sinks; the middles are read one after the
other while the window slides; what they all end with is read in a fork at each stride, where the
reply is written, and forgotten again. No token of the text is prefilled twice.

Source: docs/decisions/0019 and 0023.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

from rag.lm.engine import GenerationDone, GenerationStep, PrefillProgress, TextPiece

if TYPE_CHECKING:
    from rag.lm.chat_tokenizer import TextStream
    from rag.lm.window_kernels import WindowPlan
    from rag.lm.windowed_attention import WindowedModel, WindowedSession


@dataclass(frozen=True, slots=True)
class Strides:
    """Prompts taken apart: `front`, the `middles` in order, `back`; all token ids."""

    front: tuple[int, ...]
    middles: tuple[tuple[int, ...], ...]
    back: tuple[int, ...]

    def window(self, max_new_tokens: int) -> int:
        """Return the window in which a stride, the one before it, and a reply to it are seen."""
        return 2 * max(map(len, self.middles)) + len(self.back) + max_new_tokens + 1


def take_apart(prompts: Sequence[Sequence[int]], frames: Sequence[Sequence[int]]) -> Strides:
    """Return the prompts taken apart where the frames part.

    Args:
        prompts: token ids of each stride's prompt.
        frames: at least two prompts whose middles begin and end differently, so that what all have
            in common is not the text's.
    """
    everything = [*frames, *prompts]
    front = _common(everything)
    shortest = min(map(len, everything)) - front
    back = min(_common([list(reversed(ids)) for ids in everything]), shortest)
    ends = [len(ids) - back for ids in prompts]
    return Strides(
        front=tuple(prompts[0][:front]),
        middles=tuple(tuple(ids[front:end]) for ids, end in zip(prompts, ends, strict=True)),
        back=tuple(prompts[0][len(prompts[0]) - back :]),
    )


def read_strides(
    checked: WindowedModel,
    strides: Strides,
    *,
    end_ids: frozenset[int],
    new_stream: Callable[[], TextStream],
    max_new_tokens: int,
    stop: Event,
) -> Iterator[tuple[int, GenerationStep]]:
    """Read the strides in order; yield the number of each with the steps of the reply to it.

    PrefillProgress counts the tokens of all middles. Each reply ends with its GenerationDone, whose
    bytes are those of the fork that wrote it. Once `stop` is set, nothing more is begun.

    Raises:
        PassStoppedError: if it was set while a piece of the text was read.
    """
    from rag.lm.window_kernels import WindowPlan
    from rag.lm.windowed_attention import WindowedSession

    plan = WindowPlan(len(strides.front), strides.window(max_new_tokens))
    session = WindowedSession(checked, plan)
    session.read(strides.front, stop=stop)
    total, done = sum(map(len, strides.middles)), 0
    for number, middle in enumerate(strides.middles):
        begun = time.perf_counter()
        for start in range(0, len(middle), session.chunk_tokens):
            if stop.is_set():
                return
            piece = middle[start : start + session.chunk_tokens]
            session.read(piece, stop=stop)
            done += len(piece)
            yield number, PrefillProgress(done, total)
        yield from (
            (number, step)
            for step in _reply(
                session.fork(),
                plan,
                strides.back,
                prompt_tokens=len(strides.front) + len(middle) + len(strides.back),
                reused_tokens=len(strides.front) if number else 0,
                begun=begun,
                end_ids=end_ids,
                text=new_stream(),
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
        )


def read_once(
    checked: WindowedModel,
    shared_ids: Sequence[int],
    tails: Sequence[Sequence[int]],
    *,
    num_sinks: int,
    window: int,
    end_ids: frozenset[int],
    new_stream: Callable[[], TextStream],
    max_new_tokens: int,
    stop: Event,
) -> Iterator[tuple[int, GenerationStep]]:
    """Read what prompts share once through a sliding window, and answer each in a fork.

    What left the window is gone, so only what stands at its end can be answered from: a control for
    comparisons, not a way to answer. See `read_strides` for the steps and the error.
    """
    from rag.lm.window_kernels import WindowPlan
    from rag.lm.windowed_attention import WindowedSession

    plan = WindowPlan(num_sinks, window)
    session = WindowedSession(checked, plan)
    begun = time.perf_counter()
    for start in range(0, len(shared_ids), session.chunk_tokens):
        if stop.is_set():
            return
        session.read(shared_ids[start : start + session.chunk_tokens], stop=stop)
    for number, tail in enumerate(tails):
        if stop.is_set():
            return
        for step in _reply(
            session.fork(),
            plan,
            tail,
            prompt_tokens=len(shared_ids) + len(tail),
            reused_tokens=len(shared_ids) if number else 0,
            begun=begun,
            end_ids=end_ids,
            text=new_stream(),
            max_new_tokens=max_new_tokens,
            stop=stop,
        ):
            yield number, step
        begun = time.perf_counter()


def _reply(
    branch: WindowedSession,
    plan: WindowPlan,
    tail: Sequence[int],
    *,
    prompt_tokens: int,
    reused_tokens: int,
    begun: float,
    end_ids: frozenset[int],
    text: TextStream,
    max_new_tokens: int,
    stop: Event,
) -> Iterator[GenerationStep]:
    """Read the end of a prompt in a fork, and write the reply to it."""
    next_id = int(branch.read(tail, stop=stop).argmax())
    read_seconds = time.perf_counter() - begun
    new_tokens = 1
    while next_id not in end_ids and not stop.is_set():
        if piece := text.push(next_id):
            yield TextPiece(piece)
        if new_tokens == max_new_tokens:
            break
        next_id = int(branch.read([next_id]).argmax())
        new_tokens += 1
    if piece := text.flush():
        yield TextPiece(piece)
    yield GenerationDone(
        prompt_tokens=prompt_tokens,
        reused_tokens=reused_tokens,
        new_tokens=new_tokens,
        kv_tokens=plan.kept_tokens(branch.num_read),
        kv_bytes=branch.kv_bytes,
        prefill_seconds=read_seconds,
        decode_seconds=time.perf_counter() - begun - read_seconds,
        stopped=stop.is_set(),
    )


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Return how many of their first tokens all rows share."""
    shared = 0
    for ids in zip(*rows, strict=False):
        if len(set(ids)) > 1:
            break
        shared += 1
    return shared
