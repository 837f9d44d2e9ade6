"""Weights of 4 bits for the one-token pass, taken from a GGUF file's own blocks.

A decoded token reads every weight once, so what a weight takes is what a token takes. The blocks of
Q4_0, Q4_1 and Q4_K hold 32 weights as whole numbers from 0 to 15 with a scale and an offset, which
is what torch's packed product on a CPU multiplies by: they are put in its order, not rounded anew.
Only scale and offset are rounded, to bfloat16. Tensors of other formats stay as they are, so do
prompts, for which bfloat16 is faster.

The product adds up in another order and the model reads other scales than in bfloat16: a close
choice can fall the other way. So it is asked for (FATHOM_DECODE_WEIGHTS), and the engine's name
says it.

Source: docs/decisions/0034; block formats: ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rag.lm.gguf_blocks import PARTS, in_halves, read_blocks, side_by_side
from rag.lm.lean_forward import LEAN_FAMILIES, lean_pass
from rag.lm.lean_layers import LeanLayer
from rag.lm.packed_linear import PackedLinear, can_pack
from rag.lm.weights_checksum import checked_weights, tensors_digest, weights_file

FILE_NAME = "four_bit.weights"

_GROUP = 32
# Of both sides of a weight: the kernel's blocks.
_SIDE = 64
# The kernel's layout follows the CPU's vectors, and is written as this machine wants it.
_FORMAT = "fathom four bit 2"
# More rows than this and bfloat16 is as fast.
MOST_ROWS = 4


class FourBitLinear(torch.nn.Module):
    """A linear layer of 4-bit weights, 32 in a row sharing a scale and an offset."""

    def __init__(self, blocks: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """Take what `pack` gave."""
        super().__init__()
        self._blocks, self._scales, self._bias = blocks, scales, bias
        self.in_features, self.out_features = scales.shape[0] * _GROUP, scales.shape[1]

    def forward(self, states: Tensor) -> Tensor:
        """Return bfloat16 [..., out] of [..., in]."""
        rows = states.reshape(-1, states.shape[-1])
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._blocks, _GROUP, self._scales
        )
        if self._bias is not None:
            found = found + self._bias
        return found.view(*states.shape[:-1], -1)


def layout() -> str | None:
    """Return the name of this CPU's layout of packed weights; None if it has no such product."""
    numbers = torch.arange(64 * 64, dtype=torch.int32).view(64, 64) % 16
    scales = torch.full((64, 2), 0.5)
    try:
        linear = FourBitLinear(*pack(numbers, scales, 4 * scales))
        states = torch.eye(64, dtype=torch.bfloat16)[:2]
        with torch.inference_mode():
            found = linear(states).float()
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    if not torch.equal(found, (0.5 * numbers + 2).float()[:, :2].T):
        return None
    return f"{_FORMAT}, {torch.backends.cpu.get_cpu_capability()}"


def pack(numbers: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights `scale * number + offset` as the kernel wants them.

    Args:
        numbers: int32 [out, in], 0 to 15.
        scales: float32 [out, in / 32]; so are `offsets`.
        offsets: what is added.

    Returns:
        The packed numbers, uint8 [out, in / 2], and bfloat16 [in / 32, out, 2].
    """
    blocks = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    # It multiplies number - 8 by the scale and adds what stands for a number of 8.
    pairs = torch.stack([scales, offsets + 8 * scales], dim=-1)
    return blocks, pairs.transpose(0, 1).contiguous().bfloat16()


def write_four_bit(path: Path, folder: Path, config: Any) -> int:  # noqa: ANN401
    """Write what a GGUF file holds in 4 bits into a model's folder; return the bytes, 0 for none.

    Args:
        path: the GGUF file.
        folder: where its conversion lies.
        config: of the model.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    text = config.get_text_config(decoder=True)
    here = layout()
    if here is None or text.model_type not in LEAN_FAMILIES:
        return 0
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    tensors: dict[str, Tensor] = {}
    for index in range(int(text.num_hidden_layers)):
        for part, names in PARTS.items():
            pieces = []
            for name in names:
                tensor = found[f"blk.{index}.{name}.weight"]
                piece = read_blocks(np.asarray(tensor.data), tensor.tensor_type.name)
                if piece is None or not piece.is_four_bit:
                    break
                if any(side % _SIDE for side in piece.numbers.shape):
                    break
                is_turned = text.model_type == "llama" and name in ("attn_q", "attn_k")
                pieces.append(in_halves(piece, int(text.head_dim)) if is_turned else piece)
            if len(pieces) == len(names):
                (joined,) = side_by_side(pieces)
                assert joined.offsets is not None  # every format of 4 bits has them
                blocks, scales = pack(
                    torch.from_numpy(joined.numbers).int(),
                    torch.from_numpy(joined.scales),
                    torch.from_numpy(joined.offsets),
                )
                tensors[f"{index}.{part}.blocks"] = blocks
                tensors[f"{index}.{part}.scales"] = scales
    if not tensors:
        return 0
    about = {"layout": here, "sha256": tensors_digest(tensors)}
    save_file(tensors, folder / FILE_NAME, metadata=about)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def four_bit_file(folder: Path) -> Path | None:
    """Return the file of a model's 4-bit weights, None where there is none for this CPU.

    Its head alone is read; `use_four_bit` reads the weights.

    Raises:
        BrokenModelError: if that is damaged, or the file cut short.
    """
    return weights_file(folder / FILE_NAME, "layout", layout())


def four_bit_bytes(path: Path, config: Any) -> int:  # noqa: ANN401
    """Return the memory that decoding with a file's weights takes beside the model's own.

    The output head counts where it is the embeddings too: it is put in blocks beside them.
    """
    text = config.get_text_config(decoder=True)
    head = int(text.vocab_size) * int(text.hidden_size) * 2 if text.tie_word_embeddings else 0
    return path.stat().st_size + head


def use_four_bit(model: Any, path: Path) -> None:  # noqa: ANN401 - a causal model of transformers
    """Let the one-token pass of a model multiply by the 4-bit weights of a file, mapped to memory.

    Args:
        model: one that `use_lean_forward` took.
        path: what `four_bit_file` gave.

    Raises:
        BrokenModelError: if the weights are not those that were written; nothing is changed then.
    """
    lean = lean_pass(model)
    assert lean is not None, "the model has no lean forward"
    tensors = checked_weights(path)
    layers = []
    for index, layer in enumerate(lean.layers):
        parts = {}
        for part in PARTS:
            plain = getattr(layer, part)
            if f"{index}.{part}.blocks" in tensors:
                bias = _bias(plain)
                blocks = tensors[f"{index}.{part}.blocks"]
                plain = (FourBitLinear(blocks, tensors[f"{index}.{part}.scales"], bias),)
            parts[part] = plain
        layers.append(
            LeanLayer(layer.before_attention, layer.before_feed_forward, layer.act, **parts)
        )
    lean.few_layers = layers
    lean.most_few_rows = MOST_ROWS
    if type(lean.head) is torch.nn.Linear and can_pack():
        lean.few_head = PackedLinear(lean.head)


@contextmanager
def without_four_bit(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let a model decode with its own weights meanwhile: the plain twin, for comparisons."""
    lean = lean_pass(model)
    rows = lean.most_few_rows if lean else 0
    if lean:
        lean.most_few_rows = 0
    try:
        yield
    finally:
        if lean:
            lean.most_few_rows = rows


def _bias(linears: Sequence[Any]) -> Tensor | None:
    found = [linear.bias for linear in linears]
    return None if found[0] is None else torch.cat(found)
