"""Linear layers packed for writing on a CPU, where each new token reads every weight once and little else takes time.

PyTorch's default library reads a matrix for its product with a vector at less than half the speed of the memory,
oneDNN a matrix in its own layout at nearly all of it. The two operations are those that PyTorch's compiler uses, and
not public: they are named here alone, and where they are missing or no faster, the layers stay as they are.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.model import GPT2Model

WORTHWHILE = 0.9  # of the plain time: less than this, or it is not worth the memory of a second copy of the head
SMALL = 8 << 20  # bytes of a head: below, the weights stay in the processor's cache, and there is nothing to gain


class PackedLinear(nn.Module):
    """`F.linear` with a weight (out, in) that it keeps in oneDNN's layout. Without gradients, on a CPU, in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: GPT2Model, only_if_faster: bool = True) -> bool:
    """Pack all linear layers of a model, which can then only be evaluated. Returns whether it was done.

    Done where it is possible and, unless `only_if_faster` is false, faster by measurement. The logits are the same but
    for rounding.
    """
    weight = model.token_embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not has_packing():
        return False
    if only_if_faster and weight.nbytes < SMALL:
        return False
    head = PackedLinear(weight)
    if only_if_faster and not is_faster(head, weight):
        return False
    model.head = head
    for part in list(model.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, PackedLinear(layer.weight, layer.bias))
    return True


def has_packing() -> bool:
    operations = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")


@torch.no_grad()
def is_faster(head: PackedLinear, weight: Tensor, repetitions: int = 3) -> bool:
    """Whether a packed matrix is the faster one on this machine, by the median of some products, in turn."""
    x = torch.zeros(1, 1, weight.size(1))
    ways: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight), lambda: head(x)]
    seconds: list[list[float]] = [[], []]
    for _ in range(repetitions + 1):
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            taken.append(time.perf_counter() - began)
    plain, packed = (median(taken[1:]) for taken in seconds)  # the first reads what no cache holds yet
    return packed < WORTHWHILE * plain
