"""From the name of a model to its parts: config, tokenizer, and weights that are read later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.lm.catalog import resolve_model, resolve_model_name
from rag.lm.device import choose_device
from rag.lm.spec import load_config
from rag.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# Read from both ends of each file of weights to tell it from another of the same size.
_FINGERPRINT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is here, its weights not yet read.

    `dtype` and `device` are those that `load` gives the weights; `weights_id` tells these weights
    in this dtype from others of the same name.
    """

    name: str
    config: PreTrainedConfig
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    weights_id: str
    load: Callable[[], Any]


def open_model(name: str, settings: Settings) -> OpenedModel:
    """Return the parts of a model that has been fetched; its weights are not read yet.

    Args:
        name: a catalog name, a folder, a hub id in the local cache, or auto.
        settings: device and the folder of fetched models.

    Raises:
        UnknownModelError: if nothing is called so.
        ModelFetchError: if it has not been fetched.
        UnsupportedModelError: if its config is not usable.
        SettingsError: if the device is not there.
    """
    folder = resolve_model(name, settings)

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = choose_device(settings)
    config = load_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    stored: Any = config.get_text_config(decoder=True).dtype or config.dtype or torch.float32
    dtype = torch.bfloat16 if device.type == "cuda" else stored
    return OpenedModel(
        name=resolve_model_name(name, settings),
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        weights_id=f"{_weights_fingerprint(folder)} {dtype}",
        load=lambda: load_weights(folder, dtype=dtype, device=device),
    )


def load_weights(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    """Return the causal language model in `folder`, ready to run."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    return model.to(device).eval()


def _weights_fingerprint(folder: Path) -> str:
    """Return what tells a model's files from another version of them, without reading all bytes.

    Each file counts with its name, size, time of change, and both ends.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, stat.st_size - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
