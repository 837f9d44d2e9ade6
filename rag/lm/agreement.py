"""How near two ways to the same numbers come: what a self-test holds a fast one to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Root mean square, relative; what is wrong is off by about 1, what is rounded by less than this.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_16_BIT = 0.1


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference as a share of what was expected.

    Infinite if any is not a number.
    """
    expected = expected.float()
    share = float((found.float() - expected).norm() / expected.norm())
    return share if share == share else float("inf")


def tolerance(model: Any) -> float:  # noqa: ANN401 - a torch module
    """Return the `difference` that rounding makes in the model's dtype, at most."""
    return _TOLERANCE.get(model.dtype, _TOLERANCE_16_BIT)
