"""Two threads beside one while other processes want the cores: do they still help, or do they wait?

An OpenMP thread that spins for one that has lost its core makes decoding on a busy machine up to 60
times slower; one that sleeps (OMP_WAIT_POLICY=PASSIVE) leaves the core to whom it is waiting for.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from eval.bench.machine import Machine, this_machine
from eval.bench.rounds import Seconds, in_turn, middle, ratio
from rag.lm.forward import forward
from rag.lm.native_cache import branch
from rag.lm.prefill_rate import time_chunk
from rag.lm.spec import ModelSpec

_PROMPT_TOKENS = 512
# Ends by itself once its parent is gone.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**5))\n"


@dataclass(frozen=True, slots=True)
class ThreadsRow:
    """One kind of work: seconds with one thread and with several, and the first to the second.

    Of the ratio the wall-clock side counts: below 1, several threads are slower than one.
    """

    work: str
    one: Seconds
    several: Seconds
    ratio: Seconds


@dataclass(frozen=True, slots=True)
class ThreadsBench:
    """What `fathom bench threads` shows; beside `busy` processes that want the cores as well."""

    model: str
    rounds: int
    num_threads: int
    busy: int
    machine: Machine
    rows: tuple[ThreadsRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom bench threads` prints last."""
        return {"bench": "threads", **asdict(self)}


def bench_threads(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    spec: ModelSpec,
    *,
    name: str,
    busy: int,
    num_threads: int = 2,
    prompt_tokens: int = _PROMPT_TOKENS,
    new_tokens: int = 16,
    rounds: int = 3,
    on_progress: Callable[[str], None] = lambda _: None,
) -> ThreadsBench:
    """Read a prompt and write after it with one thread and with several, in turn, under load.

    Args:
        model: ready to run, on a CPU.
        spec: of the model.
        name: of the model.
        busy: processes that do nothing but use a core, started and ended here.
        num_threads: of torch, set beside one.
        prompt_tokens: of the prompt.
        new_tokens: written after it.
        rounds: how often all is run; medians are shown.
        on_progress: called with what is run next.
    """
    import torch

    before = torch.get_num_threads()
    _, cache = time_chunk(model, spec, prompt_tokens)

    def read(threads: int) -> None:
        torch.set_num_threads(threads)
        time_chunk(model, spec, prompt_tokens)

    def write(threads: int) -> None:
        torch.set_num_threads(threads)
        own = branch(cache, 1)
        for token in range(1, new_tokens + 1):
            forward(model, [[token]], own)

    works = {f"{prompt_tokens:,} tokens read": read, f"{new_tokens:,} tokens written": write}
    counts = {"one": 1, "several": num_threads}
    arms: dict[str, Callable[[], None]] = {
        f"{work}, {side}": partial(run, threads)
        for work, run in works.items()
        for side, threads in counts.items()
    }
    try:
        with busy_processes(busy):
            for run in arms.values():  # warms up
                run()
            found = in_turn(arms, rounds, on_progress=on_progress)
    finally:
        torch.set_num_threads(before)
    return ThreadsBench(
        model=name,
        rounds=rounds,
        num_threads=num_threads,
        busy=busy,
        machine=this_machine(model.device),
        rows=tuple(
            ThreadsRow(
                work,
                middle(found, f"{work}, one"),
                middle(found, f"{work}, several"),
                ratio(found, f"{work}, one", f"{work}, several"),
            )
            for work in works
        ),
    )


@contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """Keep so many cores busy meanwhile; the processes' ids are yielded."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", _BUSY]))
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def card(bench: ThreadsBench) -> str:
    """Return the figures for people."""
    lines = [
        f"{bench.model}; {bench.machine.describe()}",
        f"beside {bench.busy} busy processes; wall-clock seconds, medians of {bench.rounds}; ratio:"
        f" one thread's to those of {bench.num_threads}, above 1 more threads are faster",
        f"{'':24}{'one thread':>12}{f'{bench.num_threads} threads':>12}{'ratio':>7}",
    ]
    lines += [
        f"{row.work:24}{row.one.wall:>10.2f} s{row.several.wall:>10.2f} s{row.ratio.wall:>7.2f}"
        for row in bench.rows
    ]
    return "\n".join(lines)
