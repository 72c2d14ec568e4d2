"""The loss of a model over a split."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from math import exp, inf
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2.device import cuda_or_else
from gpt2.model import IGNORE, GPT2Model

Batch = dict[str, Tensor]


def as_inputs(batch: Any) -> Batch:
    """A batch of any loader as keyword arguments of `GPT2Model.forward`.

    Taken: such a mapping, as `gpt2.data_loader` yields; a pair (input_ids, labels); or input_ids (b, t) alone, its
    own labels.
    """
    if isinstance(batch, Tensor):
        return {"input_ids": batch, "labels": batch}
    if isinstance(batch, list | tuple):
        input_ids, labels = batch
        return {"input_ids": input_ids, "labels": labels}
    return dict(batch)


def count_targets(batch: Batch) -> int:
    """How many tokens of a batch are predicted: those the loss is a mean over."""
    targets = batch["targets"] if "targets" in batch else batch["labels"][:, 1:]
    return int((targets != IGNORE).sum())


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is beyond a float."""
    return exp(loss) if loss < 700 else inf


@torch.no_grad()
def mean_loss(
    model: GPT2Model,
    loader: DataLoader,
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    max_batches: int | None = None,
    go_on: Callable[[int, int], bool] = lambda batch, batches: True,
) -> float:
    """Mean cross-entropy in nats a predicted token, without dropout; every token weighs the same, whatever its batch.

    Before each batch, `go_on` hears its number and how many there are, and may end it. NaN if it did, or if
    there was nothing to predict.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        batches = min(len(loader), max_batches or len(loader))
        for number, batch in enumerate(map(as_inputs, islice(loader, batches))):
            if not go_on(number, batches):
                return float("nan")
            predicted = count_targets(batch)
            moved = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            with autocast or nullcontext():
                _, loss = model(**moved)
            total += loss.item() * predicted
            count += predicted
    finally:
        model.train(was_training)
    return total / count if count else float("nan")


class Evaluator:
    """Loss and perplexity of a model on a test set."""

    def __init__(self, model: GPT2Model, test_loader: DataLoader, device: str = "cuda"):
        """`device`: see `gpt2.device.cuda_or_else`."""
        self.device = cuda_or_else(device)
        self.model = model.to(self.device)
        self.test_loader = test_loader

    def evaluate(self) -> dict[str, float]:
        """`loss` in nats a token and `perplexity`, over the whole test set."""
        loss = mean_loss(self.model, self.test_loader, self.device)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def print_metrics(self, metrics: dict[str, float]) -> None:
        """One line a metric."""
        for name, value in metrics.items():
            print(f"{name:<12} {value:.4f}")
