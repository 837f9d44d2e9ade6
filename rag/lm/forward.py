"""One forward pass of a transformers model: rows of tokens into the cache, logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from rag.errors import OutOfMemoryError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

T = TypeVar("T")

# How torch's allocators for the CPU say that there is no memory; on a GPU it has a class for that.
_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory: you tried to allocate")


class PassStoppedError(Exception):
    """A forward pass was ended between two layers: its cache is of no use, as some have it all."""


def forward(
    model: Any,  # noqa: ANN401 - a causal model of transformers
    rows: Sequence[Sequence[int]],
    cache: Cache,
    *,
    keep: Sequence[int] | None = None,
    front_padding: Sequence[int] | None = None,
    stop: Event | None = None,
) -> Tensor:
    """Put rows of one length into the cache and return logits [rows, positions kept, vocabulary].

    A row may be padded on its right in any case, for no token looks ahead; on its left with
    `front_padding`.

    Args:
        model: ready to run.
        rows: token ids, as many in each row.
        cache: holds as many sequences as there are rows, or none.
        keep: the positions within the rows whose logits are wanted; by default the last.
        front_padding: how many of the first tokens of each sequence, those in the cache included,
            stand for nothing.
        stop: looked at before each layer of a pass of several tokens.

    Raises:
        PassStoppedError: if it was stopped; the cache is of no use then.
        OutOfMemoryError: if the pass needs more memory than there is; the cache is of no use then.
    """
    import torch

    from rag.lm.lean_forward import lean_logits

    held, device = cache.get_seq_length(), model.device

    def logits() -> Tensor:
        options: dict[str, Any] = {}
        if front_padding is not None and any(front_padding):
            options = _shifted(model, front_padding, held, len(rows[0]))
        # Entered anew for each pass: a generator must not leave it on in its caller's thread.
        with torch.inference_mode(), stoppable(model, stop):
            if not options and keep is None:
                lean = lean_logits(model, rows, cache)
                if lean is not None:
                    return lean
            found: Tensor = model(
                input_ids=torch.tensor(rows, device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1 if keep is None else torch.tensor(keep, device=device),
                **options,
            ).logits
        return found

    return allocated(
        logits,
        f"with {held:,} tokens in the cache of {len(rows)} sequence(s), at the next"
        f" {len(rows[0]):,}",
    )


@contextmanager
def stoppable(model: Any, stop: Event | None) -> Iterator[None]:  # noqa: ANN401
    """Let a pass inside the block end before its next layer once `stop` is set.

    A layer is so much shorter than a pass that a person who stops does not wait for it; nothing
    that is computed changes. A model whose layers are not found is stopped between passes alone.

    Raises:
        PassStoppedError: where it was stopped.
    """

    def look(*_: object) -> None:
        if stop is not None and stop.is_set():
            raise PassStoppedError

    layers = () if stop is None else _layers(model)
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: Any) -> Iterable[Any]:  # noqa: ANN401
    """Return the layers of a model's decoder, in order."""
    from torch.nn import ModuleList

    parts = model.get_decoder().modules()  # from the outside in
    return next((part for part in parts if isinstance(part, ModuleList)), ())


def allocated(make: Callable[[], T], when: str) -> T:
    """Return what a step makes.

    Args:
        make: the step; what it holds is gone when the error is raised.
        when: for the error: `memory ran out` and this.

    Raises:
        OutOfMemoryError: if the step needs more memory than there is.
    """
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not is_allocation_failure(error):
            raise
        detail = str(error).strip().splitlines() or ["no memory"]
    # Raised here, where the error that holds the step's tensors is gone.
    raise OutOfMemoryError(f"memory ran out {when}: {detail[0]}")


def prefill_chunks(
    start: int, boundary: int, total: int, chunk_tokens: int
) -> Iterator[tuple[int, int]]:
    """Yield the `[start, end)` of each prefill chunk; one of them ends at the boundary."""
    while start < total:
        end = min(start + chunk_tokens, total)
        if start < boundary < end:
            end = boundary
        yield start, end
        start = end


def is_allocation_failure(error: Exception) -> bool:
    """Say whether an error of torch, of Python or of ours means that memory ran out."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemoryError)):
        return True
    return any(sign in str(error) for sign in _ALLOCATION_FAILED)


def _shifted(
    model: Any,  # noqa: ANN401
    front_padding: Sequence[int],
    held: int,
    new: int,
) -> dict[str, Tensor]:
    """Return the mask that hides the padding, and each row's own positions."""
    import torch

    padding = torch.tensor(front_padding, device=model.device)[:, None]
    slots = torch.arange(held + new, device=model.device)[None, :]
    options = {"attention_mask": (slots >= padding).long()}
    if takes_positions(type(model).forward):
        options["position_ids"] = (slots - padding)[:, held:]
    return options


@lru_cache
def takes_positions(forward: Callable[..., Any]) -> bool:
    """Say whether a model is told positions; the others work them out from the mask."""
    return "position_ids" in signature(forward).parameters
