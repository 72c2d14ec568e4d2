"""Evaluation of a model on a split; the result does not depend on the batch size."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import exp, inf, log, nan
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2.config import TrainingConfig
from gpt2.data_loader import TokenDataset
from gpt2.distributed.process_group import Batch, ProcessGroup
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.ops.cross_entropy import IGNORE_INDEX, shifted
from gpt2.runtime.console import track
from gpt2.runtime.device import auto_without_training, cuda_or_fallback
from gpt2.runtime.plain_values import brief
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.training.compile import agreed_precision

UNITS = {"loss": "nats a token", "bytes": "of text", "tokens": "predicted"}


def as_inputs(batch: Any) -> Batch:
    """Convert a batch of any loader to keyword arguments of `GPT2Model.forward`: `input_ids`, `targets`, ...

    A batch is a mapping with `targets` (as `gpt2.data_loader` yields) or with `labels`, a pair (input_ids, labels), or
    input_ids (b, t) alone, which are then the labels too. The model shifts labels: label t is token t of the input.

    Raises:
        ValueError: The batch has other entries, or its labels are shifted already.
    """
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch, "labels": batch}
    elif isinstance(batch, list | tuple):
        input_ids, labels = batch
        batch = {"input_ids": input_ids, "labels": labels}
    inputs = dict(batch)
    if "input_ids" not in inputs or not {"targets", "labels"} & inputs.keys():
        raise ValueError(f"a batch needs input_ids and either targets or labels; this one has {', '.join(inputs)}")
    if "labels" in inputs:
        refuse_shifted(inputs["input_ids"], inputs["labels"])
        inputs["targets"] = shifted(inputs.pop("labels"))
    return inputs


def refuse_shifted(input_ids: Tensor, labels: Tensor) -> None:
    """Raise ValueError if each label is the token after its place, as in nanoGPT's pairs: a model would shift twice."""
    if input_ids.device.type != "cpu" or input_ids.size(1) < 2:  # on a GPU the comparison would wait for the device
        return
    if torch.equal(labels[:, :-1], input_ids[:, 1:]) and not torch.equal(labels, input_ids):
        raise ValueError("the labels of a batch are shifted already: give {'input_ids': x, 'targets': y}, not (x, y)")


def count_targets(batch: Batch) -> int:
    """The number of tokens of a batch that are predicted."""
    return int((batch["targets"] != IGNORE_INDEX).sum())


def validate_data(
    train_loader: DataLoader, val_loader: DataLoader, config: TrainingConfig, model: GPT2Model
) -> list[str]:
    """Problems that prevent training this model on these data."""
    problems = validate_loader("train_loader", train_loader, model)
    if problems := problems + validate_loader("val_loader", val_loader, model):
        return list(dict.fromkeys(problems))
    if not len(train_loader):
        problems.append("data: the training split is empty")
    has_targets = bool(len(val_loader))
    if not isinstance(val_loader.dataset, TokenDataset):  # whose blocks all have targets
        has_targets = any(count_targets(as_inputs(batch)) for batch in islice(val_loader, config.eval_batches))
    if not has_targets:
        problems.append("data: the validation split has no token to predict")
    if config.eval_tasks and getattr(train_loader.dataset, "tokenizer", None) is None:
        problems.append("train.eval_tasks: the data have no tokenizer for the documents of tasks")
    return problems


def validate_loader(name: str, loader: DataLoader, model: GPT2Model) -> list[str]:
    """Problems that prevent this model from reading a loader's batches, as far as its dataset describes them."""
    if not isinstance(loader, DataLoader):
        return [f"{name}: {brief(loader)} is not a DataLoader"]
    if not hasattr(loader.dataset, "__len__"):
        return [f"{name}: its dataset has no length, which an epoch needs"]
    config, problems = model.config, []
    tokenizer: GPT2Tokenizer | None = getattr(loader.dataset, "tokenizer", None)
    if tokenizer and tokenizer.ids_in_use > config.vocab_size:
        tokens = tokenizer.ids_in_use
        problems.append(f"model.vocab_size: {config.vocab_size} is less than the {tokens} tokens of the data")
    length, context = getattr(loader.dataset, "length", 0), config.context_length
    if length > context:
        problems.append(f"data.max_length: blocks of {length} tokens do not fit into the context, {context}")
    return problems


def perplexity(loss: float) -> float:
    """e to the power of the loss; infinity if that is too large for a float."""
    return exp(loss) if loss < 700 else inf


@dataclass
class Score:
    """Accumulated cross-entropy, and the predicted tokens and bytes of text."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0  # 0 without a tokenizer

    @property
    def loss(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else nan

    @property
    def bits_per_byte(self) -> float:
        """Loss per byte of text in bits, ends of documents included; comparable between tokenizers."""
        return self.nats / log(2) / self.bytes if self.bytes else nan


@torch.no_grad()
def score(
    model: GPT2Model,
    loader: DataLoader,
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    max_batches: int | None = None,
    on_batch: Callable[[int, int], bool | None] = lambda batch, batches: None,
    tokenizer: GPT2Tokenizer | None = None,
    group: ProcessGroup | None = None,
) -> Score:
    """Sum the cross-entropy over a loader without dropout; every token has the same weight.

    The sums are fp64, so that the result does not depend on the batch size.

    Args:
        on_batch: Called before each batch with its index and the number of batches; if it returns False on any rank,
            the score is empty.
        tokenizer: Counts the bytes of text that are predicted.
        group: Rank r of n scores batches r, r + n, ... All ranks return the score of all batches, bitwise equal to that
            of a single process.
    """
    group = group or ProcessGroup()
    token_bytes = bytes_of_tokens(tokenizer, model.config.vocab_size) if tokenizer else None
    was_training = model.training
    model.eval()
    batches = min(len(loader), max_batches or len(loader))
    sums = torch.zeros(3, batches, dtype=torch.float64)  # nats, tokens, bytes
    # On CUDA the sums of losses stay on the device until the end, because the host waits for a copy. MPS has no fp64.
    nats = torch.zeros(batches, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    is_interrupted = False
    try:
        for number, batch in enumerate(map(as_inputs, islice(loader, batches))):
            if number % group.size != group.rank:
                continue
            if is_interrupted := on_batch(number, batches) is False:
                break
            moved = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            with autocast or nullcontext():
                losses = model.token_losses(**moved)
            nats[number] = losses.to(nats.device).double().sum()
            sums[1, number] = count_targets(batch)
            if token_bytes is not None:
                sums[2, number] = token_bytes[batch["targets"][batch["targets"] != IGNORE_INDEX]].sum()
    finally:
        model.train(was_training)
    if any(flag for (flag,) in group.all_gather([is_interrupted])):
        return Score()
    sums[0] = nats
    all_nats, tokens, texts = map(sum, group.all_reduce_(sums).tolist())
    return Score(all_nats, int(tokens), int(texts))


def bytes_of_tokens(tokenizer: GPT2Tokenizer, vocab_size: int) -> Tensor:
    """The number of bytes of text of each token of a model's vocabulary, (v,); 0 for `<|endoftext|>`."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    known = torch.tensor([len(text) for text in tokenizer.token_bytes[:vocab_size]])
    lengths[: len(known)] = known  # an output layer may be padded, and a tokenizer may have added tokens
    lengths[tokenizer.eos_token_id] = 0
    return lengths


class Evaluator:
    """Loss and perplexity of a model on a test set."""

    def __init__(
        self,
        model: GPT2Model,
        test_loader: DataLoader,
        device: str = "cuda",
        precision: str = "auto",
        group: ProcessGroup | None = None,
    ):
        """
        Args:
            test_loader: Batches as `as_inputs` takes them.
            device: See `gpt2.runtime.device.cuda_or_fallback`.
            precision: fp32, bf16, fp16 or auto, see `gpt2.runtime.device.auto_without_training`.
            group: The ranks that share the work, see `gpt2.distributed.process_group.init_distributed`.

        Raises:
            UserError: The device or the precision is not available, or the blocks do not fit the model.
        """
        if problems := validate_loader("test_loader", test_loader, model):
            raise UserError(*problems)
        self.group = group or ProcessGroup()
        self.device = cuda_or_fallback(device)
        self.precision = agreed_precision(auto_without_training(precision, self.device), self.device, self.group)
        self.model = model.to(self.device)
        self.test_loader = test_loader

    def evaluate(self) -> dict[str, float]:
        """Score the whole test set.

        Returns:
            `loss` in nats per token, `perplexity`, `tokens` predicted and `tokens_per_second`; if the test set has a
            tokenizer, as those of `gpt2.data_loader` do, also `bits_per_byte` and `bytes`.
        """
        tokenizer = getattr(self.test_loader.dataset, "tokenizer", None)
        started = time.perf_counter()
        with track("Evaluating", unit="batches") as advance:
            total = score(
                self.model,
                self.test_loader,
                self.device,
                self.precision.autocast(),
                on_batch=lambda batch, batches: advance(batch + 1, batches),
                tokenizer=tokenizer,
                group=self.group,
            )
        metrics = {"loss": total.loss, "perplexity": perplexity(total.loss)}
        if tokenizer:
            metrics |= {"bits_per_byte": total.bits_per_byte, "bytes": total.bytes}
        return {**metrics, "tokens": total.tokens, "tokens_per_second": total.tokens / (time.perf_counter() - started)}

    def print_metrics(self, metrics: dict[str, float]) -> None:
        """Print a table with one line per metric."""
        for name, value in metrics.items():
            digits = {"loss": 4, "bits_per_byte": 4, "perplexity": 2}.get(name, 0)
            print(f"{name.replace('_', ' '):<18}{value:>16,.{digits}f}  {UNITS.get(name, '')}".rstrip())
