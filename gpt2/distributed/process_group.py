"""The process group that torchrun starts: collectives over its ranks. In a single process everything is a no-op.

Data loading is rank-agnostic: every rank reads the global batch and computes its slice of it. So the order of the data,
the position in the data and the number of tokens that divides the loss do not depend on the number of ranks.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.errors import LostRankError, RankTimeoutError, UserError
from gpt2.ops.cross_entropy import IGNORE_INDEX
from gpt2.runtime.device import choose_device
from gpt2.runtime.dist_env import DistEnv, dist_env, division

Batch = dict[str, Tensor]

SECONDS_TO_RECEIVE = 60.0

# Keeps groups alive until the process ends. Otherwise DDP frees the group while it holds the interpreter lock, and
# waits for threads that may need this lock.
_groups: list[Any] = []


class ProcessGroup:
    """The ranks that train together, as seen by one of them; by default a single process."""

    def __init__(self, env: DistEnv | None = None):
        self.env = env or DistEnv()
        self.rank, self.size, self.is_main = self.env.rank, self.env.world_size, self.env.is_main

    @contextmanager
    def local_main_first(self, what: str) -> Iterator[None]:
        """Run a block on the first rank of each machine, then on its other ranks. All ranks leave it together.

        Preparing data may take hours, and `distributed.timeout` would end a collective. So the ranks wait at the store.
        They poll it, because signals do not interrupt a blocking wait.
        """
        is_local_main = self.env.local_rank == 0
        if not is_local_main:
            self._wait_for_local_mains(what)
        yield
        if self.size > 1 and is_local_main:
            _store().add(what, self.env.local_world_size)
            self._wait_for_local_mains(what)

    def _wait_for_local_mains(self, what: str) -> None:
        while _store().add(what, 0) < self.size:
            time.sleep(0.1)

    def shard(self, micro_batches: list[Batch], accumulation_steps: int) -> list[Batch]:
        """This rank's share of a step, divided as evenly as possible.

        Every rank gets the same number of micro-batches, because ranks wait for each other in each pass. If no rows are
        left for a rank at the end of an epoch, it gets one row without targets.

        Args:
            micro_batches: Those of the whole step, each a dictionary of tensors (b, t).
            accumulation_steps: The number of micro-batches in a full step.
        """
        if self.size == 1:
            return micro_batches
        groups, parts = division(accumulation_steps, self.size)
        group, part = divmod(self.rank, parts)
        no_targets = {key: tensor[:1] for key, tensor in micro_batches[0].items()}
        no_targets["targets"] = torch.full_like(no_targets["targets"], IGNORE_INDEX)

        shards = []
        for batch in micro_batches[group::groups]:
            rows = -(-len(batch["input_ids"]) // parts)
            shard = {key: tensor[part * rows : (part + 1) * rows] for key, tensor in batch.items()}
            shards.append(shard if len(shard["input_ids"]) else no_targets)
        passes = -(-len(micro_batches) // groups)
        return shards + [no_targets] * (passes - len(shards))

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, numbers: list[int]) -> list[list[int]]:
        """Return the numbers of each rank, on all ranks. Runs on the host, without synchronizing the GPU."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own)
        return [tensor.tolist() for tensor in gathered]

    def broadcast_object(self, value: Any) -> Any:
        """Return the value of rank 0, on all ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, and only the own value on other ranks."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered)
        return gathered or [value]


def broadcast_from_main(value: Any) -> Any:
    """Return the JSON value of rank 0, on all ranks. Call this before `init_distributed`, once per process.

    Rank 0 may serve the store and end right after this call. So it waits until all ranks have read the value, but at
    most SECONDS_TO_RECEIVE.
    """
    store, env = _store(), dist_env()
    if not env.is_main:
        value = json.loads(store.get("from main"))
        store.add("received", 1)
        return value
    store.set("from main", json.dumps(value))
    deadline = time.monotonic() + SECONDS_TO_RECEIVE
    while store.add("received", 0) < env.world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


@contextmanager
def init_distributed(timeout: float, device_name: str, key: str = "train.device") -> Iterator[ProcessGroup]:
    """Join the process group that torchrun's environment variables describe, until the end of the block.

    Args:
        timeout: Seconds that a collective operation may take (`distributed.timeout`).
        device_name, key: Arguments of `choose_device`.

    Raises:
        UserError: This machine has no such device.
        LostRankError: Another rank ended, or did not answer within the timeout.
    """
    device, env = choose_device(device_name, key), dist_env()
    if not env.by_torchrun:
        yield ProcessGroup()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with lost_ranks_named():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", _store()),
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=timeout),
        )
        _groups.append(dist.group.WORLD)
        yield ProcessGroup(env)
    dist.destroy_process_group()


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn errors of torch.distributed about another rank into a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        if lost := _lost_rank(error):
            raise lost from error
        raise


def _lost_rank(error: RuntimeError) -> LostRankError | None:
    """Translate an error of torch.distributed about another rank to a LostRankError; None for any other error."""
    text = str(error)
    if "Timed out waiting" in text:
        return RankTimeoutError("another rank did not answer within distributed.timeout: it hangs, or needs more time")
    signs = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
    if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
        return LostRankError("lost the connection to another rank, whose own error is the cause")
    return None


@cache
def _store() -> dist.Store:
    """The key-value store that all ranks share; torchrun or, without it, rank 0 serves it."""
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    # torchrun's store outlives the ranks that it restarts, so the keys of each attempt need a prefix. On several
    # machines the count of restarts cannot be the prefix: a machine without a failed rank does not count the restart.
    restarts, machines = int(os.environ["TORCHELASTIC_MAX_RESTARTS"]), int(os.environ["GROUP_WORLD_SIZE"])
    if restarts and machines > 1:
        raise UserError("torchrun: --max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
