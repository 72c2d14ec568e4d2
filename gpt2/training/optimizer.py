"""The optimizers, what they decay, and the learning rate over the run."""

from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.config import TrainingConfig


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer: they share its groups and its state."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:  # `load_state_dict` ends here, with other dictionaries
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        muon, adamw = self.parts
        of_muon = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:of_muon], self.param_groups[of_muon:]
        muon.state = adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by each; of closures they would have to share one."""
        assert closure is None
        for part in self.parts:
            part.step()


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon (Jordan et al., 2024) for the matrices of the blocks and AdamW for the rest.

    Weight decay is on matrices only: biases and normalisation gains have nothing to be pulled away from. Muon's updates
    are scaled to the size of AdamW's (Liu et al., 2025, "Muon is scalable for LLM training"): one learning rate fits.
    """
    by_name = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_blocks = {name for name, parameter in by_name.items() if parameter.dim() == 2 and name.startswith("blocks.")}
    if config.optimizer == "adamw" or not of_blocks:
        return _adamw(list(by_name.values()), config)
    muon = torch.optim.Muon(
        [by_name[name] for name in by_name if name in of_blocks],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, _adamw([by_name[name] for name in by_name if name not in of_blocks], config))


def _adamw(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
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
    """The learning rate of step 0, 1, ...: a straight rise over `warmup_steps`, then down to the end of the run.

    `cosine`: half a cosine (Loshchilov and Hutter, 2017). `linear`: a straight line. `wsd`: warm-up, stable, decay
    (Hu et al., 2024), a straight line over the last `decay_fraction` of the run. With a warm-up longer than the run, it
    ends while the rate still rises.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    lowest = config.min_learning_rate if config.min_learning_rate is not None else config.learning_rate / 10
    falls_from = config.warmup_steps
    if config.lr_schedule == "wsd":
        falls_from = max(falls_from, total_steps - max(1, round(config.decay_fraction * total_steps)))
    progress = min(1.0, max(0.0, (step - falls_from) / max(1, total_steps - falls_from)))
    height = (1 + cos(pi * progress)) / 2 if config.lr_schedule == "cosine" else 1 - progress
    return lowest + (config.learning_rate - lowest) * height


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
