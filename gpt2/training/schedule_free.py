"""Schedule-free AdamW (Defazio et al., 2024), as `Trainer` uses it. Needs the package schedulefree."""

from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor

COUNTERS = ("k", "weight_sum", "lr_max")  # state of a parameter group: the number of steps, and weights of the average


class ScheduleFree(AdamWScheduleFree):
    """`schedulefree.AdamWScheduleFree` that keeps its counters in state tensors, so checkpoints hold them.

    `train` and `eval` surround each step. Between steps the model has the averaged weights, which are evaluated and
    saved. Without a step between `train` and `eval` no bit of them changes.
    """

    averages: dict[Tensor, Tensor] = {}  # noqa: RUF012  # copies of the weights before the step, none after it

    @torch.no_grad()
    def train(self) -> None:
        self.averages = {weight: weight.clone() for group in self.param_groups for weight in group["params"]}
        super().train()

    def step(self, closure: None = None) -> None:
        """Update once. Closures are not supported."""
        assert closure is None
        super().step()
        self.averages = {}

    @torch.no_grad()
    def eval(self) -> None:
        super().eval()
        for weight, average in self.averages.items():  # super().eval() recomputes them with rounding errors
            weight.copy_(average)
        self.averages = {}
        for group in self.param_groups:
            counters = torch.tensor([group[name] for name in COUNTERS], dtype=torch.float64)
            for entries in filter(None, map(self.state.get, group["params"])):
                entries["step"] = counters.clone()  # PyTorch loads only an entry of this name in double precision

    def __setstate__(self, state: dict[str, Any]) -> None:  # also called by `load_state_dict`
        super().__setstate__(state)
        for group in self.param_groups:
            for entries in filter(None, map(self.state.get, group["params"])):
                steps, *others = entries["step"].tolist()
                group.update(zip(COUNTERS, (int(steps), *others), strict=True))
