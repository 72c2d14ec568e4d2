"""Optimizers, their parameter groups, and the learning rate schedule.

To add an optimizer, add a builder to `BUILDERS` and what it supports to `gpt2.config.OPTIMIZERS`.
"""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import TrainingConfig
from gpt2.training.adamw import AdamW, start_without_dynamo


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with shared param groups and state."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:  # also called by `load_state_dict`, with new dictionaries
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        muon, adamw = self.parts
        count = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        muon.state = adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update once. Closures are not supported: both parts would have to evaluate the same one."""
        assert closure is None
        for part in self.parts:
            part.step()


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` for the parameters that require gradients."""
    start_without_dynamo()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return BUILDERS[config.optimizer](parameters, config)


def build_adamw(parameters: dict[str, nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; biases and normalisation gains do not decay."""
    tensors = list(parameters.values())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in tensors if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in tensors if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=all(parameter.device.type in ("cuda", "cpu") for parameter in tensors),
    )


def build_muon(parameters: dict[str, nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Muon (Jordan et al., 2024) for the matrices of the blocks and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's (Liu et al., 2025, "Muon is scalable for LLM training"), so one
    learning rate fits both.
    """
    matrices = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("blocks.")}
    if not matrices:
        return build_adamw(parameters, config)
    muon = torch.optim.Muon(
        list(matrices.values()),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = {name: parameter for name, parameter in parameters.items() if name not in matrices}
    return MuonWithAdamW(muon, build_adamw(rest, config))


BUILDERS: dict[str, Callable[[dict[str, nn.Parameter], TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": build_adamw,
    "muon": build_muon,
}


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up over `warmup_steps`, then decay to `min_learning_rate`.

    `cosine`: half a cosine (Loshchilov and Hutter, 2017). `linear`: a straight line. `wsd`: warm-up, stable, decay
    (Hu et al., 2024), a straight line over the last `decay_fraction` of the run. If the warm-up is longer than the run,
    the rate never reaches its peak.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    lowest = config.min_learning_rate if config.min_learning_rate is not None else config.learning_rate / 10
    decay_start = config.warmup_steps
    if config.lr_schedule == "wsd":
        decay_start = max(decay_start, total_steps - max(1, round(config.decay_fraction * total_steps)))
    progress = min(1.0, max(0.0, (step - decay_start) / max(1, total_steps - decay_start)))
    height = (1 + cos(pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return lowest + (config.learning_rate - lowest) * height


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `exp_avg/blocks.0.attention.qkv.weight`, ..."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{name_of[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned."""
    parameter_of = dict(model.named_parameters())
    state: dict[Any, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        key, name = path.split("/", 1)
        state.setdefault(name, {})[key] = value.clone()  # the optimizer updates its state in place
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    optimizer.load_state_dict(
        {
            "state": {numbers[id(parameter_of[name])]: entries for name, entries in state.items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
