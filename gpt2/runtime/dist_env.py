"""The environment variables with which torchrun starts a process. Imports neither torch nor anything else slow."""

import atexit
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

from gpt2.errors import UserError, without_password


@dataclass(frozen=True)
class DistEnv:
    """The place of this process among the ranks of torchrun; by default a single process without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    local_world_size: int = 1
    by_torchrun: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files, prints, and logs to W&B."""
        return self.rank == 0

    def command(self) -> str:
        """The beginning of a command that starts a script with the same number of processes."""
        if not self.by_torchrun:
            return "python"
        machines = self.world_size // self.local_world_size
        options = f" --nnodes={machines} ..." if machines > 1 else ""
        return f"torchrun{options} --nproc_per_node={self.local_world_size}"


@cache
def dist_env() -> DistEnv:
    """Read the environment variables, which do not change.

    Raises:
        UserError: Some of them are missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return DistEnv()
    if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK and WORLD_SIZE are set, as by torchrun, but not {', '.join(missing)}")
    rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in names)
    return DistEnv(rank, world_size, local_rank, local_world_size, by_torchrun=True)


def silence_unless_main() -> None:
    """Discard standard output, and log records below errors, unless this is rank 0."""
    if not dist_env().is_main:
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # open until the process ends


def report_to_torchrun(error: BaseException) -> None:
    """Write an exception, without passwords, to the report that torchrun prints when it ends."""
    if name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        def starred(values: dict[str, Any]) -> dict[str, Any]:
            return {key: without_password(value) if isinstance(value, str) else value for key, value in values.items()}

        get_error_handler().record_exception(error)
        file = Path(name)
        file.write_text(json.dumps(json.loads(file.read_text(), object_hook=starred)))


@contextmanager
def exit_without_finalization() -> Iterator[None]:
    """In a rank, end the process after its exit handlers, before Python finalizes the interpreter.

    A thread of gloo may release its last tensor during finalization, which aborts the process
    (pytorch/pytorch#190489), so torchrun reports a complete run as failed. Exit handlers that were registered before
    the block do not run.
    """
    code = 1  # the exit code after an uncaught exception

    def end() -> None:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe
                stream.flush()
        os._exit(code)

    if "RANK" in os.environ:  # invalid variables are reported in the block
        atexit.register(end)  # called last, because registered first
    try:
        yield
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        raise
    code = 0


def division(accumulation_steps: int, world_size: int) -> tuple[int, int]:
    """Divide the micro-batches of a step over the ranks.

    Each group of ranks gets some of the micro-batches, and each rank of a group gets a slice of every one of these.
    There are as many groups as possible, because large passes are faster.

    Returns:
        The number of groups, and the number of ranks in a group.
    """
    groups = gcd(accumulation_steps, world_size)
    return groups, world_size // groups
