"""Linear layers whose weights lie as a CPU's matrix product reads them; the same numbers, sooner.

torch hands a bfloat16 product on a CPU to oneDNN, which wants the weight in blocks and puts it so
for every product anew. For a whole prompt that is a tenth of the work, for one token half of it.
Here each weight is put in blocks once, when the model is loaded, in the place of the plain one: the
memory is the same, and so is every number, which is tried on each shape before it is relied on.

Source: docs/decisions/0034; what torch's own compiler does with the weights that it freezes
(torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rag.lm.layers import VERIFIED_FAMILIES

# Families whose code looks at the weights of its linear layers itself. For all others a test
# compares the logits.
_READ_WEIGHTS = frozenset({"deepseek_v32", "jamba", "longcat_flash"})

# One token, a few, and a piece of a prompt: other kernels may serve them.
_TRIED_ROWS = (1, 3, 40)


class PackedLinear(torch.nn.Module):
    """As torch.nn.Linear, in bfloat16 on a CPU, for inference."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        """Take the weight of `plain` over; its own stays as it is."""
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.bias
        # A plain attribute: a tensor in blocks is no parameter that could be moved or saved.
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), None)

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out_features] of [..., in_features]."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self._blocks, self.bias, "none", [], ""
        )
        return found


def can_pack() -> bool:
    """Say whether this CPU and this build of torch have such products."""
    try:
        torch.ops.mkldnn._reorder_linear_weight  # noqa: B018 - raises where it is not
        torch.ops.mkldnn._linear_pointwise  # noqa: B018
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def use_packed_weights(model: Any) -> int:  # noqa: ANN401 - a causal model of transformers
    """Replace the linear layers of a model by packed ones; return how many.

    Only those in bfloat16 on a CPU whose products come out equal bit for bit, and an output head
    only if its weight is not the embeddings' as well.

    Args:
        model: ready to run; it is changed. One weight at a time is there twice.
    """
    family = model.config.get_text_config(decoder=True).model_type
    if model.device.type != "cpu" or not can_pack():
        return 0
    if family not in VERIFIED_FAMILIES - _READ_WEIGHTS:
        return 0
    embeddings = model.get_input_embeddings().weight
    equal: dict[tuple[int, int, bool], bool] = {}
    replaced = 0
    with torch.inference_mode():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is not torch.nn.Linear or child.weight is embeddings:
                    continue
                if child.weight.dtype != torch.bfloat16:
                    continue
                try:
                    packed = PackedLinear(child)
                except (RuntimeError, MemoryError):
                    return replaced  # no memory for both: the rest stays as it is
                shape = (child.in_features, child.out_features, child.bias is not None)
                if shape not in equal:
                    equal[shape] = _is_equal(child, packed)
                if equal[shape]:
                    setattr(parent, name, packed)
                    replaced += 1
    return replaced


def _is_equal(plain: torch.nn.Linear, packed: PackedLinear) -> bool:
    """Say whether both give the same numbers."""
    generator = torch.Generator().manual_seed(0)
    for rows in _TRIED_ROWS:
        states = torch.randn(1, rows, plain.in_features, generator=generator).bfloat16()
        if not torch.equal(linear(states, plain.weight, plain.bias), packed(states)):
            return False
    return True
