"""How training steps are computed: device, number format, matrix products, and whether `torch.compile` is used."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import Forward, GPT2Model
from gpt2.ops.linear import LINEARS, LinearFunction, faster_linear
from gpt2.runtime.device import Precision, choose_precision, known_peak, requested_precision
from gpt2.runtime.rng import RandomState

log = logging.getLogger(__name__)

# Estimates, not measurements: compilation takes about a minute and saves about a quarter of the time of a step.
MIN_TRAINING_SECONDS = 300.0  # below this, compilation does not pay
DEFAULT_PEAK_FLOPS = 100e12  # of a GPU that is not in the table of peaks
TYPICAL_UTILIZATION = 0.3  # of the peak, without compilation


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
    saved: Mapping[str, Any] | None,
    compilable: bool,
) -> ComputePlan:
    """Settle what `config` leaves to `auto`. All ranks use the choice of rank 0.

    Args:
        flops: FLOPs of the whole training on this rank.
        saved: The `machine` entry of a checkpoint: a run resumed on the same kind of device repeats its choices.
        compilable: False under FSDP, whose wrapped model is not compiled.
    """
    saved = saved if saved and saved.get("device") == device.type else {}
    requested = requested_precision(config)
    if requested == "auto" and saved.get("precision") in ("fp32", "bf16", "fp16"):
        requested = saved["precision"]
    precision = agreed_precision(requested, device, group)

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
        compiled = compile_is_worthwhile(precision, flops, config.max_training_hours * 3600)
    return ComputePlan(device, precision, *group.broadcast_object((linear, compiled)))


def agreed_precision(name: str, device: torch.device, group: ProcessGroup) -> Precision:
    """The precision that rank 0 chooses: the ranks may have different chips."""
    return choose_precision(group.broadcast_object(choose_precision(name, device).name), device)


def compile_is_worthwhile(precision: Precision, flops: float, seconds: float) -> bool:
    """Whether compilation saves more time than it takes: on CUDA with Triton, if the training is long enough.

    On a CPU it saves 6 % of a step in bf16 and makes one in fp32 slower, see experiments/performance.

    Args:
        flops: FLOPs of the whole training.
        seconds: Time limit of the training.
    """
    if precision.device.type != "cuda":
        return False
    peak = known_peak(torch.cuda.get_device_name(precision.device)) or DEFAULT_PEAK_FLOPS
    if min(seconds, flops / (TYPICAL_UTILIZATION * peak)) < MIN_TRAINING_SECONDS:
        return False
    if find_spec("triton") is None:
        log.info("Not compiled: Triton is not installed (train.compile=false hides this message)")
        return False
    return True


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
            self.forward = self._compile(inputs)
        return self.forward(**inputs)

    def _compile(self, inputs: dict[str, Any]) -> Forward:
        """Compile forward and backward by running both once; gradients and random states are restored afterwards."""
        log.info("Compiling the model, which takes up to two minutes once")
        started, random_state = time.perf_counter(), RandomState.of_torch(self.device)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        forward: Forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        try:
            _, loss = forward(**inputs)
            assert loss is not None
            loss.backward()
        except (RuntimeError, ImportError, OSError, SubprocessError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            log.warning("Not compiled, training continues more slowly: %s", reason)
            forward = self.model
            self.model.use_linear(self.linear)
        else:
            log.info("Compiled in %.0f s", time.perf_counter() - started)
        finally:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            random_state.restore()
        return forward
