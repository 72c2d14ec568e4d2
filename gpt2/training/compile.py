"""How training steps are computed: device, number format, matrix products, and whether `torch.compile` is used."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import Forward, GPT2Model
from gpt2.ops.linear import LINEARS, LinearFunction, faster_linear
from gpt2.runtime.device import Precision, choose_precision, requested_precision
from gpt2.runtime.rng import RandomState

log = logging.getLogger(__name__)

# Compilation takes about a minute and saves about a quarter of a step: estimates, so shorter trainings would lose.
MIN_FLOPS = 5e16  # at 30 % of the peak, three minutes on an H100 and nine on an A100
MIN_SECONDS = 300.0


@dataclass(frozen=True)
class ComputePlan:
    """How steps are computed. The last bits of every number depend on it."""

    device: torch.device
    precision: Precision
    linear: str  # key of `LINEARS`
    compiled: bool


def choose_plan(
    config: TrainingConfig,
    device: torch.device,
    flops: float,
    group: ProcessGroup,
    saved: Mapping[str, Any] | None = None,
    compilable: bool = True,
) -> ComputePlan:
    """Settle what `config` leaves to `auto`. All ranks use the choice of rank 0.

    Args:
        flops: FLOPs of the whole training on this rank.
        saved: The `machine` entry of a checkpoint: a run resumed on the same kind of device repeats its choices.
        compilable: False under FSDP, whose wrapped model is not compiled.
    """
    saved = saved if saved and saved["device"] == device.type else {}
    requested = requested_precision(config)
    precision = agreed_precision(saved.get("precision", "auto") if requested == "auto" else requested, device, group)

    linear = saved.get("linear") if saved.get("precision") == precision.name else None
    has_choice = device.type == "cpu" and precision.name == "fp32"
    if not has_choice or linear not in LINEARS:
        linear = faster_linear() if has_choice and not config.deterministic else "PyTorch"

    if not compilable:
        compiled = False
    elif config.compile != "auto":
        compiled = bool(config.compile)
    elif "compiled" in saved:
        compiled = saved["compiled"]
    else:
        compiled = compile_is_worthwhile(device, flops, config.max_training_hours * 3600)
    return ComputePlan(device, precision, *group.broadcast_object((linear, compiled)))


def agreed_precision(name: str, device: torch.device, group: ProcessGroup) -> Precision:
    """The precision that rank 0 chooses: `auto` measures the CPU, so ranks could choose differently."""
    return choose_precision(group.broadcast_object(choose_precision(name, device).name), device)


def compile_is_worthwhile(device: torch.device, flops: float, seconds: float) -> bool:
    """Whether compilation saves more time than it takes: on CUDA, if the training is long enough.

    On a CPU it saves at most 5 % of a step and takes half a minute or more, see experiments/performance.

    Args:
        flops: FLOPs of the whole training.
        seconds: Time limit of the training.
    """
    return device.type == "cuda" and flops >= MIN_FLOPS and seconds >= MIN_SECONDS


class Compiled:
    """A model compiled into one graph for batches of one shape; batches of other shapes run uncompiled.

    If compilation fails, a warning is logged and every batch runs uncompiled.
    """

    def __init__(
        self, model: GPT2Model, device: torch.device, shape: tuple[int, int], linear: LinearFunction = F.linear
    ):
        """
        Args:
            shape: (b, t) of full batches. Compilation takes a minute, so the smaller last batch of an epoch, which
                would need a second one, runs uncompiled.
            linear: The matrix product to use if compilation fails.
        """
        self.model, self.device, self.shape, self.linear = model, device, shape, linear
        self.forward: Forward | None = None

    def __call__(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Arguments and result as those of the model."""
        if tuple(inputs["input_ids"].shape) != self.shape or inputs.get("attention_mask") is not None:
            return self.model(**inputs)
        if self.forward is None:
            return self._first_call(inputs)
        return self.forward(**inputs)

    def _first_call(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Compile, or fall back to the model."""
        log.info("Compiling the model, which takes up to two minutes once")
        random_state = RandomState.of_torch(self.device)
        self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        try:
            return self.forward(**inputs)
        except (RuntimeError, ImportError, OSError, SubprocessError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("Not compiled, training continues more slowly: %s", reason)
        random_state.restore()
        self.model.use_linear(self.linear)
        self.forward = self.model
        return self.model(**inputs)
