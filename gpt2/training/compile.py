"""`torch.compile` where it pays; without a compiler the run goes on without it."""

import logging
import time
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.model import Forward, GPT2Model
from gpt2.ops.linear import LinearFunction
from gpt2.runtime.device import Precision, known_peak
from gpt2.runtime.rng import RandomState

log = logging.getLogger(__name__)

# Assumed, not measured, for there was no GPU: compiling takes a minute, and saves a quarter of the time.
PAYS_AFTER = 300.0  # seconds of training
USUAL_PEAK = 100e12  # FLOP/s, of a GPU that is in no table
USUAL_SHARE = 0.3  # of the peak, that a model reaches without a compiler


def compile_is_worthwhile(precision: Precision, flops: float, seconds: float) -> bool:
    """Whether compiling gains more time than it takes: on CUDA, with Triton, in a run that is long enough.

    On a CPU it saves 5 % of the time at best and takes half a minute or more, see experiments/performance.

    Args:
        flops: Of the whole training.
        seconds: That it may take at most.
    """
    if precision.device.type != "cuda":
        return False
    peak = known_peak(torch.cuda.get_device_name(precision.device)) or USUAL_PEAK
    if min(seconds, flops / (USUAL_SHARE * peak)) < PAYS_AFTER:
        return False
    if find_spec("triton") is None:
        log.info("Not compiled: Triton is not installed (train.compile=false says so beforehand)")
        return False
    return True


class Compiled:
    """A model compiled into one graph, for batches of one shape; batches of others go through the model as it is.

    Without a compiler all do, and a log line says so.
    """

    def __init__(
        self,
        model: GPT2Model,
        device: torch.device,
        shape: tuple[int, int],
        linear: LinearFunction = F.linear,
    ):
        """
        Args:
            shape: (b, t) of the batches that it is compiled for: a compilation takes a minute, and the last batch of an
                epoch, which is smaller, is not worth one.
            linear: What the model multiplies by where it cannot be compiled.
        """
        self.model, self.device, self.shape, self.linear = model, device, shape, linear
        self.forward: Forward | None = None

    def __call__(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        """As the model, which has no gradients yet when the shape comes for the first time."""
        if tuple(inputs["input_ids"].shape) != self.shape or inputs.get("attention_mask") is not None:
            return self.model(**inputs)
        if self.forward is None:
            self.forward = self._compile(inputs)
        return self.forward(**inputs)

    def _compile(self, inputs: dict[str, Any]) -> Forward:
        """Compile for these inputs, forward and backward: a step is taken, of which nothing stays."""
        log.info("Compiling the model: up to a minute or two, once")
        began, before = time.perf_counter(), RandomState.of_torch(self.device)
        kept = [parameter.grad for parameter in self.model.parameters()]
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
            log.warning("Not compiled, and slower for it: %s", reason)
            forward = self.model
            self.model.use_linear(self.linear)
        else:
            log.info("Compiled in %.0f s", time.perf_counter() - began)
        finally:
            for parameter, gradient in zip(self.model.parameters(), kept, strict=True):
                parameter.grad = gradient
            before.restore()
        return forward
