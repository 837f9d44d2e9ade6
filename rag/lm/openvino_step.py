"""One pass of a few tokens through a plain decoder, as a graph of OpenVINO on a CPU.

It multiplies by the whole numbers of the model's own file (`rag.lm.integer_weights`) and computes
in float32, so that what it says of a token is what the file's weights say, rounded nowhere. Keys
and values are kept inside, and whatever in them belongs to no token of the text is hidden by the
mask. Positions come as angles, which the model's own code works out.

Source: stateful models of OpenVINO 2026.4; docs/decisions/0034.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rag.lm.integer_weights import IntegerLayer, IntegerWeights, Matrix
from rag.runtime import load_openvino


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a decoder's attention, and the epsilon of its norms."""

    queries: int
    keys: int
    width: int
    epsilon: float


class StepGraph:
    """A model compiled for passes of few tokens; one sequence at a time."""

    def __init__(self, weights: IntegerWeights, heads: Heads, *, num_threads: int) -> None:
        """Compile.

        Args:
            weights: all of a llama or qwen2.
            heads: its shape.
            num_threads: of the CPU.
        """
        openvino = load_openvino()
        self._weights = weights  # the graph reads them where they are
        self._new_tensor = openvino.Tensor
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # states are not rounded to 8 bits
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": False,  # other processes have the cores, too
        }
        compiled = openvino.Core().compile_model(_graph(weights, heads), "CPU", options)
        self._request = compiled.create_infer_request()

    def begin(self, held: Callable[[str, int], np.ndarray]) -> None:
        """Forget the sequence, and go on from another.

        Args:
            held: returns its `keys` or `values` of a layer, float32 [1, heads, tokens, width].
        """
        for state in self._request.query_state():
            kind, layer = state.name.split()
            state.state = self._new_tensor(held(kind, int(layer)))

    def end(self) -> None:
        """Let go of the sequence."""
        self._request.reset_state()

    def logits(
        self, ids: list[int], cos: np.ndarray, sin: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """Read some tokens; return what each says of the next, float32 [tokens, vocabulary].

        Args:
            ids: the tokens.
            cos: of their angles, float32 [tokens, width of a head]; so is `sin`.
            sin: of their angles.
            mask: added to the scores, float32 [tokens, all that are kept and these].
        """
        found = self._request.infer(
            {
                "states": self._weights.embeddings.rows(ids)[None],
                "cos": cos[None, None],
                "sin": sin[None, None],
                "mask": mask[None, None],
                "order": np.zeros(1, np.int32),
            }
        )
        return np.asarray(found[0][0])


def _graph(weights: IntegerWeights, heads: Heads) -> Any:  # noqa: ANN401 - a Model
    """Return the graph, the operations of transformers' modelling code in their order."""
    openvino = load_openvino()
    op = openvino.opset13

    def parameter(name: str, shape: list[int]) -> Any:  # noqa: ANN401
        made = op.parameter(openvino.PartialShape(shape), openvino.Type.f32, name)
        made.output(0).set_names({name})
        return made

    states = parameter("states", [1, -1, len(weights.norm)])
    cos, sin = (parameter(name, [1, 1, -1, heads.width]) for name in ("cos", "sin"))
    mask = parameter("mask", [1, 1, -1, -1])
    writes: list[Any] = []
    order = op.parameter(openvino.PartialShape([1]), openvino.Type.i32, "order")
    order.output(0).set_names({"order"})
    out = states
    for index, layer in enumerate(weights.layers):
        seen = _normed(op, out, layer.before_attention, heads.epsilon)
        seen = _attention(op, index, layer, heads, seen, cos, sin, mask, order, writes)
        out = op.add(out, _product(op, seen, layer.parts["out"]))
        seen = _normed(op, out, layer.before_feed_forward, heads.epsilon)
        gate, up = _split(op, _product(op, seen, layer.parts["gate_up"]), 2)
        out = op.add(out, _product(op, op.multiply(op.swish(gate), up), layer.parts["down"]))
    logits = _product(op, _normed(op, out, weights.norm, heads.epsilon), [weights.head])
    return openvino.Model([op.result(logits)], writes, [states, cos, sin, mask, order], "step")


def _attention(
    op: Any,  # noqa: ANN401
    index: int,
    layer: IntegerLayer,
    heads: Heads,
    states: Any,  # noqa: ANN401
    cos: Any,  # noqa: ANN401
    sin: Any,  # noqa: ANN401
    mask: Any,  # noqa: ANN401
    order: Any,  # noqa: ANN401
    writes: list[Any],
) -> Any:  # noqa: ANN401
    """Return [1, tokens, query heads * width]; what writes its keys and values joins `writes`."""
    found = _product(op, states, layer.parts["qkv"])
    if layer.qkv_bias is not None:
        found = op.add(found, op.constant(layer.qkv_bias[None, None]))
    sizes = [heads.queries, heads.keys, heads.keys]
    lengths = op.constant(np.array([size * heads.width for size in sizes]))
    parts = op.variadic_split(found, op.constant(2), lengths).outputs()
    queries, keys, values = (
        op.transpose(
            op.reshape(part, op.constant(np.array([0, 0, size, heads.width])), True),
            op.constant(np.array([0, 2, 1, 3])),
        )
        for part, size in zip(parts, sizes, strict=True)
    )
    kept = [
        _repeated(op, _kept(op, f"{name} {index}", new, heads, order, writes), heads)
        for name, new in (("keys", _turned(op, keys, cos, sin)), ("values", values))
    ]
    seen = op.scaled_dot_product_attention(_turned(op, queries, cos, sin), *kept, mask)
    seen = op.transpose(seen, op.constant(np.array([0, 2, 1, 3])))
    return op.reshape(seen, op.constant(np.array([0, 0, heads.queries * heads.width])), True)


def _kept(op: Any, name: str, new: Any, heads: Heads, order: Any, writes: list[Any]) -> Any:  # noqa: ANN401
    """Return all keys or values, the new ones last, which stay for the next pass."""
    openvino = load_openvino()
    info = openvino.op.util.VariableInfo()
    info.data_shape = openvino.PartialShape([1, heads.keys, -1, heads.width])
    info.data_type = openvino.Type.f32
    info.variable_id = name
    variable = openvino.op.util.Variable(info)
    nothing = op.constant(np.zeros((1, heads.keys, 0, heads.width), np.float32))
    # Nothing is put in another order here. But only behind a `Gather` that could OpenVINO joins
    # cache and attention, and else copies all keys at every pass: 86 ms a token instead of 43.
    read = openvino.opset6.read_value(nothing, variable)
    held = op.gather(read, order, op.constant(0))
    joined = op.concat([held, new], 2)
    writes.append(openvino.opset6.assign(joined, variable))
    return joined


def _repeated(op: Any, states: Any, heads: Heads) -> Any:  # noqa: ANN401
    """Return [1, query heads, tokens, width]: a pattern that the attention knows and leaves out."""
    if heads.queries == heads.keys:
        return states
    shape = op.shape_of(states)
    zero = op.constant(0)
    ends = [op.gather(shape, op.constant(np.array(at)), zero) for at in ([0, 1], [2, 3])]
    groups = op.constant(np.array([heads.queries // heads.keys]))
    target = op.concat([ends[0], groups, ends[1]], 0)
    spread = op.broadcast(op.unsqueeze(states, op.constant(2)), target, None, "BIDIRECTIONAL")
    return op.reshape(spread, op.constant(np.array([0, heads.queries, -1, heads.width])), True)


def _turned(op: Any, states: Any, cos: Any, sin: Any) -> Any:  # noqa: ANN401
    first, second = _split(op, states, 3)
    across = op.concat([op.negative(second), first], -1)
    return op.add(op.multiply(states, cos), op.multiply(across, sin))


def _split(op: Any, states: Any, axis: int) -> tuple[Any, Any]:  # noqa: ANN401
    first, second = op.split(states, op.constant(axis), 2).outputs()
    return first, second


def _normed(op: Any, states: Any, weight: np.ndarray, epsilon: float) -> Any:  # noqa: ANN401
    square = op.power(states, op.constant(np.float32(2)))
    mean = op.reduce_mean(square, op.constant(np.array([-1])), True)
    root = op.sqrt(op.add(mean, op.constant(np.float32(epsilon))))
    return op.multiply(
        op.constant(weight[None, None]),
        op.multiply(states, op.divide(op.constant(np.float32(1)), root)),
    )


def _product(op: Any, states: Any, matrices: Sequence[Matrix]) -> Any:  # noqa: ANN401
    found = [op.matmul(states, _weight(op, matrix), False, True) for matrix in matrices]
    return found[0] if len(found) == 1 else op.concat(found, -1)


def _weight(op: Any, matrix: Matrix) -> Any:  # noqa: ANN401
    """Return a matrix that is multiplied by as it is stored: OpenVINO decodes it as it goes."""
    openvino = load_openvino()
    out, width = matrix.shape
    shape = [out, width // matrix.group, matrix.group]
    if matrix.is_four_bit:
        numbers = openvino.Tensor(matrix.numbers, shape, openvino.Type.u4)
        weight = op.convert(openvino.op.Constant(numbers), "f32")
    else:
        weight = op.convert(op.constant(matrix.numbers.reshape(shape), shared_memory=True), "f32")
    if matrix.middles is not None:
        middles = op.constant(matrix.middles[..., None], shared_memory=True)
        weight = op.subtract(weight, middles)
    weight = op.multiply(weight, op.constant(matrix.scales[..., None], shared_memory=True))
    return op.reshape(weight, op.constant(np.array([out, width])), False)
