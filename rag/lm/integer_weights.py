"""The whole numbers that a model's GGUF file holds, kept beside its conversion: for decoding.

A decoded token reads every weight once, so what the weights take is what a token takes. The
conversion to bfloat16, which prompts are read with, takes two bytes a weight and rounds it; the
file's own numbers take a byte or half of one, and are not rounded.

Source: docs/decisions/0034.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rag.lm.gguf_blocks import PARTS, Blocks, in_halves, read_blocks, side_by_side
from rag.lm.lean_forward import LEAN_FAMILIES
from rag.lm.weights_checksum import checked_weights, tensors_digest, weights_file

FILE_NAME = "integers.weights"

_FORMAT = "fathom integers 2"

_NORMS = ("attn_norm", "ffn_norm")


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Weights `scales * (numbers - middles)`, as a file holds them; mapped to memory.

    `numbers` are int8 [out, in], or uint8 [out, in / 2] with two of 4 bits in a byte, the first one
    low; `scales` and `middles` float32 [out, in / group]; no middles stand for zero.
    """

    numbers: np.ndarray
    scales: np.ndarray
    middles: np.ndarray | None

    @property
    def is_four_bit(self) -> bool:
        """Whether a byte holds two numbers."""
        return self.numbers.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, int]:
        """The sides, out and in."""
        out, width = self.numbers.shape
        return out, 2 * width if self.is_four_bit else width

    @property
    def group(self) -> int:
        """How many weights of a row share a scale."""
        return int(self.shape[1] // self.scales.shape[1])

    def rows(self, places: list[int]) -> np.ndarray:
        """Return some of the rows, float32 [rows, in]."""
        numbers = self.numbers[places]
        if self.is_four_bit:
            numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
        groups = numbers.reshape(len(places), -1, self.group).astype(np.float32)
        if self.middles is not None:
            groups = groups - self.middles[places][..., None]
        found: np.ndarray = (groups * self.scales[places][..., None]).reshape(len(places), -1)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class IntegerLayer:
    """The matrices of a layer by part, those of one part side by side; norms and biases float32."""

    parts: dict[str, list[Matrix]]
    before_attention: np.ndarray
    before_feed_forward: np.ndarray
    qkv_bias: np.ndarray | None


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeights:
    """All weights of a model; `embeddings` are `head` where they are tied."""

    embeddings: Matrix
    layers: list[IntegerLayer]
    norm: np.ndarray
    head: Matrix


def write_integers(path: Path, folder: Path, config: Any) -> int:  # noqa: ANN401
    """Write a GGUF file's whole numbers into a model's folder; return the bytes, 0 for none.

    None are written for a family that they cannot decode, for one with weights that its plain form
    has not, or where a matrix is in another format.

    Args:
        path: the GGUF file.
        folder: where its conversion lies.
        config: of the model.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    text = config.get_text_config(decoder=True)
    if text.model_type not in LEAN_FAMILIES:
        return 0
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    is_turned = text.model_type == "llama"
    own_width = int(text.hidden_size) // int(text.num_attention_heads)
    head_width = int(getattr(text, "head_dim", None) or own_width)
    matrices = {"embeddings": ["token_embd"]}
    if "output.weight" in found:
        matrices["head"] = ["output"]
    vectors = {"norm": ["output_norm.weight"]}
    for index in range(int(text.num_hidden_layers)):
        for part, members in PARTS.items():
            matrices[f"{index}.{part}"] = [f"blk.{index}.{name}" for name in members]
        for norm in _NORMS:
            vectors[f"{index}.{norm}"] = [f"blk.{index}.{norm}.weight"]
        biases = [f"blk.{index}.{name}.bias" for name in PARTS["qkv"]]
        if biases[0] in found and not is_turned:
            vectors[f"{index}.qkv.bias"] = biases
    known = {f"{name}.weight" for names in matrices.values() for name in names}
    known |= {name for names in vectors.values() for name in names}
    if set(found) - {"rope_freqs.weight"} != known:  # the angles are the model's own code's
        return 0

    tensors: dict[str, Tensor] = {}
    for key, names in vectors.items():
        plain = [np.array(found[name].data, dtype=np.float32) for name in names]
        tensors[key] = torch.from_numpy(np.concatenate(plain))
    for key, names in matrices.items():
        pieces = []
        for name in names:
            tensor = found[f"{name}.weight"]
            blocks = read_blocks(np.asarray(tensor.data), tensor.tensor_type.name)
            if blocks is None:
                return 0
            is_pairwise = is_turned and name.endswith(("attn_q", "attn_k"))
            pieces.append(in_halves(blocks, head_width) if is_pairwise else blocks)
        for number, blocks in enumerate(side_by_side(pieces)):
            tensors |= {f"{key}.{number}.{name}": tensor for name, tensor in _kept(blocks).items()}
    about = {"format": _FORMAT, "sha256": tensors_digest(tensors)}
    save_file(tensors, folder / FILE_NAME, metadata=about)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def integers_file(folder: Path) -> Path | None:
    """Return the file of a model's whole numbers, None where there is none that can be read here.

    Its head alone is read; `load_integers` compares its checksum.

    Raises:
        BrokenModelError: if that is damaged, or the file cut short.
    """
    return weights_file(folder / FILE_NAME, "format", _FORMAT)


def load_integers(path: Path) -> IntegerWeights:
    """Return what a file of `write_integers` holds, mapped to memory.

    Raises:
        BrokenModelError: if it is not what was written.
    """
    tensors = {name: tensor.numpy() for name, tensor in checked_weights(path).items()}

    def matrices(key: str) -> list[Matrix]:
        found: list[Matrix] = []
        while f"{key}.{len(found)}.numbers" in tensors:
            own = f"{key}.{len(found)}"
            middles = tensors.get(f"{own}.middles")
            found.append(Matrix(tensors[f"{own}.numbers"], tensors[f"{own}.scales"], middles))
        return found

    layers: list[IntegerLayer] = []
    while f"{len(layers)}.{_NORMS[0]}" in tensors:
        own = len(layers)
        before_attention, before_feed_forward = (tensors[f"{own}.{norm}"] for norm in _NORMS)
        layers.append(
            IntegerLayer(
                {part: matrices(f"{own}.{part}") for part in PARTS},
                before_attention,
                before_feed_forward,
                tensors.get(f"{own}.qkv.bias"),
            )
        )
    (embeddings,) = matrices("embeddings")
    head = matrices("head")
    return IntegerWeights(embeddings, layers, tensors["norm"], head[0] if head else embeddings)


def _kept(blocks: Blocks) -> dict[str, Tensor]:
    """Return what the file holds of some blocks, see `Matrix`."""
    numbers, scales, offsets = blocks.numbers, blocks.scales, blocks.offsets
    kept = {}
    if offsets is not None:
        # A group whose weights are all one offset has no scale: 0 less -1 of the offset.
        is_flat = (scales == 0) & (offsets != 0)
        numbers = np.where(np.repeat(is_flat, blocks.group, axis=1), np.int8(0), numbers)
        scales = np.where(is_flat, offsets, scales)
        middles = np.divide(-offsets, scales, out=np.zeros_like(scales), where=scales != 0)
        kept["middles"] = torch.from_numpy(middles)
    if blocks.is_four_bit:
        pairs = numbers.astype(np.uint8)
        numbers = pairs[:, ::2] | (pairs[:, 1::2] << 4)
    kept["numbers"] = torch.from_numpy(np.ascontiguousarray(numbers))
    kept["scales"] = torch.from_numpy(np.ascontiguousarray(scales))
    return kept
