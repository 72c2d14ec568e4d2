"""Optimizers, their parameter groups, and the learning rate schedule.

The rate of a group is the schedule's times its `rate_factor`, if it has one. With `model.parametrization=mup` the
matrices of the blocks have one that depends on the width, see `hidden_group`.

To add an optimizer, add a builder to `BUILDERS` and what it supports to `gpt2.config.OPTIMIZERS`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import cos, pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import OPTIMIZERS, TrainingConfig
from gpt2.model import GPT2Model
from gpt2.runtime.device import Precision
from gpt2.training.adamw import AdamW, start_without_dynamo
from gpt2.training.muon import Muon

log = logging.getLogger(__name__)

LOW_ADAFACTOR_RATE = 0.01  # Adafactor learns next to nothing with it, nor with the default, which suits AdamW


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with shared param groups and state."""

    found_inf: Tensor | None = None  # of both parts, see `Muon`

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
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
            part.found_inf = self.found_inf  # type: ignore[union-attr]
            part.step()


def use_precision(optimizer: torch.optim.Optimizer, precision: Precision) -> None:
    """Let Muon compute in the precision of the training: bf16, or fp32 for fp32 and fp16."""
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.parts[0].dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32


def build_optimizer(model: GPT2Model, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` for the parameters that require gradients."""
    start_without_dynamo()
    for name in OPTIMIZERS[config.optimizer].ignores:
        if (value := getattr(config, name)) != getattr(TrainingConfig(), name):
            log.warning("train.%s=%s has no effect with train.optimizer=%s", name, value, config.optimizer)
    return BUILDERS[config.optimizer](model, config)


def trained(model: GPT2Model) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_adamw(model: GPT2Model, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; biases and normalisation gains do not decay."""
    return _adamw(trained(model), model, config)


def hidden_group(rate_factor: float, config: TrainingConfig) -> dict[str, float]:
    """Rate and decay of the matrices of the blocks in a model that is wider than the base of mup.

    The spectral norm of an update, relative to that of the matrix, must not depend on the width (the spectral condition
    of Yang, Simon and Bernstein, 2023). An update of Adam has elements of equal size and a low rank, and so the norm
    rate * width: its factor is base / width. An orthogonal update of `Muon`, scaled to elements of the same size, has
    the norm rate * sqrt(width): its factor is sqrt(base / width). The product of rate and decay does not depend on the
    width, as in the code of Yang et al. (2022): otherwise the widest models would not decay.
    """
    rate, decay = config.learning_rate * rate_factor, config.weight_decay / rate_factor
    return {"lr": rate, "rate_factor": rate_factor, "weight_decay": decay}


def build_muon(model: GPT2Model, config: TrainingConfig) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks, in groups of one shape, and AdamW for the rest."""
    rest, groups = trained(model), dict[Any, dict[str, Any]]()
    shared = hidden_group(sqrt(model.config.width_ratio), config)
    for name, stacked in model.matrices().items():
        if (matrix := rest.pop(name, None)) is not None:
            shape = tuple(sorted((matrix.size(0) // stacked, matrix.size(1))))
            group = groups.setdefault(shape, {"params": [], "shape": shape, **shared})
            group["params"].append(matrix)
    if not groups:
        return build_adamw(model, config)
    muon = Muon(groups.values(), momentum=config.muon_momentum)
    return MuonWithAdamW(muon, _adamw(rest, model, config))


def build_adafactor(model: GPT2Model, config: TrainingConfig) -> torch.optim.Adafactor:
    """Adafactor (Shazeer and Stern, 2018): mean squares of rows and columns instead of averages of each number."""
    # A factor of the rate would have no effect once PyTorch bounds it by 1 / sqrt(step): `scales` is False.
    groups = _groups(trained(model), model, config, rate_factor=1)
    if config.learning_rate <= LOW_ADAFACTOR_RATE:
        usual = "Adafactor's rate is relative to the size of the weights, and 0.1 is usual"
        log.warning("train.learning_rate=%g is low: %s", config.learning_rate, usual)
    return torch.optim.Adafactor(groups, lr=config.learning_rate)


def build_schedule_free(model: GPT2Model, config: TrainingConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al., 2024)."""
    from gpt2.training.schedule_free import ScheduleFree  # here, because its package is optional

    groups, betas = _groups(trained(model), model, config, model.config.width_ratio), (config.beta1, config.beta2)
    return ScheduleFree(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon)


def _adamw(parameters: dict[str, nn.Parameter], model: GPT2Model, config: TrainingConfig) -> torch.optim.AdamW:
    return AdamW(
        _groups(parameters, model, config, model.config.width_ratio),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=all(parameter.device.type in ("cuda", "cpu") for parameter in parameters.values()),
    )


def _groups(
    parameters: dict[str, nn.Parameter], model: GPT2Model, config: TrainingConfig, rate_factor: float
) -> list[dict[str, Any]]:
    """The matrices of the blocks, if their rate has a factor; other matrices; and vectors, which do not decay."""
    rest, groups = dict(parameters), list[dict[str, Any]]()
    if rate_factor != 1:
        hidden = [rest.pop(name) for name in model.matrices() if name in rest]
        groups.append({"params": hidden, **hidden_group(rate_factor, config)})
    groups += [
        {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


BUILDERS: dict[str, Callable[[GPT2Model, TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": build_adamw,
    "muon": build_muon,
    "adafactor": build_adafactor,
    "schedule_free": build_schedule_free,
}


@contextmanager
def stepping(optimizer: Any) -> Iterator[None]:
    """Switch a schedule-free optimizer to its training weights for one step, then back to the averages.

    Other optimizers are unchanged.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    optimizer.train()
    try:
        yield
    finally:
        optimizer.eval()


def cosine(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Half a cosine (Loshchilov and Hutter, 2017)."""
    return (1 + cos(pi * _fraction(step, config.warmup_steps, total_steps))) / 2


def linear(step: int, total_steps: int, config: TrainingConfig) -> float:
    """A straight line."""
    return 1 - _fraction(step, config.warmup_steps, total_steps)


def wsd(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Warm-up, stable, decay (Hu et al., 2024): a straight line over the last `decay_fraction` of the run."""
    decay_start = total_steps - max(1, round(config.decay_fraction * total_steps))
    return 1 - _fraction(step, max(config.warmup_steps, decay_start), total_steps)


def _fraction(step: int, start: int, end: int) -> float:
    """How much of the way from `start` to `end` is behind a step, from 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


# Functions of step, total_steps and config: the rate after the warm-up, from 1 (the peak) to 0 (`min_learning_rate`).
SCHEDULES: dict[str, Callable[[int, int, TrainingConfig], float]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
}


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up over `warmup_steps`, then a schedule of `SCHEDULES`.

    If the warm-up is longer than the run, the rate never reaches its peak. With a schedule-free optimizer it stays
    there.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if "lr_schedule" in OPTIMIZERS[config.optimizer].ignores:
        return config.learning_rate
    lowest = config.min_learning_rate if config.min_learning_rate is not None else config.learning_rate / 10
    return lowest + (config.learning_rate - lowest) * SCHEDULES[config.lr_schedule](step, total_steps, config)


def effective_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate with the bound that PyTorch's Adafactor puts on its updates, though not on its decay."""
    rate = learning_rate(step, total_steps, config)
    return min(rate, 1 / sqrt(step + 1)) if config.optimizer == "adafactor" else rate


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
