"""Muon (Jordan et al., 2024) in a few large kernels instead of many small ones.

Private API, checked with torch 2.13: `torch._foreach_*`. tests/training/test_muon.py fails if they change.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

BATCH_ELEMENTS = 2**25  # of the matrices that are orthogonalized at once: bounds the memory of a step


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` for groups of weights whose updates are orthogonalized in batches.

    The matrices of a group have the sides `shape`, (short, long), either of which may be the rows. A weight may hold
    several, one above the other, such as those of q, k and v. The update of a matrix is scaled to the size of AdamW's,
    a root mean square of 0.2 times the rate (Liu et al., 2025, "Muon is scalable for LLM training"), so one learning
    rate fits both.

    Updates are computed in the format `dtype`. `torch.optim.Muon` always takes bf16, which some devices emulate.

    Like PyTorch's fused optimizers, it skips the step if its attribute `found_inf`, a scalar on the device, is 1.
    """

    found_inf: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update once, without waiting for the device. Closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            count = max(1, BATCH_ELEMENTS // max((weight.numel() for weight in weights), default=1))
            for first in range(0, len(weights), count):
                self._update(weights[first : first + count], group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        skip = None if self.found_inf is None else self.found_inf.bool()
        momenta = [self._momentum(weight) for weight in weights]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if skip is not None:  # a momentum whose gradient is the momentum itself does not change
            gradients = [torch.where(skip, *both) for both in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's

        short, long = group["shape"]
        wide = [
            update.view(-1, short, long) if update.size(1) == long else update.view(-1, long, short).mT
            for update in updates
        ]
        rate, kept = -group["lr"] * 0.2 * sqrt(long), 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            rate, kept = torch.where(skip, 0.0, rate), torch.where(skip, 1.0, kept)
        matrices = torch.cat(wide).to(self.dtype)
        x = orthogonal(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"]).float() * rate
        parts = zip(weights, x.split([len(matrices) for matrices in wide]), strict=True)
        torch._foreach_mul_(weights, kept)
        torch._foreach_add_(weights, [(p if w.size(1) == long else p.mT).reshape(w.shape) for w, p in parts])

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonal(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> Tensor:
    """Matrices (n, r, c), r <= c, with their singular values moved near 1 by quintic Newton-Schulz steps."""
    a, b, c = coefficients
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
