"""How a step is computed: in which number format, by which products of matrices, and whether compiled.

The last bits of all numbers depend on it. What is left to `auto` is what suits this machine; a run that goes on is
computed as it began (`gpt2.training.state`), and all ranks compute as rank 0 has chosen.
"""

from dataclasses import dataclass

import torch

from gpt2.config import TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.ops.linear import LINEARS, faster_linear
from gpt2.runtime.device import Precision, choose_precision, precision_asked
from gpt2.training.compile import compile_is_worthwhile


@dataclass(frozen=True)
class Computation:
    """What was chosen."""

    precision: Precision
    linear: str  # one of `LINEARS`
    compiled: bool


def choose_computation(
    config: TrainingConfig,
    device: torch.device,
    flops: float,
    group: ProcessGroup,
    precision: str | None = None,
    linear: str | None = None,
    compiled: bool | None = None,
) -> Computation:
    """Choose; what is not None is settled already.

    Args:
        flops: Of the whole training, on this rank.
    """
    found = agreed_precision(precision or precision_asked(config), device, group)
    has_choice = device.type == "cpu" and found.name == "fp32"
    if not has_choice or linear not in LINEARS:
        linear = faster_linear() if has_choice and not config.deterministic else "PyTorch"
    if compiled is None and config.compile == "auto":
        compiled = compile_is_worthwhile(found, flops, config.max_training_hours * 3600)
    elif compiled is None:
        compiled = bool(config.compile)
    return Computation(found, *group.broadcast_object((linear, compiled)))


def agreed_precision(name: str, device: torch.device, group: ProcessGroup) -> Precision:
    """`choose_precision` by rank 0: what suits a CPU is measured, and might be another on each."""
    return choose_precision(group.broadcast_object(choose_precision(name, device).name), device)
