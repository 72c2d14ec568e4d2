"""`torch.compile` where it pays; without a compiler the run goes on without it."""

import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.device import Precision, known_peak
from gpt2.reproducibility import RandomState

log = logging.getLogger(__name__)

Forward = Callable[..., tuple[Tensor | None, Tensor | None]]  # as `GPT2Model.forward`

PAYS_AFTER = 300.0  # seconds of training: compiling takes a minute of them, and saves a quarter of the others
USUAL_PEAK = 100e12  # FLOP/s, of a GPU that is in no table
USUAL_SHARE = 0.3  # of the peak, that a model reaches without a compiler


def pays(precision: Precision, flops: float, seconds: float) -> bool:
    """Whether compiling gains more time than it takes: on CUDA, with Triton, in a run that is long enough.

    On a CPU nothing was gained by it, see experiments/performance.

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
    """A model compiled into one graph at its first call; without a compiler, the model as it is, and a log line."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.forward: Forward | None = None

    def __call__(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        """As the model, which has no gradients yet at the first call."""
        if self.forward is None:
            self.forward = self._compile(inputs)
        return self.forward(**inputs)

    def _compile(self, inputs: dict[str, Any]) -> Forward:
        """Compile for these inputs, forward and backward: a step is taken, of which nothing stays."""
        log.info("Compiling the model: up to a minute or two, once")
        began, before = time.perf_counter(), RandomState.of_torch(self.device)
        forward: Forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        try:
            _, loss = forward(**inputs)
            assert loss is not None
            loss.backward()
        except (RuntimeError, ImportError, OSError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
            log.warning("Not compiled, and slower for it: %s", reason)
            forward = self.model
        else:
            log.info("Compiled in %.0f s", time.perf_counter() - began)
        finally:
            self.model.zero_grad(set_to_none=True)
            before.restore()
        return forward
