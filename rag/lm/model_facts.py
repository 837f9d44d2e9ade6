"""What is known of a model by its name, before any of its weights is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import ModelFetchError, UnknownModelError, UnsupportedModelError
from rag.lm.catalog import is_gguf, load_catalog, resolve_model, resolve_model_name
from rag.lm.device import choose_device
from rag.lm.gguf_models import load_gguf_config
from rag.lm.known_models import find_known_model, known_models
from rag.lm.spec import ModelSpec, load_config
from rag.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's shape and where it is known from.

    `file_bytes` is the size of its weight files, None where they are not here; `quantization` is
    the format of a checkpoint that is not stored in the dtype the engine computes with.
    """

    name: str
    source: str
    spec: ModelSpec
    file_bytes: int | None
    quantization: str | None


def find_model_facts(name: str, settings: Settings) -> ModelFacts:
    """Return the facts of a model; nothing is fetched, and no weight is read.

    Args:
        name: a catalog name, a folder with a config.json, a GGUF file, a hub id whose config is in
            the local cache, one of the known models, or auto.
        settings: where fetched models are.

    Raises:
        UnknownModelError: if the name is none of these.
        UnsupportedModelError: if the config or the file is not usable, or the bytes of its cache
            cannot be predicted exactly.
    """
    name = resolve_model_name(name, settings)
    device_type = choose_device(settings).type
    if is_gguf(name):
        path = Path(name).expanduser()
        spec = ModelSpec.from_config(load_gguf_config(path)).on_device(device_type)
        return ModelFacts(path.stem, f"the metadata of {path}", spec, path.stat().st_size, "GGUF")
    folder = _config_folder(name, settings)
    if folder is not None:
        config = load_config(folder)
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        return ModelFacts(
            name=name,
            source=f"the config.json in {folder.name}",
            spec=ModelSpec.from_config(config).on_device(device_type),
            file_bytes=sum(sizes) or None,
            quantization=_quantization(config),
        )
    known = find_known_model(name)
    if known is None:
        raise UnknownModelError(
            f"{name!r} is neither in the catalog nor among the known models, nor a folder with a"
            " config.json, nor a GGUF file, nor a hub id in the local cache",
            hint=f"fetch it first: fathom models fetch NAME; known are {', '.join(known_models())}",
        )
    from transformers import AutoConfig

    fields = dict(known.config)
    known_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return ModelFacts(
        name=known.name,
        source=f"{known.hub_repos[0]}: {known.source}",
        spec=ModelSpec.from_config(known_config).on_device(device_type),
        file_bytes=None,
        quantization=known.quantization,
    )


def _config_folder(name: str, settings: Settings) -> Path | None:
    """Return the folder of a model that is here, or at least its config; None if neither is."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"the folder {path} holds no config.json",
            hint="give the folder of a model as transformers writes it, or a GGUF file itself",
        )
    try:
        return resolve_model(name, settings)
    except (UnknownModelError, ModelFetchError):
        if name in load_catalog() or name.count("/") != 1:
            return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _quantization(config: Any) -> str | None:  # noqa: ANN401
    """Return the method of a quantised checkpoint, None if it is not quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))
