"""llama.cpp as a peer, where the package xllamacpp is installed: prefill and decoding of a GGUF."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eval.bench.machine import Clock

_PACKAGE = "xllamacpp"


class LlamaCpp:
    """A GGUF file in llama.cpp's server, in this process; greedy, one sequence."""

    def __init__(self, path: Path, *, context_tokens: int, num_threads: int) -> None:
        """Load the file.

        Args:
            path: the GGUF file.
            context_tokens: the most that any call will hold.
            num_threads: of prefill and decoding.
        """
        import xllamacpp  # type: ignore[import-not-found]

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context_tokens
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = num_threads
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.verbosity = -1
        parameters.fit_params = False
        self._server = xllamacpp.Server(parameters)
        info = str(xllamacpp.get_system_info())
        vectors = [name for name in ("AVX512_BF16", "AVX512", "AVX2") if f"{name} = 1" in info]
        self.name = f"llama.cpp ({_PACKAGE} {version(_PACKAGE)}, {(vectors or ['no AVX'])[0]})"

    def seconds(self, ids: Sequence[int], num_tokens: int, clock: Clock) -> tuple[float, float]:
        """Return seconds of reading `ids`, and of each token written after them.

        What was read before is forgotten, but for what the same call has read itself: the prompt is
        read with one token written, then all but its last token is there, and more are written.
        """
        self._complete([ids[-1], ids[0]], 1)  # another prompt: nothing of it fits
        begun = clock()
        self._complete(ids, 1)
        read = clock() - begun
        begun = clock()
        self._complete(ids, num_tokens + 1)
        return read, (clock() - begun) / (num_tokens + 1)

    def _complete(self, ids: Sequence[int], num_tokens: int) -> None:
        found: Any = self._server.handle_completions(
            {
                "prompt": list(ids),
                "n_predict": num_tokens,
                "max_tokens": num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": True,
            }
        )
        if "timings" not in found:
            raise RuntimeError(f"llama.cpp answered {str(found)[:200]}")


def is_installed() -> bool:
    """Say whether the package of the extra `peers` is there."""
    try:
        version(_PACKAGE)
    except PackageNotFoundError:
        return False
    return True
