"""Inject faults into training, in this process and in the scripts that tests start.

The environment variable GPT2_FAULT names them. GPT2_FAULT=nan_loss@5 makes the loss of step 5 NaN,
GPT2_FAULT=inf_gradient@5-9 makes the gradient of steps 5 to 9 infinite. The kinds are those of `KINDS`; several are
separated by commas. GPT2_FAULT=exit@5#2 applies only to trial 2 of a study, GPT2_FAULT=exit@5%1 only to rank 1.

`enable` wraps the constructor of Trainer as soon as `gpt2.train` is imported. `tests/site` on PYTHONPATH calls it when
Python starts, so this module imports nothing but the standard library.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from math import inf, nan
from pathlib import Path

VARIABLE = "GPT2_FAULT"
SITE = str(Path(__file__).resolve().with_name("site"))  # for PYTHONPATH


class PatchTrainer(MetaPathFinder):
    """An import hook that wraps the constructor of Trainer after `gpt2.train` was executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "gpt2.train":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            patch(module.Trainer)

        spec.loader.exec_module = execute_and_patch
        return spec


def enable() -> None:
    if "gpt2.train" in sys.modules:
        patch(sys.modules["gpt2.train"].Trainer)
    else:
        sys.meta_path.insert(0, PatchTrainer())


def patch(trainer_class) -> None:
    construct = trainer_class.__init__

    @wraps(construct)
    def construct_with_faults(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        install(self)

    if not hasattr(construct, "__wrapped__"):
        trainer_class.__init__ = construct_with_faults


def install(trainer) -> None:
    """Add the faults that GPT2_FAULT names to the model of a trainer, but not after torchrun restarted it."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    for fault in filter(None, os.environ.get(VARIABLE, "").split(",")):
        match = re.fullmatch(r"(\w+)@(\d+)(?:-(\d+))?(?:#(\d+))?(?:%(\d+))?", fault)
        steps = range(int(match[2]), int(match[3] or match[2]) + 1) if match else range(0)
        if not match or match[1] not in KINDS or not steps or not steps[0]:
            raise ValueError(f"{VARIABLE}={fault}: not KIND@STEP or KIND@FIRST-LAST with KIND of {', '.join(KINDS)}")
        if match[4] is not None and ((trainer.run or {}).get("study") or {}).get("trial") != int(match[4]):
            continue
        if match[5] is not None and trainer.group.rank != int(match[5]):
            continue

        def is_due(steps: range = steps) -> bool:
            return trainer.model.training and trainer.progress.step + 1 in steps

        KINDS[match[1]](trainer, is_due)


def multiply_loss(value: float):
    def add(trainer, is_due) -> None:
        def hook(_module, _inputs, output):
            return (output[0], output[1] * value) if is_due() else None

        trainer.model.register_forward_hook(hook)

    return add


def multiply_gradient(value: float):
    def add(trainer, is_due) -> None:
        trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * value if is_due() else None)

    return add


def before_pass(act: Callable):
    """Call `act` with the trainer before a forward pass."""

    def add(trainer, is_due) -> None:
        trainer.model.register_forward_pre_hook(lambda *_: act(trainer) if is_due() else None)

    return add


def spoil_weight(trainer) -> None:
    trainer.model.final_norm.bias.data[0] = nan


def raise_out_of_memory(_trainer) -> None:
    from torch import OutOfMemoryError

    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def raises(error: BaseException):
    def fail(_trainer) -> None:
        raise error

    return before_pass(fail)


def skip_evaluation(trainer, is_due) -> None:
    evaluate = trainer._evaluate
    trainer._evaluate = lambda: None if is_due() else evaluate()


NO_HOST_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
KINDS = {
    "nan_loss": multiply_loss(nan),
    "inf_loss": multiply_loss(inf),
    "nan_gradient": multiply_gradient(nan),
    "inf_gradient": multiply_gradient(inf),
    "nan_weight": before_pass(spoil_weight),
    "out_of_memory": before_pass(raise_out_of_memory),
    "out_of_host_memory": raises(RuntimeError(NO_HOST_MEMORY)),
    "memory_error": raises(MemoryError()),
    "exception": raises(RuntimeError("on purpose")),
    "exit": raises(SystemExit(7)),
    "kill": before_pass(lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "stop": before_pass(lambda _: os.kill(os.getpid(), signal.SIGSTOP)),
    "hang": before_pass(lambda _: time.sleep(86400)),
    "slow": before_pass(lambda _: time.sleep(0.1)),
    "no_evaluation": skip_evaluation,
}
