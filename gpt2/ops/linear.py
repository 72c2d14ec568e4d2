"""Products of fp32 matrices by oneDNN, in training too.

PyTorch gives fp32 products on a CPU to MKL, which on processors that are not Intel's may reach half of what oneDNN
does. The operations of oneDNN that take them are those that PyTorch's compiler uses, and not public: they are named in
this file alone. Where they are missing nothing here is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.runtime.device import fastest_seconds, hardware
from gpt2.runtime.hub import caches

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # as F.linear

WORTHWHILE = 0.95  # of the time of F.linear: less than this, or nothing is changed
WORTH_COPIES = 0.8  # the same where oneDNN has to copy a matrix
SAMPLE = (256, 768, 768)  # rows, inputs and outputs of the product that is measured


def is_available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's own layout, for `product` and its kin alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, without a gradient. The weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tanh GELU of `product`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")


def product_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`residual` plus `product`."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def product_without_copy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product`, but `F.linear` for what is no matrix row by row: oneDNN would copy it first."""
    return product(x, weight, bias) if x.is_contiguous() else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A product with its gradient, which is two such products more: the second has its left matrix column by column."""

    @staticmethod
    def forward(ctx: Any, product: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_x = ctx.product(of_y, weight.t(), None)
        rows = of_y.reshape(-1, of_y.size(-1))
        if ctx.needs_input_grad[2]:
            of_weight = ctx.product(rows.t(), x.reshape(-1, x.size(-1)).t(), None)
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum(0)
        return None, of_x, of_weight, of_bias


@dataclass(frozen=True)
class LinearBy:
    """`F.linear` by another product, with its gradient: fp32 on a CPU. PyTorch gives 16 bits to oneDNN by itself."""

    product: Linear

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_fp32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not is_fp32:
            return F.linear(x, weight, bias)
        if torch.is_grad_enabled():
            return _Linear.apply(self.product, x, weight, bias)
        return self.product(x, weight, bias)


LINEARS: dict[str, Linear] = {"PyTorch": F.linear}
if is_available():
    LINEARS |= {"oneDNN": LinearBy(product), "oneDNN without copies": LinearBy(product_without_copy)}


def name_of(way: Linear) -> str:
    """Which of `LINEARS` that is; `other` if none."""
    return next((name for name, known in LINEARS.items() if known == way), "other")


@cache
def faster_linear() -> str:
    """The name of that of `LINEARS` which is the fastest on this processor: measured once, and remembered in the cache.

    Measured each time, two runs of the same command might compute in different ways, and end with other last bits.
    """
    if not is_available():
        return "PyTorch"
    machine = f"{hardware(torch.device('cpu'))} {torch.__version__}"
    memory = caches() / f"linear-{sha256(machine.encode()).hexdigest()[:16]}"
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(memory.with_suffix(".lock")):
            if not memory.exists() or memory.read_text() not in LINEARS:
                memory.write_text(_measured())
            return memory.read_text()
    except OSError:  # nothing can be remembered here
        return _measured()


def _measured() -> str:
    rows, inputs, outputs = SAMPLE
    x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    theirs, ours = fastest_seconds([partial(way, x, weight) for way in (F.linear, product)])
    if ours > WORTHWHILE * theirs:
        return "PyTorch"
    of_y = torch.ones(rows, outputs)
    theirs, ours = fastest_seconds([partial(way, of_y.t(), x.t()) for way in (F.linear, product)])
    return "oneDNN without copies" if ours > WORTH_COPIES * theirs else "oneDNN"
