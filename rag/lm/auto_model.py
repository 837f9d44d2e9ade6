"""What `auto` stands for: the largest model of the catalog that is here and fits the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rag.lm.catalog import fetched_models
from rag.lm.device import choose_device, free_device_bytes
from rag.lm.known_models import known_models
from rag.lm.kv_bytes import kv_cache_bytes
from rag.lm.model_facts import find_model_facts
from rag.lm.peak_bytes import peak_bytes
from rag.settings import Settings

CPU_DEFAULT = "qwen2.5-coder-0.5b"
GPU_DEFAULT = "qwen2.5-coder-1.5b"
# Those that follow instructions; the others of the catalog are for tests.
_ANSWERERS = (CPU_DEFAULT, GPU_DEFAULT, "gpt-oss-20b")
# The template, the question and the passages' numbers.
_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """The model that `auto` stands for here, and why."""

    name: str
    reason: str


def choose_auto(settings: Settings) -> AutoChoice:
    """Return the model for this machine; nothing is fetched.

    A CPU gets the smallest that answers: a larger one fits but takes minutes. A GPU gets the
    largest of those fetched whose weights, cache and peak for a retrieval prompt fit its free
    memory less the reserve; where none is fetched, the default of a GPU, or of a CPU if that is all
    that fits.
    """
    if choose_device(settings).type != "cuda":
        return AutoChoice(CPU_DEFAULT, "no GPU: the smallest model that answers")
    free = free_device_bytes("cuda") - settings.kv_reserve_bytes
    tokens = settings.retrieval_tokens + _PROMPT_TOKENS + settings.max_new_tokens
    return choose_for_gpu(settings, free, tokens)


def choose_for_gpu(settings: Settings, free_bytes: int, num_tokens: int) -> AutoChoice:
    """Return the largest model that is here and fits `free_bytes` with `num_tokens` tokens."""
    here = {model.name for model in fetched_models(settings)}
    candidates = [name for name in _by_size() if name in here] or [GPU_DEFAULT]
    passed_over: list[str] = []
    for name in candidates:
        needed = _needed_bytes(name, settings.models_dir, num_tokens)
        room = f"{needed / 2**30:.1f} of {max(0, free_bytes) / 2**30:.1f} GiB free on the GPU"
        if needed <= free_bytes:
            why = "; ".join(["the largest that is here and fits", *passed_over])
            return AutoChoice(name, f"{why}: {room}" if name in here else f"not here yet: {room}")
        passed_over.append(f"not {name}, which needs {needed / 2**30:.1f} GiB")
    return AutoChoice(CPU_DEFAULT, "; ".join([*passed_over, "so the smallest"]))


def _by_size() -> list[str]:
    known = known_models()
    return sorted(_ANSWERERS, key=lambda name: known[name].num_parameters, reverse=True)


@lru_cache  # a spec takes seconds, and the choice is asked for again and again
def _needed_bytes(name: str, models_dir: Path, num_tokens: int) -> int:
    spec = find_model_facts(name, Settings(models_dir=models_dir)).spec
    return spec.weights_bytes + kv_cache_bytes(spec, num_tokens) + peak_bytes(spec, num_tokens)
