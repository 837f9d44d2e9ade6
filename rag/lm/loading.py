"""From the name of a model to its parts: config, tokenizer, and weights that are read later."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import BrokenModelError, ModelError
from rag.lm.catalog import fetch_model, is_gguf, resolve_model, resolve_model_name
from rag.lm.device import choose_device
from rag.lm.engine import name_in_four_bits
from rag.lm.forward import is_allocation_failure
from rag.lm.spec import load_config
from rag.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Read from both ends of each file of weights to tell it from another of the same size.
_FINGERPRINT_BYTES = 2**20
# A quotation takes two or three. Of the default model's, each gains a twelfth of a second from
# weights in blocks, which take nine tenths of one (docs/log.md).
_SHORT_READINGS = 12


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is here, its weights not yet read.

    `dtype` and `device` are those that `load` gives the weights; `weights_id` tells these weights
    in this dtype from others of the same name. `hasten` makes a loaded model faster, see
    `Weights`. `extra_bytes` are those of weights beside them that tokens are decoded with, 0 if
    there are none; `name` says so then.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    weights_id: str
    load: Callable[[], Any]
    hasten: Callable[[Any], None]
    extra_bytes: int = 0

    def load_hastened(self) -> Any:  # noqa: ANN401
        """Return the model as it reads and writes for anything but a first short reading."""
        model = self.load()
        self.hasten(model)
        return model


class Weights:
    """A model's weights, read when they are first needed; engines that share them, read once.

    To make a model faster may take as long as a few short readings do. So the first readings that
    say that they are short get it as it is loaded: who asks one question in a process of its own
    does not wait for what only the tenth would gain.
    """

    def __init__(
        self,
        name: str,
        *,
        num_bytes: int,
        model: Any = None,  # noqa: ANN401 - a causal model of transformers
        load: Callable[[], Any] | None = None,
        hasten: Callable[[Any], None] | None = None,
    ) -> None:
        """Take the model, or what loads it; `name` and `num_bytes` are for the error.

        `hasten` makes a loaded model faster, in its place, and changes none of its numbers.
        """
        self.model = model
        self._load = load
        self._hasten = hasten
        self._short_left = _SHORT_READINGS
        self._name = name
        self._num_bytes = num_bytes

    def loaded(self, *, for_short: bool = False) -> Any:  # noqa: ANN401
        """Return the model, reading its weights on first use: one call at a time.

        Args:
            for_short: what is read is short, and nothing is written.

        Raises:
            ModelError: if there is no memory for them.
        """
        try:
            if self.model is None and self._load is not None:
                self.model = self._load()
            if for_short and self._short_left:
                self._short_left -= 1
            elif self._hasten is not None:
                self._hasten(self.model)
                self._hasten = None
        except (RuntimeError, MemoryError) as error:
            if not is_allocation_failure(error):
                raise
            size = self._num_bytes / 2**20
            raise ModelError(
                f"memory ran out while the weights of {self._name} were read: {size:,.0f} MiB",
                hint="free memory, or choose a smaller model with FATHOM_MODEL",
            ) from None
        return self.model


def open_model(name: str, settings: Settings) -> OpenedModel:
    """Return the parts of a model that has been fetched; its weights are not read yet.

    Args:
        name: a catalog name, a folder, a GGUF file, a hub id in the local cache, or auto.
        settings: device and the folder of fetched models.

    Raises:
        UnknownModelError: if nothing is called so.
        ModelFetchError: if it has not been fetched.
        UnsupportedModelError: if its config is not usable.
        BrokenModelError: if it has no usable tokenizer.
        SettingsError: if the device is not there.
    """
    # A GGUF file is here already; the first time, it is converted.
    folder = (fetch_model if is_gguf(name) else resolve_model)(name, settings)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from rag.lm.four_bit import four_bit_bytes, use_four_bit
    from rag.lm.integer_decoder import use_integers
    from rag.lm.lean_forward import use_lean_forward
    from rag.lm.lean_step import lean_step
    from rag.lm.packed_linear import use_packed_weights

    disable_progress_bar()  # type: ignore[no-untyped-call]
    device = choose_device(settings)
    config = load_config(folder)
    tokenizer = _load_tokenizer(folder, config)
    stored: Any = config.get_text_config(decoder=True).dtype or config.dtype or torch.float32
    dtype = torch.bfloat16 if device.type == "cuda" else stored
    four_bit = _four_bit(folder, settings, dtype, device)
    integers = _integers(folder, settings, device)
    decoded = " 4-bit" if four_bit else " integers" if integers else ""
    own_name = resolve_model_name(name, settings)

    def hasten(model: Any) -> None:  # noqa: ANN401
        use_packed_weights(model)
        can_be_lean = use_lean_forward(model)
        if integers is not None and can_be_lean:
            use_integers(model, integers)
        if four_bit is not None:
            use_four_bit(model, four_bit)
        if device.type == "cuda" and settings.cuda_graphs:
            lean_step(model)  # moves weights, so before caches take the memory

    return OpenedModel(
        name=name_in_four_bits(own_name) if four_bit else own_name,
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        weights_id=f"{_weights_fingerprint(folder)} {dtype}{decoded}",
        load=partial(load_weights, folder, dtype=dtype, device=device),
        hasten=hasten,
        extra_bytes=four_bit_bytes(four_bit, config)
        if four_bit
        else (integers.stat().st_size if integers else 0),
    )


def _integers(folder: Path, settings: Settings, device: torch.device) -> Path | None:
    """Return the file of whole numbers to write with; None where none are wanted, or usable."""
    from rag.lm.integer_weights import integers_file

    if settings.decode_weights != "integers" or device.type != "cpu":
        return None
    return integers_file(folder) if find_spec("openvino") else None


def _four_bit(
    folder: Path, settings: Settings, dtype: torch.dtype, device: torch.device
) -> Path | None:
    """Return the file of 4-bit weights to decode with; None where none are wanted, or usable."""
    import torch

    from rag.lm.four_bit import four_bit_file

    if settings.decode_weights != "4-bit":
        return None
    found = None
    if device.type == "cpu" and dtype == torch.bfloat16:
        found = four_bit_file(folder)
    if found is None:
        logger.warning(
            "%s has no 4-bit weights for this device, so it decodes with the stored ones; they come"
            " with a GGUF file that is fetched on a CPU with native bfloat16 by this version:"
            " delete its folder and fetch it again",
            folder.name,
        )
    return found


def load_weights(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:  # noqa: ANN401
    """Return the causal language model in `folder`, ready to run.

    What transformers would make up is refused: it fills a missing or misshapen weight with random
    numbers and goes on.

    Raises:
        BrokenModelError: if a file is damaged or absent, a weight is missing, has another shape
            than the config says or belongs to a layer that the config does not know, or holds
            values that are not finite.
        ModelError: if the weights do not fit the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from rag.lm.chunked_attention import use_chunked_attention
    from rag.lm.grouped_attention import use_grouped_attention

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # found below, with both shapes
        )
        model, report = loaded
        model = model.to(device).eval()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(
            f"the weights in {folder} do not fit the memory of {device.type}",
            hint="fathom plan --model NAME --tokens 4096 says what a model needs; choose a smaller",
        ) from error
    except Exception as error:  # whatever a damaged file makes of its readers
        damaged = _damaged_file(folder)
        found = f"{damaged} is damaged or cut short: " if damaged else ""
        raise _broken(folder, f"{found}{type(error).__name__}: {_one_line(error)}") from error
    _check_report(folder, report)
    _check_finite(folder, model)
    use_grouped_attention(model)
    use_chunked_attention(model)
    return model


def _load_tokenizer(folder: Path, config: PreTrainedConfig) -> Any:  # noqa: ANN401
    """Return the tokenizer in `folder`; it must not know tokens that the model does not."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a missing or damaged file makes of its readers
        found = ", ".join(sorted(path.name for path in folder.glob("*token*"))) or "none"
        raise BrokenModelError(
            f"there is no usable tokenizer in {folder} (tokenizer files: {found}):"
            f" {type(error).__name__}: {_one_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error
    known = int(config.get_text_config(decoder=True).vocab_size)
    if tokenizer.vocab_size > known:
        raise BrokenModelError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens, the model {known:,}",
            hint="it is another model's; copy the right tokenizer into the folder",
        )
    return tokenizer


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Refuse what transformers reports of the weights it did not find as it expected them."""
    if missing := sorted(report["missing_keys"]):
        raise _broken(folder, f"{_some(missing)} missing")
    if misshapen := sorted(map(tuple, report["mismatched_keys"])):
        name, found, expected = misshapen[0]
        raise _broken(
            folder, f"{name} has the shape {tuple(found)}, and the config says {tuple(expected)}"
        )
    if beyond := sorted(key for key in report["unexpected_keys"] if ".layers." in key):
        raise _broken(folder, f"{_some(beyond)} in no layer that the config knows")


def _check_finite(folder: Path, model: Any) -> None:  # noqa: ANN401
    """Refuse weights that are NaN or infinite; one pass over them, at the speed of memory."""
    import torch

    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if weight.numel() and weight.is_floating_point():
                smallest, largest = torch.aminmax(weight)
                if not (torch.isfinite(smallest) and torch.isfinite(largest)):
                    raise _broken(folder, f"{name} holds values that are not finite")


def _damaged_file(folder: Path) -> str | None:
    """Return the name of the first file of weights whose header does not describe its bytes."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return path.name
    return None


def _broken(folder: Path, found: str) -> BrokenModelError:
    return BrokenModelError(
        f"the weights in {folder} are not those of its config.json: {found}",
        hint="fetch the model again, whole and in one version: config.json and every"
        " *.safetensors file belong together",
    )


def _some(names: list[str]) -> str:
    """Return the first of the names and how many more there are, as a subject."""
    more = len(names) - 1
    return f"{names[0]} and {more} more weights are" if more else f"{names[0]} is"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


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
