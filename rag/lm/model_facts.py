"""What is known of a model by its name, before any of its weights is read."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import ModelFetchError, UnknownModelError, UnsupportedModelError
from rag.lm.catalog import load_catalog, resolve_model, resolve_model_name
from rag.lm.known_models import find_known_model, known_models
from rag.lm.spec import ModelSpec, load_config
from rag.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and (path.is_file() or not find_known_model(name)):
        spec = ModelSpec.from_config(load_gguf_config(path))
        return ModelFacts(path.stem, f"the metadata of {path}", spec, path.stat().st_size, "GGUF")
    folder = _config_folder(name, settings)
    if folder is not None:
        config = load_config(folder)
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        return ModelFacts(
            name=name,
            source=f"the config.json in {folder}",
            spec=ModelSpec.from_config(config),
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
        spec=ModelSpec.from_config(known_config),
        file_bytes=None,
        quantization=known.quantization,
    )


def load_gguf_config(path: Path) -> PreTrainedConfig:
    """Return the config that a GGUF file's metadata amounts to; its tensors are not read.

    Raises:
        UnsupportedModelError: if there is no such file, it is no GGUF file or is cut short, or
            transformers does not know its architecture.
    """
    import torch
    from transformers import AutoConfig

    if not path.is_file():
        raise UnsupportedModelError(
            f"there is no file {path}", hint="give the path of a GGUF file or another model"
        )
    try:
        with redirect_stderr(StringIO()):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # its reader raises whatever a damaged file makes of its code
        detail = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(
            f"the GGUF file {path} is not usable: {type(error).__name__}: {detail}",
            hint="fetch the file again; if it stays so, take the model as safetensors, or serve the"
            " file with llama.cpp and name that server",
        ) from error
    if getattr(config, "dtype", None) is None:
        config.dtype = torch.bfloat16  # what a GGUF file is converted to
    return config


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
