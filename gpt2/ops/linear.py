"""Products of fp32 matrices by oneDNN on a CPU, with gradients.

PyTorch multiplies fp32 matrices by MKL, which on processors of other makers may be slower than oneDNN: on two Zen 4
cores a training step of a 16-million-weight model takes 1.09 times as long by MKL (levers_small.json in
experiments/performance).

This is the only module that uses PyTorch's private oneDNN operations (`torch.ops.mkldnn`), which its compiler emits.
Checked with PyTorch 2.13. Where they are missing, `F.linear` is used; tests/ops/test_linear.py fails.
"""

import logging
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
from gpt2.runtime.files import atomic_write
from gpt2.runtime.hub import caches

log = logging.getLogger(__name__)

LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) -> y, as F.linear

# oneDNN is used if products take less than this share of F.linear's time. On Zen 4 its gain in whole steps is larger
# than in products alone, where both may take the same time, so only a clear loss excludes it.
MAX_TIME_RATIO = 1.05
REPETITIONS = 15


def is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN multiplies matrices of this format here. Not every CPU has the instructions for bf16."""
    operations = ["_linear_pointwise", "_reorder_linear_weight"]
    if dtype != torch.float32:
        operations.append("_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operations):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's blocked layout, which only `onednn_linear` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` without a gradient. The weight may be prepacked."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_linear_if_contiguous(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`onednn_linear`, or `F.linear` for an input that oneDNN would have to copy first."""
    return onednn_linear(x, weight, bias) if x.is_contiguous() else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A product and its gradient, which consists of two more products."""

    @staticmethod
    def forward(ctx: Any, product: LinearFunction, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_x = ctx.product(grad_y, weight.t(), None)
        rows = grad_y.reshape(-1, grad_y.size(-1))
        if ctx.needs_input_grad[2]:
            grad_weight = ctx.product(rows.t(), x.reshape(-1, x.size(-1)).t(), None)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        return None, grad_x, grad_weight, grad_bias


@dataclass(frozen=True)
class DifferentiableLinear:
    """`F.linear` that multiplies fp32 matrices on a CPU by `product`. PyTorch itself uses oneDNN for 16 bits."""

    product: LinearFunction

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        is_fp32 = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not is_fp32:
            return F.linear(x, weight, bias)
        if torch.is_grad_enabled():
            return _Linear.apply(self.product, x, weight, bias)
        return self.product(x, weight, bias)


LINEARS: dict[str, LinearFunction] = {"PyTorch": F.linear}  # by the name that a checkpoint records
if is_available():
    LINEARS["oneDNN"] = DifferentiableLinear(onednn_linear)
    LINEARS["oneDNN without copies"] = DifferentiableLinear(onednn_linear_if_contiguous)


def name_of(linear: LinearFunction) -> str:
    """The key of `LINEARS`, or `other`."""
    return next((name for name, known in LINEARS.items() if known == linear), "other")


@cache
def faster_linear() -> str:
    """The key of `LINEARS` that is fastest on this processor, measured once and stored in the user's cache folder.

    A new measurement each time could choose differently, and two runs of one command would differ in the last bits.
    """
    if not is_available():
        return "PyTorch"
    rule = f"{MAX_TIME_RATIO} {REPETITIONS}"  # another rule measures again
    machine = f"{hardware(torch.device('cpu'))} {torch.__version__} {rule}"
    file = caches() / f"linear-{sha256(machine.encode()).hexdigest()[:16]}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            name = file.read_text(errors="replace").strip() if file.exists() else ""
            if name not in LINEARS:  # missing or damaged
                name = _measure()
                with atomic_write(file) as new:
                    new.write(f"{name}\n".encode())
                log.info("Products of fp32 matrices: %s, measured once on this machine, see %s", name, file)
            return name
    except OSError:  # the cache folder is not writable
        return _measure()


def _measure() -> str:
    """Time GPT-2's two feed-forward products with their gradients, whose matrices oneDNN may have to copy first."""
    x = torch.ones(256, 768)
    up, down = torch.ones(3072, 768, requires_grad=True), torch.ones(768, 3072, requires_grad=True)

    def products(linear: LinearFunction) -> None:
        torch.autograd.grad(linear(linear(x, up, None), down, None), (up, down), x)

    taken = fastest_seconds([partial(products, linear) for linear in LINEARS.values()], REPETITIONS)
    seconds = dict(zip(LINEARS, taken, strict=True))
    seconds["PyTorch"] *= MAX_TIME_RATIO
    return min(seconds, key=seconds.__getitem__)
