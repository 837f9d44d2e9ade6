"""GGUF files: what their metadata says, and their conversion to safetensors, once."""

from __future__ import annotations

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import BrokenModelError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
    except Exception as error:
        raise _unusable(path, error) from error
    if getattr(config, "dtype", None) is None:
        config.dtype = torch.bfloat16  # what a GGUF file is converted to
    return config


def convert_gguf(path: Path, folder: Path) -> str:
    """Write a GGUF file's model as safetensors, with its tokenizer; return the stored dtype.

    The whole numbers that it holds are written beside it, for decoding; those of 4 bits once more
    where this machine has a product for them.

    Raises:
        BrokenModelError: if the file lacks weights of its architecture.
        UnsupportedModelError: if it is damaged, or its tokenizer or architecture not known.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from rag.lm.four_bit import write_four_bit
    from rag.lm.integer_weights import write_integers

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Without native bfloat16 a CPU prefills four times slower in it than in float32.
    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if native else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with redirect_stderr(StringIO()):  # the reader's progress bar cannot be switched off
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise _unusable(path, error) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise BrokenModelError(
            f"the GGUF file {path} lacks {len(missing)} weights, first {missing[0]}",
            hint="fetch the file again, or take the model as safetensors",
        )
    tensors: dict[str, torch.Tensor] = {}
    written: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in written:  # a tied weight has two names and one storage
            written.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if dtype == torch.bfloat16:
        write_four_bit(path, folder, model.config)
    if find_spec("openvino"):  # nothing else here multiplies with them
        write_integers(path, folder, model.config)
    return str(dtype).removeprefix("torch.")


def _unusable(path: Path, error: Exception) -> UnsupportedModelError:
    """Return the error that refuses a file: its readers raise whatever damage makes of them."""
    detail = " ".join(str(error).split())[:300]
    return UnsupportedModelError(
        f"the GGUF file {path} is not usable: {type(error).__name__}: {detail}",
        hint="fetch the file again; if it stays so, take the model as safetensors, or serve the"
        " file with llama.cpp and name that server",
    )
