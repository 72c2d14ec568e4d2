"""Training on several devices: what changes under torchrun. Alone, everything here does nothing.

The data know of no ranks. Each rank reads the whole step and computes its share of it, so the order of the data, the
place in them, and the number of tokens by which the loss is divided are the same however many ranks there are.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2.errors import ResourceError
from gpt2.ops.cross_entropy import IGNORE_INDEX
from gpt2.runtime.device import choose_device
from gpt2.runtime.dist_env import DistEnv, dist_env, division

if TYPE_CHECKING:
    from gpt2.distributed.watch import Watch

Batch = dict[str, Tensor]

# Of one collective operation. It is the watch that ends ranks which wait in vain; this is for the case that it fails.
LAST_RESORT = timedelta(minutes=10)


class ProcessGroup:
    """The ranks that train together, as one of them sees them."""

    def __init__(self, launched: DistEnv | None = None, watch: "Watch | None" = None):
        """By default this process is alone."""
        self.env = launched or DistEnv()
        self.watch = watch
        self.rank, self.size, self.is_main = self.env.rank, self.env.world_size, self.env.is_main

    def mark(self, place: str) -> None:
        """Tell the others how far this rank is: something has been done, now comes `place`."""
        if self.watch:
            self.watch.mark(place)

    def watched(self, watched: bool = True) -> AbstractContextManager[None]:
        """See `Watch.watched`."""
        return self.watch.watched(watched) if self.watch else nullcontext()

    def barrier(self, place: str) -> None:
        """Wait for the others, however long they take."""
        if self.watch:
            self.watch.barrier(place)

    @contextmanager
    def local_main_first(self, what: str) -> Iterator[None]:
        """Have the first rank of each machine do something before the others of it do."""
        key = f"{what} on {os.uname().nodename}"
        if self.watch and self.env.local_rank:
            self.watch.wait_for(key)
        yield
        if self.watch and not self.env.local_rank:
            self.watch.store.set(key, "")

    def share(self, micro_batches: list[Batch], accumulation_steps: int) -> list[Batch]:
        """This rank's part of a step: as many batches as any other rank has, of rows shared out as even as can be.

        Where there is nothing left for this rank, at the end of the data, it computes on a row that has no targets:
        ranks that wait for each other must all come.

        Args:
            accumulation_steps: The micro-batches of a full step.
        """
        if self.size == 1:
            return micro_batches
        groups, parts = division(accumulation_steps, self.size)
        group, part = divmod(self.rank, parts)
        shares = []
        for batch in micro_batches[group::groups]:
            rows = -(-len(batch["input_ids"]) // parts)
            shares.append({key: tensor[part * rows : (part + 1) * rows] for key, tensor in batch.items()})
        nothing = {key: tensor[:1] for key, tensor in micro_batches[0].items()}
        nothing["targets"] = torch.full_like(nothing["targets"], IGNORE_INDEX)
        passes = -(-len(micro_batches) // groups)
        shares = [share if len(share["input_ids"]) else nothing for share in shares]
        return shares + [nothing] * (passes - len(shares))

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in its place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of each rank, for all to know: the host waits for the other hosts, not for a GPU."""
        if self.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [tensor.tolist() for tensor in found]

    def broadcast_object(self, value: Any) -> Any:
        """The value that rank 0 has."""
        found = [value]
        if self.size > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, on rank 0; elsewhere only its own."""
        if self.size == 1:
            return [value]
        found = [None] * self.size if self.is_main else None
        dist.gather_object(value, found)
        return found or [value]


def broadcast_from_main(what: str, value: Any) -> Any:
    """The value that rank 0 has, on each rank; the others wait for it. Before they are `init_distributed`."""
    store = dist.PrefixStore(f"told/{what}", _shared_store())
    if dist_env().is_main:
        store.set(what, json.dumps(value))
        for _ in _patiently():  # it may be this process that holds the store
            if store.add("heard", 0) >= dist_env().world_size - 1:
                return value
    store.wait([what])
    store.add("heard", 1)
    return json.loads(store.get(what))


@contextmanager
def init_distributed(timeout: float, device_name: str, key: str = "train.device") -> Iterator[ProcessGroup]:
    """Join the ranks that torchrun started, until this ends; an error that leaves one of them ends all.

    Args:
        timeout: See `Watch`.
        device_name, key: See `choose_device`.

    Raises:
        UserError: There is no such device here.
        MachineError: Another rank failed, died or hung, and it is this one's part to tell.
        EndedByAnother: And it is not.
    """
    started = dist_env()
    if not started.by_torchrun:
        choose_device(device_name, key)  # refuses a missing one before any work
        yield ProcessGroup()
        return
    from gpt2.distributed.watch import Watch

    with Watch(dist.PrefixStore("watch", _shared_store()), started.rank, started.world_size, timeout) as watch:
        device = choose_device(device_name, key)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # Or NCCL would end the process by itself when another is gone, before anything is told or saved.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", _shared_store()),
            rank=started.rank,
            world_size=started.world_size,
            timeout=LAST_RESORT,
        )
        yield ProcessGroup(started, watch)
        dist.destroy_process_group()


@cache
def _shared_store() -> dist.Store:
    """What these processes share, and no others: torchrun has the store outlive those that it starts again.

    It counts its attempts, but not alike on each machine. So rank 0 invents a name for this one, and tells it to
    whoever says hello with a word that it has not heard before.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=LAST_RESORT))
    store = dist.PrefixStore("gpt2", store)
    own, size = secrets.token_hex(8), dist_env().world_size
    if not dist_env().is_main:
        store.set(f"hello/{dist_env().rank}", own)
        store.wait([f"session/{own}"])
        own = store.get(f"session/{own}").decode()
        store.add(f"{own}/joined", 1)
        return dist.PrefixStore(own, store)
    answered: set[str] = set()
    for _ in _patiently():
        if store.add(f"{own}/joined", 0) >= size - 1:
            break
        for rank in range(1, size):
            word = store.get(f"hello/{rank}").decode() if store.check([f"hello/{rank}"]) else None
            if word is not None and word not in answered:
                store.set(f"session/{word}", own)
                answered.add(word)
    return dist.PrefixStore(own, store)


def _patiently() -> Iterator[None]:
    """Look again, and again, until the last resort."""
    until = time.monotonic() + LAST_RESORT.total_seconds()
    while time.monotonic() < until:
        yield
        time.sleep(0.02)
    raise ResourceError(f"not all {dist_env().world_size} ranks have come within {LAST_RESORT}")
