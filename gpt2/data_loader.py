"""Packed tokens to batches.

The token files of `gpt2.data.corpus` are memory-mapped and cut into blocks. The order of blocks is a pure function of
(seed, epoch, position), so a position in the data is one integer and resuming is arithmetic.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from gpt2.config import DataConfig, TrainingConfig
from gpt2.data.corpus import prepare
from gpt2.errors import UserError
from gpt2.model import IGNORE_INDEX
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.signals import leave_to_parent
from gpt2.tokenizer import GPT2Tokenizer

log = logging.getLogger(__name__)


class TokenDataset(Dataset):
    """A file of tokens as blocks of `length` inputs and the `length` tokens that follow them.

    Block i starts at token i * stride. By default that is i * length: its last target is the first input of block
    i + 1. With a smaller stride the blocks overlap, and a target that an earlier block had is ignored, so in any case
    each token but the very first is predicted exactly once. The last block is filled up with ignored targets.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        length: int,
        tokenizer: GPT2Tokenizer | None = None,
        fingerprint: str | None = None,
        stride: int | None = None,
    ):
        self.path, self.dtype, self.length = path, dtype, length
        self.stride = length if stride is None else stride
        if not 1 <= self.stride <= length:
            raise ValueError(f"a stride of {stride} leaves tokens out, 1 to {length} would not")
        self.fingerprint = fingerprint  # of the corpus: a resumed run must find the one that it began with
        self.tokenizer = tokenizer  # travels into the checkpoints of what is trained on these blocks
        self.number_of_tokens = path.stat().st_size // np.dtype(dtype).itemsize

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Without the map, a worker process opens its own, and without the tokenizer, which it does not need."""
        return {**{key: value for key, value in vars(self).items() if key != "tokens"}, "tokenizer": None}

    def __len__(self) -> int:
        targets = self.number_of_tokens - 1
        return 0 if targets < 1 else 1 + max(0, -(-(targets - self.length) // self.stride))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """`input_ids` and `targets`, (b, length) each: what `GPT2Model.forward` takes."""
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"block {indices} of {len(self)}")
        batch = torch.full((len(indices), self.length + 1), IGNORE_INDEX, dtype=torch.int64)
        for row, index in enumerate(indices):
            start = index * self.stride
            block = self.tokens[start : start + self.length + 1]
            batch[row, : len(block)] = torch.from_numpy(block.astype(np.int64))
        targets = batch[:, 1:].clone()
        for row, index in enumerate(indices):
            if index > 0:
                targets[row, : self.length - self.stride] = IGNORE_INDEX
        return {"input_ids": batch[:, :-1].clamp(min=0), "targets": targets}


class ShuffledBatches(Sampler[list[int]]):
    """Numbers of blocks in batches: every block once an epoch, in an order that (seed, epoch) alone decides."""

    def __init__(self, number_of_blocks: int, batch_size: int, seed: int):
        self.number_of_blocks, self.batch_size, self.seed = number_of_blocks, batch_size, seed
        self.epoch = 0
        self.position = 0  # batches of this epoch that the next iteration leaves out: where a resumed run goes on

    def __len__(self) -> int:
        return -(-self.number_of_blocks // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.number_of_blocks)
        for start in range(self.position * self.batch_size, self.number_of_blocks, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


def load_text_data(data_config: DataConfig) -> tuple[TokenDataset, TokenDataset, TokenDataset, GPT2Tokenizer]:
    """Text as `data_config` describes it -> training, validation and test blocks, and the tokenizer that made them.

    A source without a test split is tested on its validation split.

    Raises:
        UserError: See `prepare`.
    """
    prepared = prepare(data_config)
    tokenizer = prepared.tokenizer()

    def blocks(split: str) -> TokenDataset:
        path = prepared.folder / f"{split}.bin"
        about = prepared.about
        return TokenDataset(path, about["dtype"], data_config.max_length, tokenizer, about["fingerprint"])

    tokens, length = prepared.about["tokens"], data_config.max_length
    for split, key in (("train", "a longer text"), ("validation", "a larger data.validation_fraction")):
        if tokens[split] < 2:
            raise UserError(f"data: the {split} split has no token to predict; {key} would give it some")
        if tokens[split] <= length:
            log.warning(
                "Note: the %s split has only %s tokens, less than one block of data.max_length=%s.",
                *(split, f"{tokens[split]:,}", length),
            )
    test = "test" if tokens["test"] > 1 else "validation"
    return blocks("train"), blocks("validation"), blocks(test), tokenizer


def load_split(data_config: DataConfig, split: str, stride: int | None = None) -> TokenDataset:
    """One split alone, or `all` in one, in blocks that start every `stride` tokens.

    A source without a test split is tested on its validation split, and a log line says so.

    Raises:
        UserError: See `prepare`.
    """
    prepared = prepare(data_config, only=split)
    about = prepared.about
    (found,) = about["tokens"]
    if found != split:
        log.warning("Note: the data have no %s split, this is the %s split.", split, found)
    path = prepared.folder / f"{found}.bin"
    return TokenDataset(
        path, about["dtype"], data_config.max_length, prepared.tokenizer(), about["fingerprint"], stride
    )


def get_dataloaders(
    train_dataset: Dataset,
    val_dataset: Dataset,
    test_dataset: Dataset,
    training_config: TrainingConfig,
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of batches as `GPT2Model.forward` takes them.

    Training is shuffled anew each epoch. Validation has one order for ever, shuffled too, so that its first
    `eval_batches` are a fair sample of it. Test goes in order.
    """
    config = training_config
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    # Cores that train have none to spare: two workers beside two such threads made a step 13 % longer.
    cores = (os.cpu_count() or 1) // dist_env().local_world_size
    spare_cores = cores - (0 if on_cuda else torch.get_num_threads())
    workers = max(0, min(config.num_workers, spare_cores))
    is_of_joblib = multiprocessing.get_start_method() == "loky"  # whose way to start processes PyTorch cannot use
    common: dict[str, Any] = {
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers and is_of_joblib else None,
        "pin_memory": config.pin_memory and on_cuda,
        "worker_init_fn": _start_worker,
        # A loader draws a seed for its workers whenever it starts: not from the generator that dropout draws from.
        "generator": torch.Generator(),
    }
    if isinstance(train_dataset, TokenDataset):
        common["collate_fn"] = identity_collate

    def shuffled(dataset: Dataset, seed: int) -> DataLoader:
        batches = ShuffledBatches(len(dataset), config.batch_size, seed)  # type: ignore[arg-type]
        return DataLoader(dataset, batch_sampler=batches, **common)

    train_loader = shuffled(train_dataset, config.seed)
    val_loader = shuffled(val_dataset, seed=0)
    test_loader = DataLoader(test_dataset, batch_size=config.batch_size, **common)
    return train_loader, val_loader, test_loader


def batch_size_of(loader: DataLoader) -> int | None:
    """The blocks in a batch; None if the loader is of a kind of which `with_batch_size` makes no other one."""
    sampler = loader.batch_sampler
    return sampler.batch_size if isinstance(sampler, ShuffledBatches) else loader.batch_size


def with_batch_size(loader: DataLoader, batch_size: int | None) -> DataLoader:
    """A loader of the same data in the same order, in batches of another size; the same one if that is None."""
    if batch_size is None:
        return loader
    names = ("num_workers", "multiprocessing_context", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
    common: dict[str, Any] = {name: getattr(loader, name) for name in names}
    common["generator"] = loader.generator or torch.Generator()  # as in `get_dataloaders`
    sampler = loader.batch_sampler
    if isinstance(sampler, ShuffledBatches):
        batches = ShuffledBatches(sampler.number_of_blocks, batch_size, sampler.seed)
        return DataLoader(loader.dataset, batch_sampler=batches, **common)
    if not isinstance(loader.dataset, IterableDataset):
        common["sampler"] = loader.sampler
    return DataLoader(loader.dataset, batch_size=batch_size, drop_last=loader.drop_last, **common)


def _start_worker(_worker: int) -> None:
    leave_to_parent()  # the trainer alone decides when it is over


def identity_collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate what `TokenDataset.__getitems__` has stacked already."""
    return batch
