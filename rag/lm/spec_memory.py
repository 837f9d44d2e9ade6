"""A model's spec from one process to the next: to work it out, half a second of its code is run."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import StoreError
from rag.lm.layers import LayerSpec
from rag.lm.meta_model import Activations
from rag.lm.spec import ModelSpec, PositionRange
from rag.store.calibrations import CalibrationStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# What works a spec out: a change in one of these makes all of them be worked out anew.
_CODE = (
    "layers.py",
    "meta_model.py",
    "spec.py",
    "grouped_attention.py",
    "chunked_attention.py",
)


def remembered_spec(
    config: PreTrainedConfig, *, dtype_bytes: int | None, calibrations: CalibrationStore | None
) -> ModelSpec:
    """Return `ModelSpec.from_config`, or what it was for the same config, libraries and code.

    Args:
        config: of the model.
        dtype_bytes: bytes of one element of the weights, see there.
        calibrations: where it is remembered; by default it is worked out each time.

    Raises:
        UnsupportedModelError: as there; a refusal is not remembered.
    """
    if calibrations is None:
        return ModelSpec.from_config(config, dtype_bytes=dtype_bytes)
    key = _key(config, dtype_bytes)
    kept = calibrations.load(key)
    if kept is None:
        spec = ModelSpec.from_config(config, dtype_bytes=dtype_bytes)
        try:
            calibrations.save(key, asdict(spec))
        except StoreError as error:  # the next process works it out again
            logger.warning("the shape of the model is not remembered: %s", error.message)
        return spec
    return _from_json(kept)


def _from_json(kept: dict[str, Any]) -> ModelSpec:
    parts = {
        "layers": tuple(LayerSpec(**layer) for layer in kept["layers"]),
        "positions": tuple(PositionRange(**reach) for reach in kept["positions"]),
        "activations": Activations(**kept["activations"]),
    }
    return ModelSpec(**(kept | parts))


def _key(config: PreTrainedConfig, dtype_bytes: int | None) -> str:
    import torch
    import transformers

    digest = hashlib.sha256(config.to_json_string(use_diff=False).encode())
    for name in _CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return (
        f"spec: {digest.hexdigest()}, {dtype_bytes} bytes,"
        f" torch {torch.__version__}, transformers {transformers.__version__}"
    )
