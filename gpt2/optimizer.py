"""AdamW, what it decays, and the learning rate over the run."""

from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and normalisation gains have nothing to be pulled away from."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    has_fused_step = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=has_fused_step,
    )


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ...: a straight rise over `warmup_steps`, then half a cosine down to the end.

    With a warm-up longer than the run, the run ends while the rate still rises.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    lowest = config.min_learning_rate if config.min_learning_rate is not None else config.learning_rate / 10
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return lowest + (config.learning_rate - lowest) * (1 + cos(pi * min(1.0, progress))) / 2


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's memory by name: `exp_avg/blocks.0.attention.qkv.weight`, ..."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{name_of[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer what `optimizer_tensors` returned."""
    parameter_of = dict(model.named_parameters())
    state: dict[Any, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        key, name = path.split("/", 1)
        state.setdefault(name, {})[key] = value.clone()  # or the optimizer would write into what it was given
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    optimizer.load_state_dict(
        {
            "state": {numbers[id(parameter_of[name])]: entries for name, entries in state.items()},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
