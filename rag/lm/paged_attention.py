"""Attention of a prompt's chunk on a CPU by OpenVINO's paged kernel, which needs no mask.

torch's kernel for a CPU reads a mask and computes what it hides, and its softmax leaves it at a
third of what the products could do. The kernel that OpenVINO has for serving computes a block of 32
queries against the keys that these see, in bfloat16 with scores and sums in float32, as torch does:
two to three times as fast, and as near to the exact result. Its sums are added up in another order,
so the last bits differ.

It reads keys and values in blocks of 32 tokens, as those of one key head lie in the cache already:
nothing is copied but an unfinished last block. So each key head is attended to by itself, with the
queries that share it.

Source: PagedAttention, arXiv:2309.06180; OpenVINO 2026.4; docs/decisions/0041.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rag.lm.agreement import difference
from rag.lm.partial_attention import attend_plain
from rag.lm.peak_bytes import BLOCK_TOKENS
from rag.runtime import load_openvino

logger = logging.getLogger(__name__)

# Fewer queries are computed as soon under a mask.
FEWEST_QUERIES = 64
# What rounding to bfloat16 makes of the same attention, at most.
_TOLERANCE = 0.02
# Of the node's 28 inputs these are given with each call, the others when it is made.
_GIVEN = ("query", "key", "value", "keys", "values", "past", "begins", "blocks", "first", "longest")


def attend_paged(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor | None:
    """Attend causally to a cache of one sequence that ends with the queries' own tokens.

    Args:
        query: [1, H, T, D].
        key: [1, G, K, D] with H a multiple of G and K at least T; so is `value`.
        value: [1, G, K, D].
        scale: the factor of the scores.

    Returns:
        [1, T, H, D]; None, and nothing done, where the kernel is not to be had for this, or no
        faster.
    """
    (H, T, D), (G, K) = query.shape[1:], key.shape[1:3]
    kernel = paged_kernel(query, key, value, scale=scale)
    if kernel is None:
        return None
    pages = Pages.of_one(T, K)
    rows = query.view(G, H // G, T, D).transpose(1, 2).reshape(G, T, -1)
    seen = torch.empty(T, G, rows.shape[-1], dtype=query.dtype)
    for head in range(G):
        seen[:, head] = kernel.attend(
            rows[head],
            (key[0, head, K - T :], value[0, head, K - T :]),
            (_in_blocks(key[0, head]), _in_blocks(value[0, head])),
            pages,
        )
    return seen.view(1, T, H, D)


def paged_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int = 0,
    extra_width: int = 0,
) -> PagedKernel | None:
    """Return what computes such an attention; None where there is nothing, or nothing faster.

    Args:
        query: [B, H, T, D].
        key: [B, G, K, D] with H a multiple of G; so is `value`.
        value: [B, G, K, D].
        scale: the factor of the scores.
        window: the last keys that a query sees, its own included; 0 if there is no end.
        extra_width: by which heads will be widened.
    """
    (B, H, T, D), G = query.shape, key.shape[1]
    if B != 1 or T < FEWEST_QUERIES or key.shape[-1] != value.shape[-1]:
        return None
    if query.device.type != "cpu" or not query.dtype == key.dtype == torch.bfloat16:
        return None
    return _kernel(H // G, D + extra_width, scale, window, torch.get_num_threads())


def has_paged_attention(group: int, width: int) -> bool:
    """Say whether there is a kernel here for so many queries of so wide heads to a key head."""
    return _kernel(group, width, width**-0.5, 0, torch.get_num_threads()) is not None


@dataclass(frozen=True, slots=True)
class Pages:
    """Which blocks of keys each of some sequences sees, in order, and where its queries are.

    Arrays of int32: `past` [sequences] counts the keys before a sequence's first query, `begins`
    [sequences + 1] its queries among all; `blocks` are the blocks of all sequences one after the
    other, `first` [sequences + 1] where each one's begin; `longest` [] is the most keys of one.
    """

    past: np.ndarray
    begins: np.ndarray
    blocks: np.ndarray
    first: np.ndarray
    longest: np.ndarray

    @classmethod
    def of_one(cls, num_queries: int, num_keys: int) -> Pages:
        """Return those of one sequence whose queries are the newest of its keys."""
        return cls.of(
            [num_keys - num_queries], [num_queries], [range(-(-num_keys // BLOCK_TOKENS))]
        )

    @classmethod
    def of(
        cls, past: Sequence[int], num_queries: Sequence[int], blocks: Sequence[Sequence[int]]
    ) -> Pages:
        """Return those of some sequences: keys before, queries, and blocks of each."""
        longest = max(before + own for before, own in zip(past, num_queries, strict=True))
        return cls(
            past=np.array(past, np.int32),
            begins=np.cumsum([0, *num_queries], dtype=np.int32),
            blocks=np.concatenate([np.asarray(one, np.int32) for one in blocks]),
            first=np.cumsum([0, *map(len, blocks)], dtype=np.int32),
            longest=np.array(longest, np.int32),
        )


class PagedKernel:
    """Attention to one key head, compiled; one call at a time."""

    def __init__(
        self, group: int, width: int, scale: float, *, window: int = 0, num_threads: int
    ) -> None:
        """Compile.

        Args:
            group: query heads that share the key head.
            width: of a head.
            scale: the factor of the scores.
            window: the last keys that a query sees, its own included; 0 if there is no end.
            num_threads: of the CPU.

        Raises:
            RuntimeError: if this OpenVINO has no such kernel.
        """
        openvino = load_openvino()
        self._openvino = openvino
        options = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": False,  # other processes have the cores, too
        }
        model = _graph(group, width, scale, window)
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        self._lock = Lock()

    def attend(
        self,
        queries: Tensor,
        own: tuple[Tensor, Tensor],
        blocks: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> Tensor:
        """Return bfloat16 [T, group * width].

        Args:
            queries: bfloat16 [T, group * width].
            own: keys and values of the queries' tokens, bfloat16 [T, width]; the kernel writes them
                to where the pages say that they are.
            blocks: keys and values, bfloat16 [blocks, 1, tokens of a block, width], contiguous;
                what stands for no token is some number.
            pages: what each query sees of the blocks.
        """
        out = torch.empty_like(queries)
        states = zip(_GIVEN, (queries, *own, *blocks), strict=False)
        given = {name: self._shared(part) for name, part in states}
        given |= {field.name: getattr(pages, field.name) for field in fields(pages)}
        with self._lock:
            self._request.set_output_tensor(0, self._shared(out))
            self._request.infer(given, share_inputs=True, share_outputs=True)
        return out

    def _shared(self, states: Tensor) -> Any:  # noqa: ANN401
        """Return bfloat16 states as OpenVINO sees them, where they are; numpy has no such dtype."""
        numbers = states.detach().contiguous().view(torch.int16).numpy()
        return self._openvino.Tensor(numbers, list(states.shape), self._openvino.Type.bf16)


@lru_cache(maxsize=16)
def _kernel(
    group: int, width: int, scale: float, window: int, num_threads: int
) -> PagedKernel | None:
    """Return the kernel, None where there is none: compiled, and compared, once."""
    if find_spec("openvino") is None or width % 8:
        return None
    core = load_openvino().Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return None
    try:
        kernel = PagedKernel(group, width, scale, window=window, num_threads=num_threads)
        error = _error(kernel, group, width, scale, window)
    except Exception as failure:  # whatever another version makes of a node that is not public
        logger.info("no paged attention here: %s", failure)
        return None
    if error > _TOLERANCE:
        logger.info("no paged attention here: it differs by %.1f%%", 100 * error)
        return None
    return kernel


def _error(kernel: PagedKernel, group: int, width: int, scale: float, window: int) -> float:
    """Return how far the kernel is from the plain way, behind a cache and with a block begun."""
    T, K = 75, 150 + window
    some = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        query = torch.randn(1, group, T, width, generator=some).bfloat16()
        key, value = torch.randn(2, 1, 1, K, width, generator=some).bfloat16()
        mask = torch.ones(T, K, dtype=torch.bool).tril(K - T)
        if window:
            mask = mask.triu(K - T - window + 1)
        shape = (1, group, K, width)
        expected, _ = attend_plain(
            query, key.expand(shape), value.expand(shape), mask[None, None], scale=scale
        )
        keys, values = key[0, 0], value[0, 0]
        found = kernel.attend(
            query[0].transpose(0, 1).reshape(T, -1),
            (keys[K - T :], values[K - T :]),
            (_in_blocks(keys), _in_blocks(values)),
            Pages.of_one(T, K),
        )
        return difference(found.view(T, group, width).transpose(0, 1)[None], expected)


def _in_blocks(states: Tensor) -> Tensor:
    """Return [blocks, 1, tokens of a block, width] of [K, width]; the last one filled with zeros.

    What is there of a block that is not full is multiplied by weights of zero, so it must be
    numbers.
    """
    missing = -len(states) % BLOCK_TOKENS
    full = pad(states, (0, 0, 0, missing)) if missing else states
    return full.view(-1, 1, BLOCK_TOKENS, states.shape[-1])


def _graph(group: int, width: int, scale: float, window: int) -> Any:  # noqa: ANN401 - a Model
    """Return a graph of the one node; what it can do besides is left out."""
    openvino = load_openvino()
    op, types = openvino.opset13, openvino.Type

    def parameter(name: str, shape: list[int], dtype: Any) -> Any:  # noqa: ANN401
        made = op.parameter(openvino.PartialShape(shape), dtype, name)
        made.output(0).set_names({name})
        return made

    def constant(value: Any, dtype: type) -> Any:  # noqa: ANN401
        return op.constant(np.array(value, dtype))

    def nothing(dtype: type, rank: int = 1) -> Any:  # noqa: ANN401
        return constant(np.zeros([0] * rank), dtype)

    shapes = [[-1, group * width], *[[-1, width]] * 2, *[[-1, 1, BLOCK_TOKENS, width]] * 2]
    dtypes = [types.bf16] * 5 + [types.i32] * 5
    given = [
        parameter(*described)
        for described in zip(_GIVEN, [*shapes, *[[-1]] * 4, []], dtypes, strict=True)
    ]
    inputs = [
        *given[:9],
        constant(scale, np.float32),
        constant(window, np.int32),
        nothing(np.float32),  # slopes of ALiBi
        given[9],
        nothing(np.int32),  # no scores are given back
        *[nothing(np.int32)] * 2,  # keys that are turned anew
        nothing(np.float32),
        nothing(np.float32),  # blocks that are left out by their scores
        *[constant(0, np.int32)] * 2,
        nothing(np.float32, 4),  # learned sinks
        constant(0, np.int32),  # keys that are thrown out of the cache
        *[nothing(np.int32)] * 4,
        nothing(np.uint8),  # masks among the queries
        nothing(np.int32),
    ]
    node = openvino.op._PagedAttentionExtension([part.output(0) for part in inputs])
    facts = node.get_rt_info()
    for kind in "kv":
        facts[f"{kind}_head_size"], facts[f"num_{kind}_heads"] = width, 1
    return openvino.Model([op.result(node.output(0))], given, "attention")
