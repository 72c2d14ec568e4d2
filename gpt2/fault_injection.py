"""Faults on purpose, for tests: nothing happens unless the environment variable GPT2_FAULT asks for it.

GPT2_FAULT=nan_loss@5 makes the loss of step 5 NaN, GPT2_FAULT=inf_gradient@5-9 the gradient of steps 5 to 9 infinite.
The kinds are those of `KINDS`, several are separated by commas. GPT2_FAULT=exit@5#2 is for trial 2 of a study only,
GPT2_FAULT=exit@5%1 for rank 1.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import OutOfMemoryError, Tensor, nan, no_grad

if TYPE_CHECKING:
    from gpt2.train import Trainer

VARIABLE = "GPT2_FAULT"
IsDue = Callable[[], bool]
Install = Callable[["Trainer", IsDue], None]


def install(trainer: "Trainer") -> None:
    """Hang the faults that are asked for on the model of a trainer."""
    for fault in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = re.fullmatch(r"(\w+)@(\d+)(?:-(\d+))?(?:#(\d+))?(?:%(\d+))?", fault)
        steps = range(int(match[2]), int(match[3] or match[2]) + 1) if match else range(0)
        if not match or match[1] not in KINDS or not steps or not steps[0]:
            raise ValueError(f"{VARIABLE}={fault}: KIND@STEP or KIND@FIRST-LAST is wanted, KIND of {', '.join(KINDS)}")
        if match[4] is not None and ((trainer.run or {}).get("study") or {}).get("trial") != int(match[4]):
            continue
        if match[5] is not None and trainer.group.rank != int(match[5]):
            continue

        def is_due(steps: range = steps) -> bool:
            return trainer.model.training and trainer.progress.step + 1 in steps

        KINDS[match[1]](trainer, is_due)


def _loss(value: float) -> Install:
    def install(trainer: "Trainer", is_due: IsDue) -> None:
        def spoil(_module: object, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
            return (output[0], output[1] * value) if is_due() else None

        trainer.model.register_forward_hook(spoil)

    return install


def _gradient(value: float) -> Install:
    def install(trainer: "Trainer", is_due: IsDue) -> None:
        trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * value if is_due() else None)

    return install


def _weight(trainer: "Trainer", is_due: IsDue) -> None:
    @no_grad()
    def spoil() -> None:
        trainer.model.final_norm.bias[0] = nan

    _before_pass(spoil)(trainer, is_due)


def _raising(error: BaseException) -> Install:
    def fail() -> None:
        raise error

    return _before_pass(fail)


def _before_pass(act: Callable[[], object]) -> Install:
    def install(trainer: "Trainer", is_due: IsDue) -> None:
        def hook(*_: object) -> None:
            if is_due():
                act()

        trainer.model.register_forward_pre_hook(hook)

    return install


def _no_evaluation(trainer: "Trainer", is_due: IsDue) -> None:
    evaluate = trainer._evaluate
    trainer._evaluate = lambda: None if is_due() else evaluate()  # type: ignore[method-assign]


KINDS: dict[str, Install] = {
    "nan_loss": _loss(nan),
    "inf_loss": _loss(float("inf")),
    "nan_gradient": _gradient(nan),
    "inf_gradient": _gradient(float("inf")),
    "nan_weight": _weight,
    "out_of_memory": _raising(OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")),
    "out_of_host_memory": _raising(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")
    ),
    "memory_error": _raising(MemoryError()),
    "exception": _raising(RuntimeError("on purpose")),
    "exit": _raising(SystemExit(7)),
    "kill": _before_pass(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stop": _before_pass(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "hang": _before_pass(lambda: time.sleep(86400)),
    "slow": _before_pass(lambda: time.sleep(0.1)),
    "no_evaluation": _no_evaluation,
}
