"""Files of weights with a checksum of their own: whatever damage makes of them is a weight, too."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rag.errors import BrokenModelError


def weights_file(path: Path, key: str, expected: str | None) -> Path | None:
    """Return a file whose head says `expected` under `key`; None if it does not, or is not there.

    The weights are not read.

    Raises:
        BrokenModelError: if the head is damaged, or the file cut short.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(key)
    except SafetensorError as error:
        raise damaged_weights(path, str(error)) from error
    return path if written is not None and written == expected else None


def checked_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped to memory, whose checksum has been compared.

    Any whole number is a weight: unlike stored weights, damaged ones never look like none.

    Raises:
        BrokenModelError: if they are not those that were written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged_weights(path, str(error)) from error
    if (found := tensors_digest(tensors)) != expected:
        raise damaged_weights(path, f"its weights have SHA-256 {found}, expected {expected}")
    return tensors


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors: of their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def damaged_weights(path: Path, found: str) -> BrokenModelError:
    """Return the error that says so."""
    return BrokenModelError(
        f"{path} is damaged: {found}",
        hint="delete the model's folder and fetch it again, or decode with the stored weights:"
        " FATHOM_DECODE_WEIGHTS=stored",
    )
