"""Who is compared in training, on what: the same weights, the same tokens, one whole step at a time."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, log2, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2.benchmarks.peers import Pairs, Parameters, Peer, State, peer_of_file, told, transformers_step
from gpt2.checkpoint.hugging_face import hf_layout
from gpt2.config import TrainingBenchmark, TrainingConfig
from gpt2.data.corpus import token_dtype
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.evaluate import Batch
from gpt2.model import GPT2Model
from gpt2.runtime.device import Precision, choose_device, choose_precision, precision_asked
from gpt2.train import Trainer

log = logging.getLogger(__name__)

LONG = 10**9  # epochs


class Workload:
    """Weights and batches, the same for all: random, from a fixed seed.

    The tokens lie in a file as `gpt2.data.corpus` writes it, so that the training loader can read them too.
    """

    def __init__(self, config: TrainingBenchmark, folder: Path, steps: int):
        """
        Args:
            folder: For the file of tokens and, if a trainer saves any, for checkpoints.
            steps: As many as any trainer is to make.
        """
        self.config, self.folder, self.steps = config, folder, steps
        self.device = choose_device(config.train.device, "train.device")
        self.context = config.context or config.model.context_length
        torch.manual_seed(0)
        model = GPT2Model(config.model)
        self.weights, self.flops_per_token = model.num_parameters(), model.flops_per_token(self.context)
        self.state: State = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.tokens_per_step = config.train.batch_size * config.train.accumulation_steps * self.context

        vocabulary = config.model.vocab_size
        dtype = token_dtype(vocabulary)
        tokens = np.random.default_rng(0).integers(vocabulary, size=steps * self.tokens_per_step + 1, dtype=dtype)
        tokens.tofile(folder / "tokens.bin")
        self.blocks = TokenDataset(folder / "tokens.bin", dtype.name, self.context)
        timed = config.warmup + config.repetitions * config.steps
        self.batches = [self._batches(step) for step in range(min(steps, timed))]

    def _batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step, as the loader gives them."""
        train = self.config.train
        first = step * train.accumulation_steps * train.batch_size
        starts = range(first, first + train.accumulation_steps * train.batch_size, train.batch_size)
        batches = [self.blocks.__getitems__(list(range(start, start + train.batch_size))) for start in starts]
        if self.device.type == "cuda" and train.pin_memory:
            return [{key: tensor.pin_memory() for key, tensor in batch.items()} for batch in batches]
        return batches

    def on_device(self) -> list[Pairs]:
        """For peers, who have to move nothing: an advantage that is theirs."""
        return [[(b["input_ids"].to(self.device), b["targets"].to(self.device)) for b in bs] for bs in self.batches]

    def loaders(self, train: TrainingConfig) -> tuple[DataLoader, DataLoader]:
        train_loader, val_loader, _ = get_dataloaders(self.blocks, self.blocks, self.blocks, train)
        return train_loader, val_loader

    def trainer(self, train: TrainingConfig) -> Trainer:
        """One at the beginning of a long run: what is set up only where it pays is to be measured as well."""
        train = replace(train, max_epochs=LONG, max_steps=None)
        model = GPT2Model(self.config.model)
        model.load_state_dict(self.state)
        trainer = Trainer(model, *self.loaders(train), train, str(self.folder / "checkpoints"))
        trainer.model.train()
        return trainer

    def wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def reference(self) -> tuple[float, State]:
        """Loss and gradient of the first step in plain fp32, without a trainer. The gradient is on the device."""
        model = GPT2Model(self.config.model).to(self.device)
        model.load_state_dict(self.state)
        model.train()
        total, micro_batches = 0.0, self.batches[0]
        for batch in micro_batches:
            _, loss = model(**{key: tensor.to(self.device) for key, tensor in batch.items()})
            share = loss / len(micro_batches)
            share.backward()
            total += share.item()
        return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@dataclass
class FirstStep:
    """What the first step came to, by which one sees that it is the same one."""

    seconds: float
    loss: float
    gradient_error: float | None  # relative, over all weights; None where they are not known by name


@dataclass
class Contestant:
    """One way to train. `build` makes everything it needs, then `step` takes the number of a batch."""

    name: str
    precision: Precision
    build: "Callable[[Contestant], tuple[Callable[[int], Tensor], Parameters]]"
    layout: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient  # a gradient of theirs as ours
    is_ours: bool = False
    build_seconds: float = nan
    parameters: Parameters = field(default_factory=dict)
    trainer: Trainer | None = None  # of ours, whose loader is measured too
    _step: Callable[[int], Tensor] | None = None
    _matmul: str = "highest"

    def prepare(self) -> None:
        began = time.perf_counter()
        with self.own_settings():
            self._step, self.parameters = self.build(self)
        self.build_seconds = time.perf_counter() - began

    @contextmanager
    def own_settings(self) -> Iterator[None]:
        """How fp32 products are rounded (TF32) is a setting of the process: each has its own, as it left it."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._matmul)
        try:
            yield
        finally:
            self._matmul = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(before)

    def leave(self) -> None:
        """Let go of all that was built."""
        self._step, self.parameters, self.trainer = None, {}, None

    def step(self, number: int) -> Tensor:
        assert self._step is not None
        return self._step(number)

    def first_step(self, workload: Workload, reference: tuple[float, State]) -> FirstStep:
        """Make the first step, and compare it with `Workload.reference`."""
        gradients: State = {}

        def keep(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.detach().clone()  # the last of a step is the sum over its micro-batches

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(keep, name))
            for name, parameter in self.parameters.items()
        ]
        began = time.perf_counter()
        with self.own_settings():
            loss = self.step(0).item()
        workload.wait_for_device()
        seconds = time.perf_counter() - began
        for hook in hooks:
            hook.remove()
        as_ours = {name: self.layout(name, gradient) for name, gradient in gradients.items()}
        error = gradient_error(as_ours, reference[1], is_scaled=self.precision.name == "fp16")
        return FirstStep(seconds, loss, error)

    def turn(self, workload: Workload, first: int, steps: int) -> float:
        """Seconds a step, over some steps."""
        began = time.perf_counter()
        with self.own_settings():
            for number in range(first, first + steps):
                loss = self.step(number)
        float(loss)
        workload.wait_for_device()
        return (time.perf_counter() - began) / steps


def gradient_error(gradients: State, reference: State, is_scaled: bool) -> float | None:
    """The norm of the difference over the norm of the reference; None unless all are there, in the same shape.

    Args:
        is_scaled: There is a loss scale in it, which is a power of two and is taken out.
    """
    if any(name not in gradients or gradients[name].shape != tensor.shape for name, tensor in reference.items()):
        return None

    def squares(tensors: State) -> float:
        return sum(tensor.double().square().sum().item() for tensor in tensors.values())

    wanted, got = squares(reference), squares({name: gradients[name] for name in reference})
    if not (wanted > 0 and got > 0 and isfinite(got)):
        return None
    scale = 2.0 ** round(log2(got / wanted) / 2) if is_scaled else 1.0
    difference = squares({name: gradients[name] / scale - tensor for name, tensor in reference.items()})
    return (difference / wanted) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Those that there are


def precisions(config: TrainingBenchmark, device: torch.device) -> list[Precision]:
    """Each that is asked for, once."""
    usual = precision_asked(config.train)
    names = [usual if name == "auto" else name for name in config.precisions]
    return list({found.name: found for found in (choose_precision(name, device) for name in names)}.values())


def in_precision(train: TrainingConfig, name: str, **fields: Any) -> TrainingConfig:
    """Told by name: mixed_precision=false, which forbids it, has had its say in `precisions`."""
    return replace(train, **{**fields, "precision": name, "mixed_precision": True})


def contestants(workload: Workload) -> list[Contestant]:
    """For each precision: `transformers`, with which the others are compared, another peer, and ours, not built yet."""
    config = workload.config
    found: list[Contestant] = []
    peer = peer_of_file(config.peer) if config.peer is not None else None
    pairs = workload.on_device()
    for precision in precisions(config, workload.device):
        train = in_precision(config.train, precision.name, device=str(workload.device))

        build = partial(build_peer, workload, pairs, train)
        name = f", {precision.name}"
        plain = partial(build, transformers_step, None)
        found.append(Contestant(f"transformers{name}", precision, plain, hf_layout))
        if workload.device.type == "cuda" or train.compile is True:
            compiled = partial(build, partial(transformers_step, compiled=True), None)
            found.append(Contestant(f"transformers, compiled{name}", precision, compiled, hf_layout))
        if peer is not None:
            stem = Path(str(config.peer).rpartition(":")[0]).stem
            found.append(Contestant(f"{stem}{name}", precision, partial(build, peer, config.peer)))
        found.append(Contestant(f"gpt2{name}", precision, partial(build_ours, workload, train), is_ours=True))
    return found


def build_ours(
    workload: Workload, train: TrainingConfig, contestant: Contestant
) -> tuple[Callable[[int], Tensor], Parameters]:
    """The step of `Trainer`, on batches as its loader gives them: moving them is part of it."""
    trainer = contestant.trainer = workload.trainer(train)

    def step(number: int) -> Tensor:
        done = trainer.train_step(workload.batches[number % len(workload.batches)])
        assert done is not None  # nobody interrupts it
        return done[0]

    return step, dict(trainer.model.named_parameters())


def build_peer(
    workload: Workload, pairs: list[Pairs], train: TrainingConfig, make: Peer, told_as: str | None, _of: Contestant
) -> tuple[Callable[[int], Tensor], Parameters]:
    """Somebody else's step. What it raises is told in a line where it comes from a file, `told_as`."""
    state = {name: tensor.clone() for name, tensor in workload.state.items()}
    if told_as is None:
        made = make(workload.config.model, state, train)
    else:
        with told(told_as):
            made = make(workload.config.model, state, train)
    take_step, parameters = made if isinstance(made, tuple) else (made, {})

    def step(number: int) -> Tensor:
        if told_as is None:
            return take_step(pairs[number % len(pairs)])
        with told(told_as):
            return torch.as_tensor(take_step(pairs[number % len(pairs)]))

    return step, parameters
