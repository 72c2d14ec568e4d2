"""How this process was started: alone, or by torchrun as one rank of several. Nothing heavy is imported here."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from math import gcd

from gpt2.errors import UserError


@dataclass(frozen=True)
class DistEnv:
    """This process among those that torchrun started, in the words of torchrun's environment variables."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine
    local_world_size: int = 1
    by_torchrun: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0: it alone writes files, speaks to the terminal and to W&B."""
        return self.rank == 0

    def command(self) -> str:
        """What starts a script in this way, as typed; of several machines each must say where the first is."""
        if not self.by_torchrun:
            return "python"
        nodes = self.world_size // self.local_world_size
        among = f" --nnodes={nodes} ..." if nodes > 1 else ""
        return f"torchrun{among} --nproc_per_node={self.local_world_size}"


@cache
def dist_env() -> DistEnv:
    """As the environment has it, which does not change.

    Raises:
        UserError: It has a part of it only.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return DistEnv()
    if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"RANK and WORLD_SIZE are set, as torchrun sets them, but not {', '.join(missing)}")
    rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in names)
    return DistEnv(rank, world_size, local_rank, local_world_size, by_torchrun=True)


def silence_unless_main() -> None:
    """Have this rank print nothing, if it is not rank 0; what it has to say goes through rank 0."""
    if not dist_env().is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the rest of the process


def report_to_torchrun(error: BaseException) -> None:
    """Show the exception that is being handled in the report that torchrun prints at its end."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def division(accumulation_steps: int, world_size: int) -> tuple[int, int]:
    """How a step is divided over the ranks.

    Returns:
        To how many groups of ranks its micro-batches are dealt out, and into how many parts each is cut, one for each
        rank of a group: as few as can be, for large passes are the fast ones.
    """
    groups = gcd(accumulation_steps, world_size)
    return groups, world_size // groups
