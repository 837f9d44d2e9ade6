"""What a bench runs on: its name, its libraries, and its ceilings, measured in the same run."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import torch

Clock = Callable[[], float]

# Wall-clock seconds are what people wait for; CPU seconds, of all threads together, say what the
# work takes where other processes have the machine for most of the time.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

# Best of so many: a ceiling is what can be reached.
_TRIES = 6
_WATCH_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Machine:
    """Device, threads, versions and commit; `commit` is None where there is no git checkout."""

    device: str
    num_threads: int
    versions: dict[str, str]
    commit: str | None

    def describe(self) -> str:
        """Return it in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = f"; commit {self.commit}" if self.commit else ""
        return f"{self.device}, {self.num_threads} threads; {versions}{commit}"


def this_machine(device: torch.device) -> Machine:
    """Return what is known of the machine and of this checkout."""
    import torch

    return Machine(device_name(device), torch.get_num_threads(), library_versions(), _commit())


def device_name(device: torch.device) -> str:
    """Return the name of a device, with its memory or its instruction set."""
    import torch

    if device.type != "cuda":
        return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def library_versions() -> dict[str, str]:
    """Return the versions that a speed depends on."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def timed(
    work: Callable[[], Any], device: torch.device, *, clock: Clock = time.perf_counter
) -> float:
    """Return the seconds of `work`, all that it queued on the device included."""
    _wait(device)
    begun = clock()
    work()
    _wait(device)
    return clock() - begun


@contextmanager
def peak_resident_bytes() -> Iterator[Callable[[], int]]:
    """Watch this process; what is yielded returns by how much its memory has grown at most.

    What was freed before is given back to the system first, where that can be asked for (glibc):
    else it would be used again, and nothing would seem to grow.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, over = psutil.Process(), Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not over.wait(_WATCH_SECONDS):
            peak = max(peak, process.memory_info().rss)

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: peak - before
    finally:
        over.set()
        watcher.join()


def matmul_flops_per_second(
    side: int, dtype: torch.dtype, device: torch.device, *, clock: Clock = time.perf_counter
) -> float:
    """Return the best rate of a square matrix product, of a few."""
    import torch

    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    best = min(timed(lambda: left @ right, device, clock=clock) for _ in range(_TRIES))
    return 2 * side**3 / best


def copy_bytes_per_second(
    num_bytes: int, device: torch.device, *, clock: Clock = time.perf_counter
) -> float:
    """Return bytes read and written a second by the best copy, of a few."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device, clock=clock) for _ in range(_TRIES))
    return 2 * num_bytes / best


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _commit() -> str | None:
    """Return the commit of the checkout that this file lies in."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
