"""The contestants of the training benchmark, and their workload: the same weights and tokens, one step at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.benchmarks.peers import Pairs, Peer, State, load_peers, transformers_step
from gpt2.config import TrainingBenchmark, TrainingConfig
from gpt2.data.token_writer import token_dtype
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.evaluate import Batch
from gpt2.model import GPT2Model
from gpt2.runtime.device import Precision, choose_device, choose_precision, requested_precision
from gpt2.train import Trainer

NumberedStep = Callable[[int], Tensor]  # makes the step with the batch of that number, and returns its loss


class Workload:
    """Weights and batches that all contestants share: random, from a fixed seed.

    The tokens are in a file as `gpt2.data.corpus` writes it, so that the training loader can read them too.
    """

    def __init__(self, config: TrainingBenchmark, folder: Path, steps: int):
        """
        Args:
            folder: For the file of tokens, and for the checkpoints of trainers.
            steps: How many steps there are tokens for.
        """
        self.config, self.folder = config, folder
        self.device = choose_device(config.train.device, "train.device")
        self.context = config.model.context_length
        torch.manual_seed(0)
        model = GPT2Model(config.model)
        self.weights, self.flops_per_token = model.num_parameters(), model.flops_per_token(self.context)
        self.state: State = model.state_dict()
        self.tokens_per_step = config.train.batch_size * config.train.accumulation_steps * self.context

        vocabulary = config.model.vocab_size
        dtype = token_dtype(vocabulary)
        tokens = np.random.default_rng(0).integers(vocabulary, size=steps * self.tokens_per_step + 1, dtype=dtype)
        tokens.tofile(folder / "tokens.bin")
        self.blocks = TokenDataset(folder / "tokens.bin", dtype.name, self.context)
        self.batches = [self._batches(step) for step in range(steps)]

    def _batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, as the loader yields them."""
        train = self.config.train
        first = step * train.accumulation_steps * train.batch_size
        starts = range(first, first + train.accumulation_steps * train.batch_size, train.batch_size)
        batches = [self.blocks.__getitems__(list(range(start, start + train.batch_size))) for start in starts]
        if self.device.type == "cuda" and train.pin_memory:
            return [{key: tensor.pin_memory() for key, tensor in batch.items()} for batch in batches]
        return batches

    def on_device(self) -> list[Pairs]:
        """The batches of peers, on the device already: an advantage over ours, which moves them in each step."""
        return [[(b["input_ids"].to(self.device), b["targets"].to(self.device)) for b in bs] for bs in self.batches]

    def trainer(self, train: TrainingConfig, **options: Any) -> Trainer:
        """A trainer that expects a long run, for which `train.compile=auto` compiles where that is worthwhile.

        The learning rate is constant, as that of peers.
        """
        train = replace(train, max_epochs=10**9, max_steps=None, warmup_steps=0)
        model = GPT2Model(self.config.model)
        model.load_state_dict(self.state)
        train_loader, val_loader, _ = get_dataloaders(self.blocks, self.blocks, self.blocks, train)
        trainer = Trainer(model, train_loader, val_loader, train, str(self.folder / "checkpoints"), **options)
        trainer.model.train()
        return trainer


@dataclass
class Contestant:
    """One way to train."""

    name: str
    precision: Precision
    build: Callable[[], NumberedStep]
    step: NumberedStep = field(init=False)
    next_batch: int = 0  # number of the batch for the next step
    loss: float = field(init=False)  # of the latest step

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("gpt2,")

    def prepare(self) -> None:
        """Build the step."""
        self.step = self.build()

    def turn(self, steps: int = 1) -> float:
        """Make steps with the next batches. Returns the seconds that one takes."""
        began = time.perf_counter()
        for _ in range(steps):
            loss = self.step(self.next_batch)
            self.next_batch += 1
        self.loss = float(loss)  # waits for the device
        return (time.perf_counter() - began) / steps


def precisions(config: TrainingBenchmark, device: torch.device) -> list[Precision]:
    """The configured precisions without repetitions."""
    default = requested_precision(config.train)
    names = [default if name == "auto" else name for name in config.precisions]
    return list({p.name: p for p in (choose_precision(name, device) for name in names)}.values())


def contestants(workload: Workload) -> list[Contestant]:
    """For each precision: `transformers`, the peers if there are any, and ours. None is built yet.

    With `train.compile=true` there are `transformers` and ours both compiled and uncompiled.
    """
    config, device = workload.config, workload.device
    pairs = workload.on_device()
    result: list[Contestant] = []
    for precision in precisions(config, device):
        chosen: dict[str, Any] = {"device": str(device), "precision": precision.name, "mixed_precision": True}
        train = replace(config.train, **chosen)
        peers: dict[str, Peer] = {"transformers": transformers_step}
        if device.type == "cuda" or train.compile is True:
            peers["transformers, compiled"] = partial(transformers_step, compiled=True)
        if config.peer is not None:
            peers |= load_peers(config.peer)
        builders = {name: partial(build_peer, workload, pairs, train, peer) for name, peer in peers.items()}
        ours = {"gpt2": train}
        if train.compile is True:
            ours = {"gpt2": replace(train, compile=False), "gpt2, compiled": train}
        builders |= {name: partial(build_ours, workload, configured) for name, configured in ours.items()}
        result += [Contestant(f"{name}, {precision.name}", precision, build) for name, build in builders.items()]
    return result


def build_ours(workload: Workload, train: TrainingConfig) -> NumberedStep:
    """The step of `Trainer`, on batches as its loader yields them: moving them to the device is part of it."""
    trainer = workload.trainer(train)

    def step(number: int) -> Tensor:
        result = trainer.train_step(workload.batches[number])
        assert result is not None  # only an interruption returns None
        return result[0]

    return step


def build_peer(workload: Workload, pairs: list[Pairs], train: TrainingConfig, peer: Peer) -> NumberedStep:
    """The step of another program."""
    state = {name: tensor.clone() for name, tensor in workload.state.items()}
    step = peer(workload.config.model, state, train)
    return lambda number: step(pairs[number])
