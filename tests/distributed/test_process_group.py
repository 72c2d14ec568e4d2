"""The process group without other processes: shares of a step, waiting for data, validation."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import gcd

import pytest
import torch
import torch.distributed as dist

from gpt2.config import DistributedConfig, TrainingConfig
from gpt2.distributed import process_group
from gpt2.distributed.process_group import ProcessGroup
from gpt2.ops.cross_entropy import IGNORE_INDEX
from gpt2.runtime.dist_env import DistEnv, division
from gpt2.validation import validate_distributed


@pytest.mark.parametrize("group", range(1, 7))
def test_shards_contain_each_row_once_and_equally_many_passes(group):
    for accumulation, batches in product(range(1, 7), range(1, 7)):
        parts = division(accumulation, group)[1]
        assert parts * gcd(accumulation, group) == group
        for last in range(1, 2 * parts + 1):
            sizes = [*[2 * parts] * (min(batches, accumulation) - 1), last]
            rows = torch.arange(sum(sizes)).split(sizes)
            step = [{"input_ids": r[:, None], "targets": r[:, None]} for r in rows]
            shards = [ProcessGroup(DistEnv(rank, group)).shard(step, accumulation) for rank in range(group)]
            assert len({len(shard) for shard in shards}) == 1
            computed = torch.cat([batch["targets"] for shard in shards for batch in shard]).flatten()
            assert sorted(computed[computed != IGNORE_INDEX].tolist()) == list(range(sum(sizes)))
            assert all(len(batch["input_ids"]) for shard in shards for batch in shard)


def test_local_main_runs_first_on_each_machine(monkeypatch):
    """Two machines with two ranks; the second machine takes longer."""
    store, events = dist.HashStore(), []
    monkeypatch.setattr(process_group, "_store", lambda: store)

    def run(rank: int) -> None:
        env = DistEnv(rank, 4, local_rank=rank % 2, local_world_size=2, by_torchrun=True)
        with ProcessGroup(env).local_main_first("data"):
            time.sleep(0.3 if rank == 2 else 0)
            events.append(f"rank {rank} prepared")
        events.append(f"rank {rank} left")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4)))
    assert events[:2] == ["rank 0 prepared", "rank 2 prepared"]
    assert sorted(events[2:]) == [
        *("rank 0 left", "rank 1 left", "rank 1 prepared", "rank 2 left", "rank 3 left", "rank 3 prepared")
    ]


def test_single_process_does_not_wait():
    group = ProcessGroup()
    with group.local_main_first("data"):
        pass
    assert group.all_gather([1, 2]) == [[1, 2]]
    assert group.broadcast_object("a") == "a"
    assert group.gather_object("a") == ["a"]


def test_impossible_divisions_are_rejected_with_alternatives():
    def validate(env: DistEnv, strategy: str = "ddp", **train) -> list[str]:
        return validate_distributed(DistributedConfig(strategy), TrainingConfig(**train), env)

    four = DistEnv(0, 4, 0, 4, by_torchrun=True)
    assert validate(four) == validate(four, batch_size=2, accumulation_steps=2) == []
    assert validate(DistEnv(), batch_size=3) == []
    (problem,) = validate(four, batch_size=6)
    assert "6 * train.accumulation_steps=1 blocks cannot be divided over 4 ranks; 4 or 8 * 1 can" in problem
    (problem,) = validate(four, batch_size=1, accumulation_steps=6)
    assert problem.endswith("over 4 ranks; 2 * 6 can")
    assert validate(DistEnv(), "fsdp", optimizer="muon") == []  # in a single process FSDP does nothing
    assert len(validate(four, "fsdp", precision="fp16", optimizer="muon")) == 2
    assert [problem.split(":")[0] for problem in validate(four, device="cuda:1")] == ["train.device"]
    (problem,) = validate_distributed(DistributedConfig(timeout=1), TrainingConfig(), DistEnv())
    assert problem.startswith("distributed.timeout: 1")
