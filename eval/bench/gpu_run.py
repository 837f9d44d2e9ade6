"""What the sections of `fathom bench gpu` share: the clock, the ceilings, what was left out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from eval.bench.machine import timed
from rag.lm.spec import CHUNK_TOKENS

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Run:
    """One run of the bench; sections ask it whether they may begin, and time with it."""

    device: torch.device
    dtype: torch.dtype
    deadline: float
    on_progress: Callable[[str], None]
    matmul_flops_per_second: float = 0.0
    copy_bytes_per_second: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """Name what runs; whatever ends it ends this section alone, and is said.

        A card that is met for the first time may lack a kernel, or a compiler: the rest of the
        figures are worth having all the same.
        """
        import torch

        self.on_progress(what)
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self.left_out.append(f"{what}: the card has too little memory")
        except Exception as error:
            detail = (str(error).strip().splitlines() or [""])[0][:200]
            self.left_out.append(f"{what}: {type(error).__name__}: {detail}")
        finally:
            collect(self.device)

    def too_late(self, what: str) -> bool:
        """Return whether the deadline has passed; what it costs is said."""
        late = time.perf_counter() > self.deadline
        if late:
            self.left_out.append(f"{what}: the time was up")
        return late

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds of `work`, all that it queued on the device included."""
        return timed(work, self.device)

    def middle(self, work: Callable[[], Any], *, times: int = 5) -> float:
        """Return the median of `timed`, after one run that warmed up."""
        work()
        return median(self.timed(work) for _ in range(times))

    def recorded(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Return what replays `work` as decoding does, without its launches; as it is on a CPU."""
        import torch

        if self.device.type != "cuda":
            return work
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # a recording wants kernels that have run before
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        replay: Callable[[], Any] = graph.replay
        return replay

    def timed_with_peak(self, work: Callable[[], Any]) -> tuple[float, int]:
        """Return `timed`, and the most bytes allocated meanwhile; 0 where they are not counted."""
        import torch

        if self.device.type != "cuda":
            return self.timed(work), 0
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.timed(work)
        return seconds, torch.cuda.max_memory_allocated(self.device) - before


def collect(device: torch.device) -> None:
    """Give a card's memory back that nothing holds any more."""
    import torch

    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def read(model: Any, cache: Any, ids: Sequence[int]) -> int:  # noqa: ANN401
    """Prefill in chunks as the local engine does; return the likeliest next token."""
    import torch

    with torch.inference_mode():
        for chunk in chunks(ids, model.device):
            output = model(
                input_ids=torch.tensor([chunk], device=model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return int(output.logits[0, -1].argmax())


def chunks(ids: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Yield the pieces in which a prompt enters a model there."""
    step = CHUNK_TOKENS[device.type]
    for start in range(0, len(ids), step):
        yield list(ids[start : start + step])


def some_ids(num_tokens: int, vocab_size: int) -> list[int]:
    """Return tokens of no meaning, spread over the vocabulary."""
    return [7919 * index % vocab_size for index in range(num_tokens)]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative."""
    found, expected = found.float().flatten(), expected.float().flatten()
    return float((found - expected).norm() / expected.norm())
