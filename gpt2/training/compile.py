"""How training steps are computed: device, number format, matrix products, and whether `torch.compile` is used."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.config import TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import GPT2Model
from gpt2.ops.cross_entropy import CHUNK_BYTES
from gpt2.ops.linear import LINEARS, LinearFunction, faster_linear
from gpt2.runtime.device import Precision, choose_precision, known_peak, peak_flops, requested_precision

log = logging.getLogger(__name__)

# Estimates, not measurements: compilation takes about a minute and saves about a quarter of the time of a step.
MIN_TRAINING_SECONDS = 300.0  # shorter trainings are not compiled
DEFAULT_PEAK_FLOPS = 100e12  # of a GPU that is not in the table of peaks
TYPICAL_UTILIZATION = 0.3  # of the peak, without compilation


@dataclass(frozen=True)
class ComputePlan:
    """How steps are computed. The last bits of every number depend on it."""

    device: torch.device
    precision: Precision
    linear: str  # key of `LINEARS`
    compiled: bool
    chunk_bytes: int | None = None  # of the logits in memory at a time, see `gpt2.ops.cross_entropy`

    def utilization(self, flops_per_second: float) -> float | None:
        """MFU: the model's FLOPs on one device as a fraction of its peak; None where the peak is unknown."""
        peak = peak_flops(self.precision)
        return peak and flops_per_second / peak


def choose_plan(
    config: TrainingConfig,
    device: torch.device,
    flops: float,
    group: ProcessGroup,
    saved: Mapping[str, Any] | None,
) -> ComputePlan:
    """Settle what `config` leaves to `auto`. All ranks use the choice of rank 0.

    Args:
        flops: FLOPs of the whole training on this rank.
        saved: The `machine` entry of a checkpoint: a run resumed on the same kind of device repeats its choices.
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

    if config.compile != "auto":
        compiled = bool(config.compile)
    elif "compiled" in saved:
        compiled = saved["compiled"]
    else:
        compiled = compile_is_worthwhile(precision, flops, config.max_training_hours * 3600)
    chunk_bytes = chunk_bytes_of(device)
    if chunk_bytes and isinstance(used := saved.get("chunk_bytes"), int) and 0 < used < chunk_bytes:
        chunk_bytes = used
    return ComputePlan(device, precision, *group.broadcast_object((linear, compiled, chunk_bytes)))


def chunk_bytes_of(device: torch.device) -> int | None:
    """The size of a chunk of logits on a GPU: a 64th of its memory, rounded down to a power of two.

    Free memory would depend on other programs, and with it the size of the chunks, the order of sums and the last bits
    of the loss. The gradient of the head is added up after each chunk: with chunks of 256 MB seven times in a pass of
    GPT-2 124M over 16 blocks of 1,024 tokens, in all 3 GB to read and write.
    """
    if device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_BYTES["cuda"], 1 << (memory // 64).bit_length() - 1)


def agreed_precision(name: str, device: torch.device, group: ProcessGroup) -> Precision:
    """The precision that rank 0 chooses: the ranks may have different chips."""
    return choose_precision(group.broadcast_object(choose_precision(name, device).name), device)


def compile_is_worthwhile(precision: Precision, flops: float, seconds: float) -> bool:
    """Whether compilation saves more time than it takes: on CUDA with Triton, if the training is long enough.

    On a CPU it saves 2 to 5 % of a step in bf16 and makes one in fp32 slower, see experiments/performance.

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
    """A model whose blocks and loss are compiled for batches of one shape; batches of other shapes run uncompiled.

    In one graph of the whole model, all gradients would be ready at the very end of the backward pass, and DDP could
    not exchange any of them before. Block by block they are ready as without compilation, FSDP gathers one block at a
    time, and since the blocks are alike only one is compiled, which takes less time than the whole graph.
    """

    def __init__(
        self, model: GPT2Model, device: torch.device, shape: tuple[int, int], linear: LinearFunction = F.linear
    ):
        """
        Args:
            shape: (b, t) of full batches. The smaller last batch of an epoch would need a second compilation.
            linear: The matrix product to use if nothing can be compiled here.
        """
        self.model, self.shape, self.linear = model, shape, linear
        self.parts: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}
        torch._dynamo.config.optimize_ddp = False  # it would divide a block into the buckets of DDP
        x = torch.ones(2, device=device, requires_grad=True)
        self.works = True
        self.run(torch.sin, x).sum().backward()  # finds a missing compiler before the first step

    def __call__(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Arguments and result as those of the model."""
        fits = tuple(inputs["input_ids"].shape) == self.shape and inputs.get("attention_mask") is None
        return self.model(**inputs, run=self.run) if fits and self.works else self.model(**inputs)

    def run(self, part: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call a part, compiled at its first call. If that fails, a warning is logged and nothing more is compiled."""
        if not self.works:
            return part(*arguments)
        if part in self.parts:
            return self.parts[part](*arguments)
        if len(self.parts) == 1:  # the trial of the constructor
            log.info("Compiling: the first step takes about a minute longer")
        compiled = torch.compile(part, fullgraph=True, dynamic=False)
        try:
            result = compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError, SubprocessError) as error:
            reason = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            log.warning("Not compiled, training continues more slowly: %s", reason)
            self.works = False
            self.model.use_linear(self.linear)
            return part(*arguments)
        self.parts[part] = compiled
        return result
