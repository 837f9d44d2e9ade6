"""Where a model runs, and the memory that is free there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from rag.errors import SettingsError
from rag.settings import Settings

if TYPE_CHECKING:
    import torch


def choose_device(settings: Settings) -> torch.device:
    """Return the torch device of `settings.device`; the only place that chooses one."""
    import torch

    wanted = settings.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if not (wanted == "cpu" or wanted.startswith("cuda")):
        raise SettingsError(
            f"device is {wanted!r}; expected cuda, cpu or auto", hint="set FATHOM_DEVICE=auto"
        )
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(
            f"device is {wanted!r}, but torch finds no CUDA device here",
            hint="set FATHOM_DEVICE=auto, or check the driver with nvidia-smi",
        )
    return torch.device(wanted)


def free_device_bytes(device_type: str) -> int:
    """Return the bytes of memory that is free on `cuda` or `cpu`."""
    return _free_gpu_bytes() if device_type == "cuda" else _free_memory_bytes()


def _free_gpu_bytes() -> int:
    """Return what the driver has free, and what torch holds of it without using it."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def _free_memory_bytes() -> int:
    """Return the available memory of the machine, or of the control group if that is less."""
    return min([int(psutil.virtual_memory().available), *_cgroup_free_bytes()])


def _cgroup_free_bytes(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Return the free bytes of each limited control group (version 2) that this process is in.

    Page cache that the kernel gives back at once (inactive_file) counts as free.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    inside = next((line[3:] for line in lines if line.startswith("0::")), None)
    if inside is None:
        return []
    group = root / inside.strip("/")
    free = []
    for folder in [group, *group.parents]:
        try:
            limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text(encoding="utf-8"))
                stat = (folder / "memory.stat").read_text(encoding="utf-8").split()
                used -= int(stat[stat.index("inactive_file") + 1])
                free.append(max(0, int(limit) - used))
        except (OSError, ValueError):
            pass
        if folder == root:
            break
    return free
