"""Products of fp32 matrices by oneDNN, in training too.

PyTorch gives fp32 products on a CPU to MKL, which on processors that are not Intel's may reach half of what oneDNN
does. The operations of oneDNN that take them are those that PyTorch's compiler uses, and not public: they are named in
this file alone. Where they are missing nothing here is used.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.device import fastest_seconds

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # as F.linear

WORTHWHILE = 0.95  # of the time of F.linear: less than this, or nothing is changed
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


def linear_by(product: Linear) -> Linear:
    """`F.linear` by another product, with its gradient. For fp32 only: 16 bits PyTorch gives to oneDNN by itself."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled("cpu") or weight.dtype != torch.float32:
            return F.linear(x, weight, bias)
        if torch.is_grad_enabled():
            return _Linear.apply(product, x, weight, bias)
        return product(x, weight, bias)

    return linear


LINEARS: dict[str, Linear] = {"PyTorch": F.linear}
if is_available():
    LINEARS |= {"oneDNN": linear_by(product), "oneDNN without copies": linear_by(product_without_copy)}


def name_of(way: Linear) -> str:
    """Which of `LINEARS` that is."""
    return next(name for name, known in LINEARS.items() if known is way)


@cache
def faster_linear() -> Linear:
    """That of `LINEARS` which is the fastest on this processor: measured."""
    if not is_available():
        return F.linear
    rows, inputs, outputs = SAMPLE
    x, weight = torch.ones(rows, inputs), torch.ones(outputs, inputs)
    theirs, ours = fastest_seconds([partial(way, x, weight) for way in (F.linear, product)])
    if ours > WORTHWHILE * theirs:
        return LINEARS["PyTorch"]
    of_y = torch.ones(rows, outputs)
    theirs, ours = fastest_seconds([partial(way, of_y.t(), x.t()) for way in (F.linear, product)])
    return LINEARS["oneDNN without copies" if ours > WORTHWHILE * theirs else "oneDNN"]
