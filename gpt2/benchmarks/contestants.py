"""The contestants of the training benchmark, and their workload: the same weights and tokens, one step at a time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite, log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.benchmarks.common import Row
from gpt2.benchmarks.peers import Pairs, Parameters, Peer, State, load_peer, peer_errors, transformers_step
from gpt2.checkpoint.hugging_face import hf_layout
from gpt2.config import TrainingBenchmark, TrainingConfig
from gpt2.data.corpus import token_dtype
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.evaluate import Batch
from gpt2.model import GPT2Model
from gpt2.runtime.device import Precision, choose_device, choose_precision, requested_precision
from gpt2.train import Trainer

Built = tuple[Callable[[int], Tensor], Parameters]  # makes the step with the batch of that number; weights by our names

LONG = 10**9  # epochs


class Workload:
    """Weights and batches that all contestants share: random, from a fixed seed.

    The tokens are in a file as `gpt2.data.corpus` writes it, so that the training loader can read them too.
    """

    def __init__(self, config: TrainingBenchmark, folder: Path, steps: int):
        """
        Args:
            folder: For the file of tokens, and for the checkpoints of trainers.
            steps: The most steps that a trainer makes.
        """
        self.config, self.folder = config, folder
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
        """A trainer at the start of a long run: it also sets up what pays only in a long run, such as compilation."""
        train = replace(train, max_epochs=LONG, max_steps=None)
        model = GPT2Model(self.config.model)
        model.load_state_dict(self.state)
        train_loader, val_loader, _ = get_dataloaders(self.blocks, self.blocks, self.blocks, train)
        trainer = Trainer(model, train_loader, val_loader, train, str(self.folder / "checkpoints"), **options)
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
class Contestant:
    """One way to train."""

    name: str
    precision: Precision
    build: Callable[[], Built]
    layout: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient  # a gradient in our layout
    is_ours: bool = False
    parameters: Parameters = field(init=False)
    step: Callable[[int], Tensor] = field(init=False)
    _matmul: str = "highest"

    def prepare(self) -> float:
        """Build the step. Returns the seconds that it takes."""
        began = time.perf_counter()
        with self.own_settings():
            self.step, self.parameters = self.build()
        return time.perf_counter() - began

    @contextmanager
    def own_settings(self) -> Iterator[None]:
        """Restore this contestant's rounding of fp32 products (TF32), which is a setting of the whole process."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._matmul)
        try:
            yield
        finally:
            self._matmul = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(before)

    def first_step(self, workload: Workload, reference: tuple[float, State]) -> Row:
        """Make the first step, and compare it with `Workload.reference`: it must be the same for all contestants."""
        gradients: State = {}

        def save(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.detach().clone()  # the last call of a step has the sum of all passes

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(save, name))
            for name, parameter in self.parameters.items()
        ]
        began = time.perf_counter()
        with self.own_settings():
            loss = self.step(0).item()
        workload.wait_for_device()
        seconds = time.perf_counter() - began
        for hook in hooks:
            hook.remove()
        in_our_layout = {name: self.layout(name, gradient) for name, gradient in gradients.items()}
        return {
            "first_step_seconds": seconds,
            "first_loss": loss,
            "loss_difference": loss - reference[0],
            "gradient_error": gradient_error(in_our_layout, reference[1], is_scaled=self.precision.name == "fp16"),
        }

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
    """The norm of the difference over the norm of the reference; None if a weight is missing or of another shape.

    Args:
        is_scaled: Whether the gradients contain an unknown loss scale, a power of two, which is divided out.
    """
    if any(name not in gradients or gradients[name].shape != tensor.shape for name, tensor in reference.items()):
        return None

    def squares(tensors: State) -> float:
        return sum(tensor.double().square().sum().item() for tensor in tensors.values())

    expected, actual = squares(reference), squares({name: gradients[name] for name in reference})
    if not (expected > 0 and actual > 0 and isfinite(actual)):
        return None
    scale = 2.0 ** round(log2(actual / expected) / 2) if is_scaled else 1.0
    difference = squares({name: gradients[name] / scale - tensor for name, tensor in reference.items()})
    return (difference / expected) ** 0.5


def precisions(config: TrainingBenchmark, device: torch.device) -> list[Precision]:
    """The configured precisions without repetitions."""
    default = requested_precision(config.train)
    names = [default if name == "auto" else name for name in config.precisions]
    return list({p.name: p for p in (choose_precision(name, device) for name in names)}.values())


def in_precision(train: TrainingConfig, name: str, **fields: Any) -> TrainingConfig:
    """A training configuration with one precision; `precisions` has applied mixed_precision=false already."""
    return replace(train, **{**fields, "precision": name, "mixed_precision": True})


def contestants(workload: Workload) -> list[Contestant]:
    """For each precision: `transformers`, the peer if there is one, and ours. None is built yet."""
    config = workload.config
    result: list[Contestant] = []
    pairs = workload.on_device()
    for precision in precisions(config, workload.device):
        train = in_precision(config.train, precision.name, device=str(workload.device))

        def add(name: str, build: Callable[[], Built], precision: Precision = precision, **options: Any) -> None:
            result.append(Contestant(f"{name}, {precision.name}", precision, build, **options))

        of_peer = partial(build_peer, workload, pairs, train)
        add("transformers", partial(of_peer, transformers_step), layout=hf_layout)
        if workload.device.type == "cuda" or train.compile is True:
            compiled = partial(transformers_step, compiled=True)
            add("transformers, compiled", partial(of_peer, compiled), layout=hf_layout)
        if config.peer is not None:
            add(Path(config.peer.rpartition(":")[0]).stem, partial(of_peer, load_peer(config.peer), config.peer))
        add("gpt2", partial(build_ours, workload, train), is_ours=True)
    return result


def build_ours(workload: Workload, train: TrainingConfig) -> Built:
    """The step of `Trainer`, on batches as its loader yields them: moving them to the device is part of it."""
    trainer = workload.trainer(train)

    def step(number: int) -> Tensor:
        return trainer.train_step(workload.batches[number % len(workload.batches)])[0]

    return step, dict(trainer.model.named_parameters())


def build_peer(
    workload: Workload, pairs: list[Pairs], train: TrainingConfig, peer: Peer, source: str | None = None
) -> Built:
    """The step of another program; its exceptions become one-line errors if it comes from a file, `source`."""
    errors = partial(peer_errors, source) if source else nullcontext
    state = {name: tensor.clone() for name, tensor in workload.state.items()}
    with errors():
        made = peer(workload.config.model, state, train)
    take_step, parameters = made if isinstance(made, tuple) else (made, {})

    def step(number: int) -> Tensor:
        with errors():
            return torch.as_tensor(take_step(pairs[number % len(pairs)]))

    return step, parameters
