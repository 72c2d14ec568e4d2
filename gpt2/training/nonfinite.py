"""Steps whose loss or gradient is no finite number: they are kept from the weights, and told.

On a CPU, with Muon and where the loss is scaled, the host looks before it has the optimizer step. Else, on CUDA, it
runs ahead of the device and must not wait: there the optimizer itself leaves the step out (AdamW's fused kernel does so
where `found_inf` is 1, as for loss scaling), and the host hears of it during the next step, before that one changes
anything.
"""

import logging
from math import isfinite

import torch
from torch import Tensor, nn

from gpt2.config import TrainingConfig
from gpt2.distributed.parallel import local
from gpt2.errors import DivergenceError

log = logging.getLogger(__name__)

ADVICE = "A smaller train.learning_rate or a longer train.warmup_steps may help"


def gradient_norms(model: nn.Module) -> Tensor:
    """The norm of the gradient of each parameter that has one, (n,), in their order in the model, on its device.

    Where ranks hold parts of them, that of this rank's part.
    """
    return torch.stack(torch._foreach_norm([local(p.grad) for p in model.parameters() if p.grad is not None]))


def broken(tensors: dict[str, Tensor]) -> list[str]:
    """The names of those with a number in them that is not finite."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    return [name for name, tensor in floats.items() if not torch.linalg.vector_norm(tensor, float("inf")).isfinite()]


class NonFiniteGuard:
    """Judges each step. Knows how many were left out, `total` and the newest `in_a_row`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig, loss_is_scaled: bool
    ):
        """`loss_is_scaled`: fp16; then a gradient beyond its range is no fault, but lowers the scale."""
        self.model, self.optimizer, self.config, self.loss_is_scaled = model, optimizer, config, loss_is_scaled
        self.total = self.in_a_row = 0
        leaves_out = isinstance(optimizer, torch.optim.AdamW)  # by itself, where `found_inf` is 1
        first = next(model.parameters())
        is_whole = local(first) is first  # fused AdamW on parts of tensors has not been tried with `found_inf`
        self.host_runs_ahead = first.device.type == "cuda" and not loss_is_scaled and leaves_out and is_whole
        self._unheard: tuple[str, Tensor, torch.cuda.Event | None] | None = None

    def check(self, step: str, loss: Tensor, norms: Tensor) -> bool:
        """Whether the optimizer is to be called for this step. On CUDA it is, and leaves out by itself what is wrong.

        Args:
            step: Its place, for whoever reads of it.
            loss: Its loss, a scalar on the device.
            norms: What `gradient_norms` returned.

        Raises:
            Divergence: This step is not finite and `train.on_nonfinite` is `stop`, or too many are, one after another.
                On CUDA it may be the step before.
        """
        self.poll()
        evidence = torch.cat([loss.detach().reshape(1).float(), norms.float()])
        if not self.host_runs_ahead:
            self._unheard = step, evidence.cpu(), None
            overflows = self.loss_is_scaled and bool(loss.isfinite())  # the scaler leaves it out, and lowers the scale
            return self.poll() or overflows
        self.optimizer.found_inf = (~evidence.isfinite().all()).float()  # type: ignore[attr-defined]
        self._unheard = step, *_on_its_way_to_host(evidence)
        return True

    def poll(self) -> bool:
        """Whether the newest step was finite; of one that was not, this tells once.

        Raises:
            Divergence: See `check`.
        """
        if self._unheard is None:
            return True
        step, evidence, arrived = self._unheard
        self._unheard = None
        if arrived is not None:
            arrived.synchronize()
        loss, *norms = evidence.tolist()
        if all(map(isfinite, (loss, *norms))):
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        told = f"{step}: {self._what_is_wrong(loss, norms)}"
        is_overflow = self.loss_is_scaled and isfinite(loss)
        if self.config.on_nonfinite == "stop" and not is_overflow:
            raise DivergenceError(
                f"{told}; the weights are as before it. {ADVICE}, and train.on_nonfinite=skip leaves such steps out"
            )
        if self.in_a_row > self.config.nonfinite_limit:
            raise DivergenceError(
                f"{told}, the last of more than train.nonfinite_limit={self.config.nonfinite_limit} steps one after "
                f"another; the weights are as before them. {ADVICE}"
            )
        log.warning("%s: left out, %s so far", told, f"{self.total:,}")
        return False

    def _what_is_wrong(self, loss: float, norms: list[float]) -> str:
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        wrong = [name for name, norm in zip(names, norms, strict=False) if not isfinite(norm)]
        in_loss = [] if isfinite(loss) else [f"the loss is {loss}"]
        in_gradient = [f"the gradient of {wrong[0]} is not finite"] if wrong else []
        more = f", nor that of {len(wrong) - 1} other parameters" if len(wrong) > 1 else ""
        return " and ".join(in_loss + in_gradient) + more

    def state(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _on_its_way_to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it is there; None where it is there at once."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))
    return copy, arrived
