"""Detect steps whose loss or gradient is NaN or infinite, and keep them from changing the weights.

On a CPU and with loss scaling, the host checks before it calls the optimizer. On CUDA the host must not wait for the
device: there fused AdamW and `Muon` skip the step if `found_inf` is 1, and the host reads the result during the next
step, before that step changes anything.

Private API, checked with torch 2.13: `torch._foreach_norm`, and the attribute `found_inf` of fused optimizers, which
`torch.amp.GradScaler` sets too. tests/training/test_nonfinite.py fails if they change.
"""

import logging
from math import isfinite, nan

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from gpt2.config import OPTIMIZERS, TrainingConfig
from gpt2.distributed.parallel import local_part
from gpt2.errors import DivergenceError

log = logging.getLogger(__name__)

ADVICE = "A smaller train.learning_rate or a longer train.warmup_steps may help"


def gradient_norms(model: nn.Module) -> Tensor:
    """The gradient norm of each parameter that has a gradient, (n,), in the order of the model, on its device.

    Under FSDP these are the norms of this rank's shards.
    """
    return torch.stack(torch._foreach_norm([local_part(p.grad) for p in model.parameters() if p.grad is not None]))


def clip_gradients(model: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale the gradients, whose norm is given, to a norm of at most `limit`; 0 is no limit."""
    # A CPU skips the multiplication by 1; on a GPU the comparison would be a synchronization.
    if limit and (norm.device.type != "cpu" or norm + 1e-6 > limit):
        clip_grads_with_norm_(model.parameters(), limit, norm)


class MeanLoss:
    """The mean of losses that stay on the device. Losses of skipped steps, which are not finite, do not count."""

    def __init__(self, device: torch.device):
        self.totals = torch.zeros(2, device=device)  # sum and count

    def add(self, loss: Tensor) -> None:
        self.totals += torch.where(loss.isfinite(), torch.stack([loss, torch.ones_like(loss)]), 0)

    def compute(self) -> float:
        """NaN without any finite loss."""
        total, count = self.totals.tolist()
        return total / count if count else nan

    def reset(self) -> None:
        self.totals.zero_()


class NonFiniteGuard:
    """Checks each step; counts the skipped ones in all (`total`) and since the last finite one (`in_a_row`)."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig, loss_is_scaled: bool
    ):
        """`loss_is_scaled`: with fp16 an infinite gradient is no error, it lowers the loss scale."""
        self.model, self.optimizer, self.config, self.loss_is_scaled = model, optimizer, config, loss_is_scaled
        self.total = self.in_a_row = 0
        first = next(model.parameters())
        is_whole = local_part(first) is first  # `found_inf` is untested with the sharded tensors of FSDP
        can_skip = OPTIMIZERS[config.optimizer].skips_nonfinite and is_whole
        self.host_runs_ahead = first.device.type == "cuda" and not loss_is_scaled and can_skip
        self._pending: tuple[str, Tensor, torch.cuda.Event | None] | None = None

    def check(self, step: str, loss: Tensor, norms: Tensor) -> bool:
        """Whether to call the optimizer for this step. On CUDA always: its kernels skip non-finite steps.

        Args:
            step: Number and place in the data, for messages.
            loss: Scalar on the device.
            norms: Result of `gradient_norms`.

        Raises:
            DivergenceError: This step (on CUDA: the step before) is not finite and `train.on_nonfinite` is `stop`, or
                more than `train.nonfinite_limit` steps in a row were not finite.
        """
        self.poll()
        values = torch.cat([loss.detach().reshape(1).float(), norms.float()])
        if not self.host_runs_ahead:
            self._pending = step, values.cpu(), None
            overflows = self.loss_is_scaled and bool(loss.isfinite())  # the scaler skips it and lowers the scale
            return self.poll() or overflows
        self.optimizer.found_inf = (~values.isfinite().all()).float()  # type: ignore[attr-defined]
        self._pending = step, *_copy_to_host(values)
        return True

    def poll(self) -> bool:
        """Whether the newest step was finite; a non-finite one is reported once.

        Raises:
            DivergenceError: See `check`.
        """
        if self._pending is None:
            return True
        step, values, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        loss, *norms = values.tolist()
        if all(map(isfinite, (loss, *norms))):
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        problem = f"{step}: {self._describe(loss, norms)}"
        is_overflow = self.loss_is_scaled and isfinite(loss)
        if self.config.on_nonfinite == "stop" and not is_overflow:
            raise DivergenceError(
                f"{problem}; the weights are as before it. {ADVICE}, and train.on_nonfinite=skip skips such steps"
            )
        if self.in_a_row > self.config.nonfinite_limit:
            raise DivergenceError(
                f"{problem}, after train.nonfinite_limit={self.config.nonfinite_limit} such steps in a row; "
                f"the weights are as before them. {ADVICE}"
            )
        log.warning("%s: skipped, %s so far", problem, f"{self.total:,}")
        return False

    def _describe(self, loss: float, norms: list[float]) -> str:
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        wrong = [name for name, norm in zip(names, norms, strict=False) if not isfinite(norm)]
        in_loss = [] if isfinite(loss) else [f"the loss is {loss}"]
        in_gradient = [f"the gradient of {wrong[0]} is not finite"] if wrong else []
        more = f", nor that of {len(wrong) - 1} other parameters" if len(wrong) > 1 else ""
        return " and ".join(in_loss + in_gradient) + more

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _copy_to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start a copy to the host; on CUDA also the event that marks its end."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))
    return copy, arrived
