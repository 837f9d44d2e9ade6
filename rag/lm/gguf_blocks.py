"""Blocks of a GGUF file as what they are: whole numbers that share a scale, and nothing rounded.

A weight of such a file is `scale * number`, or `scale * number + offset`, with one scale for the 16
or 32 weights of a group. Read so, a weight takes a byte or half of one, and is the file's own; as
bfloat16 it takes two and is rounded.

Source: ggml-quants.c of llama.cpp; tests compare with the package `gguf`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Matrices of a layer that multiply the same states, by their names in a GGUF file.
PARTS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Weights `scales * numbers + offsets`, each group of a row with its own.

    `numbers` are int8 [out, in], 0 to 15 where `is_four_bit`; `scales` and `offsets` float32
    [out, in / group]; no offsets stand for zero.
    """

    numbers: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    is_four_bit: bool

    @property
    def group(self) -> int:
        """How many weights of a row share a scale."""
        return int(self.numbers.shape[1] // self.scales.shape[1])


def read_blocks(data: np.ndarray, kind: str) -> Blocks | None:
    """Return a matrix of a GGUF file; None for a format that is not read here.

    Args:
        data: uint8 [out, bytes of a row].
        kind: the format's name, Q5_0 say.
    """
    read = _READERS.get(kind)
    if read is None:
        return None
    size, reader = read
    return reader(data.reshape(data.shape[0], -1, size))


def _q4_0(blocks: np.ndarray) -> Blocks:
    scales = _halves(blocks[..., :2])[..., 0]
    return _four_bit(_nibbles(blocks[..., 2:]), scales, -8 * scales)


def _q4_1(blocks: np.ndarray) -> Blocks:
    halves = _halves(blocks[..., :4])
    return _four_bit(_nibbles(blocks[..., 4:]), halves[..., 0], halves[..., 1])


def _q5_0(blocks: np.ndarray) -> Blocks:
    scales = _halves(blocks[..., :2])[..., 0]
    numbers = _nibbles(blocks[..., 6:]) + 16 * _bits(blocks[..., 2:6]) - 16
    return _eight_bit(numbers, scales)


def _q5_1(blocks: np.ndarray) -> Blocks:
    halves = _halves(blocks[..., :4])
    numbers = _nibbles(blocks[..., 8:]) + 16 * _bits(blocks[..., 4:8])
    return _eight_bit(numbers, halves[..., 0], halves[..., 1])


def _q8_0(blocks: np.ndarray) -> Blocks:
    return _eight_bit(blocks[..., 2:].view(np.int8), _halves(blocks[..., :2])[..., 0])


def _q4_k(blocks: np.ndarray) -> Blocks:
    scales, offsets = _k_scales(blocks)
    numbers = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return _four_bit(numbers, scales, offsets)


def _q5_k(blocks: np.ndarray) -> Blocks:
    scales, offsets = _k_scales(blocks)
    low = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32))
    # Bit g of byte i is the fifth of number i of group g.
    fifth = (blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    numbers = low.reshape(fifth.shape) + 16 * fifth
    return _eight_bit(numbers, scales, offsets)


def _q6_k(blocks: np.ndarray) -> Blocks:
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    fours = np.concatenate([low & 15, low >> 4], axis=-2)
    twos = (high >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & 3
    numbers = (fours | (twos << 4)).astype(np.int8) - 32
    scales = blocks[..., 192:208].view(np.int8).astype(np.float32)
    return _eight_bit(numbers, scales * _halves(blocks[..., 208:]))


def side_by_side(pieces: Sequence[Blocks]) -> list[Blocks]:
    """Return the blocks as one matrix where they are of one kind, else as they are."""
    kinds = {(each.is_four_bit, each.group, each.offsets is None) for each in pieces}
    if len(kinds) > 1:
        return list(pieces)
    offsets = [each.offsets for each in pieces if each.offsets is not None]
    return [
        Blocks(
            np.concatenate([each.numbers for each in pieces]),
            np.concatenate([each.scales for each in pieces]),
            np.concatenate(offsets) if offsets else None,
            is_four_bit=pieces[0].is_four_bit,
        )
    ]


def in_halves(blocks: Blocks, head_width: int) -> Blocks:
    """Return the rows of queries or keys in transformers' order, heads of `head_width` rows.

    llama.cpp has the pairs that are turned together adjacent, transformers half a head apart.
    """
    order = np.arange(len(blocks.numbers)).reshape(-1, head_width // 2, 2).swapaxes(1, 2).ravel()
    return Blocks(
        blocks.numbers[order],
        blocks.scales[order],
        None if blocks.offsets is None else blocks.offsets[order],
        is_four_bit=blocks.is_four_bit,
    )


# Bytes of a block, and what reads blocks [out, blocks of a row, bytes].
_READERS: dict[str, tuple[int, Callable[[np.ndarray], Blocks]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}


def _four_bit(numbers: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> Blocks:
    rows = len(scales)
    return Blocks(numbers.reshape(rows, -1), *_by_row(rows, scales, offsets), is_four_bit=True)


def _eight_bit(
    numbers: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None
) -> Blocks:
    rows = len(scales)
    found = numbers.astype(np.int8).reshape(rows, -1)
    return Blocks(found, *_by_row(rows, scales, offsets), is_four_bit=False)


def _by_row(
    rows: int, scales: np.ndarray, offsets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    return scales.reshape(rows, -1), None if offsets is None else offsets.reshape(rows, -1)


def _halves(data: np.ndarray) -> np.ndarray:
    return data.copy().view(np.float16).astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Return int8 [..., 2 * n] of n bytes: the low halves of all, then the high halves."""
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.int8)


def _bits(data: np.ndarray) -> np.ndarray:
    """Return int8 [..., 8 * n] of n bytes, the lowest first."""
    return np.unpackbits(data, axis=-1, bitorder="little").astype(np.int8)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and offsets [out, blocks, 8] of Q4_K and Q5_K.

    Eight scales and eight minima of 6 bits: the last four of each are spread over two bytes.
    """
    halves = _halves(blocks[..., :4])
    packed = blocks[..., 4:16].reshape(*blocks.shape[:2], 3, 4)
    low, high, rest = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
    sizes = np.concatenate([low & 63, (rest & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | ((high >> 6) << 4)], axis=-1)
    return halves[..., :1] * sizes, -halves[..., 1:] * minima
