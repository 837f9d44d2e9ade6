"""The weights that a model can write an answer with, and what writes with each: for benches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.lm.forward import forward
from rag.lm.four_bit import four_bit_file, use_four_bit, without_four_bit, write_four_bit
from rag.lm.integer_decoder import IntegerDecoder, has_integers, use_integers
from rag.lm.integer_weights import integers_file, write_integers
from rag.lm.lean_forward import lean_pass
from rag.lm.native_cache import branch
from rag.lm.prompt_lookup import ModelPasses, Passes

if TYPE_CHECKING:
    import torch

# As the setting `decode_weights` names them.
STORED = "stored"
FOUR_BIT = "4-bit"
INTEGERS = "integers"


def decode_with(model: Any, config: Any, gguf: Path, folder: Path) -> None:  # noqa: ANN401
    """Let a model decode with what a GGUF file holds: its whole numbers, and in 4 bits.

    Args:
        model: as the engine runs it, on a CPU; where it cannot decode so, it stays as it is.
        config: its config.
        gguf: the file.
        folder: where what it decodes with is kept.
    """
    if lean_pass(model) is None:
        return
    if write_four_bit(gguf, folder, config) and (found := four_bit_file(folder)):
        use_four_bit(model, found)
    if can_compile() and write_integers(gguf, folder, config) and (found := integers_file(folder)):
        use_integers(model, found)


def weights_of(model: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Return the weights that a model can write with; what they need is compiled when this returns.

    Args:
        model: as the engine runs it, see `decode_with`.
    """
    lean = lean_pass(model)
    found = [STORED]
    if lean is not None and lean.most_few_rows:
        found.append(FOUR_BIT)
    if has_integers(model):
        found.append(INTEGERS)
    return tuple(found)


def can_compile() -> bool:
    """Say whether the package that whole numbers are multiplied with is there."""
    return find_spec("openvino") is not None


@contextmanager
def passes(model: Any, weights: str, cache: Any) -> Iterator[Passes]:  # noqa: ANN401
    """Yield what writes on from a prompt: its cache is used up, or copied first.

    Args:
        model: as for `weights_of`.
        weights: one of those that it returns.
        cache: of the prompt.
    """
    if weights == INTEGERS:
        with closing(IntegerDecoder(model, cache)) as decoder:
            yield decoder
        return
    with _multiplied_by(model, weights):
        yield ModelPasses(model, cache)


@contextmanager
def steps(
    model: Any,  # noqa: ANN401
    weights: str,
    cache: Any,  # noqa: ANN401
) -> Iterator[Callable[[int], torch.Tensor]]:
    """Yield what reads a token behind a prompt and returns the next one's logits, [vocabulary].

    Args:
        model: as for `weights_of`.
        weights: one of those that it returns.
        cache: of the prompt; it is not changed.
    """
    import torch

    if weights == INTEGERS:
        with closing(IntegerDecoder(model, cache)) as decoder:
            yield lambda token: torch.tensor(decoder.logits([token])[0])
        return
    own = branch(cache, 1)
    with _multiplied_by(model, weights):
        yield lambda token: forward(model, [[token]], own)[0, -1].float()


def _multiplied_by(model: Any, weights: str) -> Any:  # noqa: ANN401
    return nullcontext() if weights == FOUR_BIT else without_four_bit(model)
