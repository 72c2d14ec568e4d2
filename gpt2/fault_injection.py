"""Faults on purpose, for tests: nothing happens unless the environment variable GPT2_FAULT asks for it.

GPT2_FAULT=nan_loss@5 makes the loss of step 5 NaN, GPT2_FAULT=inf_gradient@5-9 the gradient of steps 5 to 9 infinite.
The kinds are those of `KINDS`, several are separated by commas.
"""

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import OutOfMemoryError, Tensor, nan, no_grad

from gpt2.model import GPT2Model

if TYPE_CHECKING:
    from gpt2.train import Trainer

VARIABLE = "GPT2_FAULT"
IsDue = Callable[[], bool]


def install(trainer: "Trainer") -> None:
    """Hang the faults that are asked for on the model of a trainer."""
    for fault in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = re.fullmatch(r"(\w+)@(\d+)(?:-(\d+))?", fault)
        steps = range(int(match[2]), int(match[3] or match[2]) + 1) if match else range(0)
        if not match or match[1] not in KINDS or not steps or not steps[0]:
            raise ValueError(f"{VARIABLE}={fault}: KIND@STEP or KIND@FIRST-LAST is wanted, KIND of {', '.join(KINDS)}")

        def is_due(steps: range = steps) -> bool:
            return trainer.model.training and trainer.progress.step + 1 in steps

        KINDS[match[1]](trainer.model, is_due)


def _loss(value: float) -> Callable[[GPT2Model, IsDue], None]:
    def install(model: GPT2Model, is_due: IsDue) -> None:
        def spoil(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
            return (output[0], output[1] * value) if is_due() else None

        model.register_forward_hook(spoil)

    return install


def _gradient(value: float) -> Callable[[GPT2Model, IsDue], None]:
    def install(model: GPT2Model, is_due: IsDue) -> None:
        model.final_norm.weight.register_hook(lambda gradient: gradient * value if is_due() else None)

    return install


def _weight(model: GPT2Model, is_due: IsDue) -> None:
    @no_grad()
    def spoil(*_: object) -> None:
        if is_due():
            model.final_norm.bias[0] = nan

    model.register_forward_pre_hook(spoil)


def _raising(error: Exception) -> Callable[[GPT2Model, IsDue], None]:
    def install(model: GPT2Model, is_due: IsDue) -> None:
        def fail(*_: object) -> None:
            if is_due():
                raise error

        model.register_forward_pre_hook(fail)

    return install


KINDS: dict[str, Callable[[GPT2Model, IsDue], None]] = {
    "nan_loss": _loss(nan),
    "inf_loss": _loss(float("inf")),
    "nan_gradient": _gradient(nan),
    "inf_gradient": _gradient(float("inf")),
    "nan_weight": _weight,
    "out_of_memory": _raising(OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")),
    "out_of_host_memory": _raising(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
    ),
}
