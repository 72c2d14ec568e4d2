"""The cost of training: its division over ranks, memory by formula, and time extrapolated from a part."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2.config import OPTIMIZERS, GPT2Config, TrainingConfig
from gpt2.model import GPT2Model, meta_model
from gpt2.ops import attention, cross_entropy
from gpt2.runtime.device import Precision
from gpt2.training import cost
from gpt2.training.compile import ComputePlan
from gpt2.training.cost import Work, largest_batch_size, memory_needed, optimizer_bytes, time_step
from gpt2.training.optimizer import build_optimizer, optimizer_tensors
from tests.helpers import NO_DROPOUT, PeakMemory, tiny_config, without_numbers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
XL = GPT2Config(d_model=1600, num_heads=25, num_layers=48, d_ff=6400)


def planned(precision: str = "bf16") -> ComputePlan:
    return ComputePlan(CPU, Precision(precision, CPU), "PyTorch", compiled=False)


def work(config: GPT2Config, batch_size: int = 8, steps: int = 1, **fields) -> Work:
    train = TrainingConfig(batch_size=batch_size, accumulation_steps=steps, **fields.pop("train", {}))
    return Work(meta_model(config), train, config.context_length, **fields)


@pytest.mark.parametrize(("ranks", "rows", "passes"), [(1, 12, 40), (8, 12, 5), (3, 4, 40), (16, 6, 5)])
def test_ranks_divide_passes_first(ranks, rows, passes):
    divided = work(tiny_config(), 12, 40, ranks=ranks)
    assert (divided.rows, divided.passes) == (rows, passes)
    assert divided.tokens_per_step == 12 * 40 * 16


def gigabytes(*arguments, plan: ComputePlan | None = None, **fields) -> list[float]:
    return [round(size / 1e9, 1) for size in memory_needed(work(*arguments, **fields), plan or planned()).values()]


def test_memory_is_that_of_the_table_in_docs_scale():
    assert gigabytes(GPT2Config())[:2] == [2.0 + 0.2, 2.9]  # with the copy in bf16
    assert gigabytes(XL)[:2] == [28.0, 24.5]
    assert gigabytes(XL, train={"gradient_checkpointing": True})[1] == 2.5
    assert gigabytes(XL, plan=planned("fp32"))[0] == 24.9
    assert gigabytes(XL, 8, 8, ranks=8, is_sharded=True)[0] == 3.3  # a shard of 3.1 and gathered weights
    assert gigabytes(XL, 8, 16, ranks=8, is_sharded=True)[0] == 3.3 + 6.2  # unsharded gradients
    assert gigabytes(XL, train={"optimizer": "muon"})[0] == 28.0 - 5.9  # one average less for 1.47 billion weights
    assert gigabytes(XL, train={"optimizer": "adafactor"})[0] == 28.0 - 12.4  # no averages
    assert gigabytes(XL, train={"optimizer": "schedule_free"})[0] == 28.0 + 6.3  # a copy of the weights
    assert gigabytes(replace(XL, **NO_DROPOUT))[1] == 23.3
    assert gigabytes(XL)[2] == 1.0
    assert gigabytes(replace(XL, vocab_size=257))[2] == 0.2  # all logits are smaller than a chunk


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bytes_of_an_optimizer_are_those_of_its_tensors(name):
    train = TrainingConfig(optimizer=name)
    model = GPT2Model(tiny_config())
    optimizer = build_optimizer(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model).values()
    assert optimizer_bytes(model, train) == sum(tensor.nbytes for tensor in tensors if tensor.dim())


@pytest.mark.parametrize(
    ("precision", "recomputes", "rows"), [("bf16", False, 8), ("bf16", True, 8), ("fp32", False, 8), ("fp32", True, 16)]
)
def test_memory_is_that_of_the_tensors_of_a_step(precision, recomputes, rows, monkeypatch):
    """Two passes with tensors that have shapes but no numbers, as on CUDA. In the second one there are gradients."""
    monkeypatch.setattr(attention, "_explicit_is_faster", lambda q: False)
    monkeypatch.setattr(cross_entropy, "_is_one", lambda number: False)
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", cross_entropy.CHUNK_BYTES["cuda"])
    monkeypatch.setattr(cross_entropy, "SOFTMAX_BYTES", 1 << 60)
    config = GPT2Config(num_layers=2, **NO_DROPOUT)  # dropout masks are larger on a CPU
    with FakeTensorMode():
        model = without_numbers(meta_model(config), "cpu").train()
        model.gradient_checkpointing = recomputes
        ids = torch.empty(rows, 1024, dtype=torch.long)
        averages = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
        with PeakMemory([*model.parameters(), *averages]) as memory:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    _, loss = model(ids, targets=ids, return_logits=False)
                loss.backward()
    plan = ComputePlan(CUDA, Precision(precision, CUDA), "PyTorch", compiled=False)
    needed = memory_needed(work(config, rows, 2, train={"gradient_checkpointing": recomputes}), plan)
    assert sum(needed.values()) == pytest.approx(memory.peak, rel=0.05), needed


EVERY_PART = [(1, 1, 4), (2, 1, 4), (4, 1, 4), (5, 1, 4), (5, 1, 8), (5, 1, 16), (5, 2, 16), (5, 4, 16), (5, 6, 16)]


@pytest.mark.parametrize(
    ("overhead", "long", "timed"),
    [
        (0.0, 0.0, EVERY_PART[:1]),
        (0.0, 0.0142, [EVERY_PART[0], (5, 1, 8)]),  # the first part that takes long enough
        (0.0, 1e9, [EVERY_PART[0], EVERY_PART[-1]]),
        (0.001, 0.016, [EVERY_PART[0], (5, 1, 4), (5, 2, 16)]),  # a part is shorter than the first suggests
    ],
)
def test_time_is_extrapolated_by_flops_and_weights(monkeypatch, overhead, long, timed):
    """On a simulated machine: passes take 1 s per GFLOP (more for one layer), updates 1 s per million weights."""
    seen = []

    def time_part(part: Work, _plan: ComputePlan, min_seconds: float) -> tuple[float, float]:
        seen.append((part.model.config.num_layers, part.rows, part.length))
        more = overhead if part.model.config.num_layers == 1 else 0
        return part.flops_per_step / 1e9 + more, part.model.num_parameters() / 1e6

    monkeypatch.setattr(cost, "_time_part", time_part)
    monkeypatch.setattr(cost, "MIN_TOKENS", 4)
    monkeypatch.setattr(cost, "ENOUGH_SECONDS", long)
    whole = work(tiny_config(num_layers=5), 6, 8, ranks=2)
    timing = time_step(whole, planned())
    if seen[-1][0] > 1 or not overhead:
        assert timing.step == pytest.approx(whole.flops_per_step / 2 / 1e9 + whole.model.num_parameters() / 1e6)
    assert seen == timed
    assert (timing.layers, timing.rows, timing.tokens) == seen[-1]


def test_parts_that_do_not_fit_into_memory_are_not_timed(monkeypatch):
    monkeypatch.setattr(cost, "memory_of", lambda device: 1000)
    assert time_step(work(tiny_config()), planned()) is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_passes_and_updates_really_run(optimizer):
    config = work(tiny_config(), 2, train={"optimizer": optimizer, "gradient_checkpointing": True})
    timing = time_step(config, planned("fp32"))
    assert (timing.layers, timing.rows, timing.tokens) == (2, 2, 16)
    assert timing.step > 0


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 13])
def test_largest_batch_size_is_the_last_that_fits(rows):
    model, train = meta_model(tiny_config()), TrainingConfig()
    enough, too_little = (
        sum(memory_needed(work(tiny_config(), n), planned()).values()) for n in (max(rows, 1), rows + 1)
    )
    available = enough if rows else enough - 1
    assert largest_batch_size(model, train, 16, planned(), available) == rows
    assert largest_batch_size(model, train, 16, planned(), too_little - 1) == rows
