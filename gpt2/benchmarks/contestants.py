"""The contestants of the training benchmark, and the weights and tokens that all of them train on."""

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

NumberedStep = Callable[[int], Tensor]  # trains on the batches of a step, given its number, and returns the loss


class Workload:
    """Random weights and batches from a fixed seed, shared by all contestants.

    The tokens are in a file of the format of `gpt2.data.corpus`, so the training loader can read them.
    """

    def __init__(self, config: TrainingBenchmark, folder: Path, steps: int):
        """
        Args:
            folder: Where the file of tokens and the checkpoints of trainers are written.
            steps: The number of steps for which tokens are generated.
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
        """The batches for peers, already on the device. Our trainer copies its batches to the device in each step."""
        return [[(b["input_ids"].to(self.device), b["targets"].to(self.device)) for b in bs] for bs in self.batches]

    def trainer(self, train: TrainingConfig, **options: Any) -> Trainer:
        """Build a trainer for a long run, so that `train.compile=auto` compiles where that pays off in the end.

        The learning rate is constant, as for peers.
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
    """A program that trains, in one precision."""

    name: str
    precision: Precision
    build: Callable[[], NumberedStep]
    step: NumberedStep = field(init=False)
    next_batch: int = 0  # number of the batch for the next step
    loss: float = field(init=False)  # the loss of the latest step

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("gpt2,")

    def prepare(self) -> None:
        """Build the model and its training step."""
        self.step = self.build()

    def time_steps(self, steps: int = 1) -> float:
        """Train on the next batches. Return the seconds per step."""
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
    """Return `transformers`, the peers, if any, and ours for each precision. `Contestant.prepare` builds them.

    With `train.compile=true`, `transformers` and ours are in the list uncompiled and compiled.
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
    """Build the step of `Trainer`. It takes batches as the loader yields them, and copies them to the device."""
    trainer = workload.trainer(train)

    def step(number: int) -> Tensor:
        result = trainer.train_step(workload.batches[number])
        assert result is not None  # only an interruption returns None
        return result[0]

    return step


def build_peer(workload: Workload, pairs: list[Pairs], train: TrainingConfig, peer: Peer) -> NumberedStep:
    """Build the step of another program."""
    state = {name: tensor.clone() for name, tensor in workload.state.items()}
    step = peer(workload.config.model, state, train)
    return lambda number: step(pairs[number])
