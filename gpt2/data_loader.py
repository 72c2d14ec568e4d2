"""Datasets of token blocks, and loaders of batches.

The token files of `gpt2.data.corpus` are memory-mapped and divided into blocks. The order of the blocks is a pure
function of (seed, epoch, position), so resuming is arithmetic. Data loading is rank-agnostic: every rank reads the
global batch and computes its share.
"""

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from gpt2.config import DataConfig, TrainingConfig
from gpt2.data.corpus import SPLITS, PreparedData, prepare
from gpt2.data.token_files import TokenFile, Tokens, count_tokens
from gpt2.errors import UserError
from gpt2.model import IGNORE_INDEX
from gpt2.runtime.console import progress_shown
from gpt2.runtime.device import available_cores
from gpt2.runtime.dist_env import dist_env
from gpt2.runtime.signals import ignore_signals
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import require_valid

log = logging.getLogger(__name__)


class TokenDataset(Dataset):
    """A token file as blocks of `length` inputs and `length` targets, where a target is the token after its input.

    Block i starts at token i * stride. By default the stride is `length`, and the last target of a block is the first
    input of the next. With a smaller stride the blocks overlap, and targets of an earlier block are ignored, so every
    token but the first of the file is predicted exactly once. The last block is padded with ignored targets.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        length: int,
        tokenizer: GPT2Tokenizer | None = None,
        fingerprint: str | None = None,
        stride: int | None = None,
        files: Sequence[TokenFile] | None = None,
    ):
        """
        Args:
            path: The file; its name is that of the split.
            dtype: The NumPy name of the tokens' type in the file.
            tokenizer: Saved in the checkpoints of models that are trained on these blocks.
            fingerprint: The corpus's; a resumed run compares it with the one in its checkpoint.
            files: The token files, if the tokens are not in `path`.
        """
        self.path, self.dtype, self.length = path, dtype, length
        self.tokenizer, self.fingerprint = tokenizer, fingerprint
        self.stride = length if stride is None else stride
        if not 1 <= self.stride <= length:
            raise ValueError(f"a stride of {stride} would skip tokens, it must be between 1 and {length}")
        self.files = files or [TokenFile(path, 0, path.stat().st_size // np.dtype(dtype).itemsize)]
        self.number_of_tokens = count_tokens(self.files)

    @cached_property
    def tokens(self) -> np.ndarray | Tokens:
        return self.files[0].map(self.dtype) if len(self.files) == 1 else Tokens(self.files, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """The state for worker processes, without the tokenizer and the memory map, which they open themselves."""
        return {**{key: value for key, value in vars(self).items() if key != "tokens"}, "tokenizer": None}

    def __len__(self) -> int:
        targets = self.number_of_tokens - 1
        return 0 if targets < 1 else 1 + max(0, -(-(targets - self.length) // self.stride))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch for `GPT2Model.forward`: `input_ids` and `targets`, int64, each (b, length)."""
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"block {indices} of {len(self)}")
        batch = np.full((len(indices), self.length + 1), IGNORE_INDEX, np.int64)
        for row, index in enumerate(indices):
            start = index * self.stride
            block = self.tokens[start : start + self.length + 1]
            batch[row, : len(block)] = block
        targets = batch[:, 1:].copy()
        targets[np.array(indices) > 0, : self.length - self.stride] = IGNORE_INDEX
        return {"input_ids": torch.from_numpy(batch[:, :-1].clip(min=0)), "targets": torch.from_numpy(targets)}


class ShuffledBatches(Sampler[list[int]]):
    """Batches of block numbers: every block once an epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, number_of_blocks: int, batch_size: int, seed: int):
        self.number_of_blocks, self.batch_size, self.seed = number_of_blocks, batch_size, seed
        self.epoch = 0
        self.position = 0  # batches of the epoch to skip; set when a run is resumed

    def __len__(self) -> int:
        return -(-self.number_of_blocks // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.number_of_blocks)
        for start in range(self.position * self.batch_size, self.number_of_blocks, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


@progress_shown()
def load_text_data(data_config: DataConfig) -> tuple[TokenDataset, TokenDataset, TokenDataset, GPT2Tokenizer]:
    """Load the training, validation and test blocks of a corpus, and its tokenizer.

    If the source has no test split, the validation split is used.

    Raises:
        UserError: See `gpt2.data.corpus.prepare`; or a split has fewer than two tokens.
    """
    require_valid(data_config, "data.")
    prepared, length = prepare(data_config), data_config.max_length
    tokens = prepared.about["tokens"]
    for split, remedy in (("train", "use a longer text"), ("validation", "increase data.validation_fraction")):
        if tokens[split] < 2:
            raise UserError(f"data: the {split} split has no token to predict; {remedy}")
        if tokens[split] <= length:
            message = "Note: the %s split has only %s tokens, less than one block of data.max_length=%s."
            log.warning(message, split, f"{tokens[split]:,}", length)
    share, wanted = tokens["validation"] / (tokens["train"] + tokens["validation"]), data_config.validation_fraction
    if prepared.about["validation_fraction"] is not None and not wanted / 4 <= share <= 4 * wanted:
        lengths = "shorter" if share < wanted else "longer"  # validation_fraction is None if the source has the split
        log.warning(
            f"Note: the validation split has {100 * share:.2g} % of the tokens, not data.validation_fraction={wanted:g}"
            f": its documents were drawn at random, and are {lengths} than the others."
        )
    splits = ("train", "validation", "test" if tokens["test"] > 1 else "validation")
    train, validation, test = (_blocks(prepared, split, data_config) for split in splits)
    return train, validation, test, prepared.tokenizer


@progress_shown()
def load_split(data_config: DataConfig, split: str, stride: int | None = None) -> TokenDataset:
    """Load the blocks of one split, or of `all` splits together.

    If the source has no test split, the validation split is used, with a warning.

    Args:
        stride: Tokens between the starts of two blocks; None: `data_config.max_length`.

    Raises:
        UserError: There is no such split; or see `gpt2.data.corpus.prepare`.
    """
    if split not in (*SPLITS, "all"):
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}, all")
    require_valid(data_config, "data.")
    prepared = prepare(data_config, only=split)
    (actual,) = prepared.about["tokens"]
    if actual != split:
        log.warning("Note: the data have no %s split, the %s split is used.", split, actual)
    return _blocks(prepared, actual, data_config, stride)


def _blocks(prepared: PreparedData, split: str, config: DataConfig, stride: int | None = None) -> TokenDataset:
    about, path, files = prepared.about, prepared.folder / f"{split}.bin", prepared.in_place.get(split)
    return TokenDataset(
        path, about["dtype"], config.max_length, prepared.tokenizer, about["fingerprint"], stride, files
    )


def get_dataloaders(
    train_dataset: Dataset,
    val_dataset: Dataset,
    test_dataset: Dataset,
    training_config: TrainingConfig,
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Create loaders of batches for `GPT2Model.forward`.

    The training data are shuffled in each epoch. The validation data have one fixed random order, so that the first
    `eval_batches` are a fair sample. The test data are in order.

    Raises:
        UserError: `training_config` is invalid.
    """
    config = training_config
    require_valid(config, "train.")
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    # On a CPU, workers take cores from training.
    cores = available_cores() // dist_env().local_world_size
    workers = max(0, min(config.num_workers, cores - (0 if on_cuda else torch.get_num_threads())))
    is_joblib = multiprocessing.get_start_method() == "loky"  # a start method that PyTorch does not support
    common: dict[str, Any] = {
        "num_workers": workers,
        # Not persistent: workers ignore SIGTERM, so a program that still holds the loader would wait for them at exit.
        "multiprocessing_context": "fork" if workers and is_joblib else None,
        "pin_memory": config.pin_memory and on_cuda,
        "worker_init_fn": ignore_signals,
        # A loader draws a seed for its workers at each start. From the global generator, that would change dropout.
        "generator": torch.Generator(),
    }
    if isinstance(train_dataset, TokenDataset):
        common["collate_fn"] = identity_collate

    def shuffled(dataset: Dataset, seed: int) -> DataLoader:
        batches = ShuffledBatches(len(dataset), config.batch_size, seed)  # type: ignore[arg-type]
        return DataLoader(dataset, batch_sampler=batches, **common)

    test_loader = DataLoader(test_dataset, batch_size=config.batch_size, **common)
    return shuffled(train_dataset, config.seed), shuffled(val_dataset, seed=0), test_loader


def identity_collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate function for `TokenDataset`, whose `__getitems__` returns a batch."""
    return batch


def batch_size_of(loader: DataLoader) -> int | None:
    """The number of blocks in a batch; None if `with_batch_size` cannot change it."""
    sampler = loader.batch_sampler
    return sampler.batch_size if isinstance(sampler, ShuffledBatches) else loader.batch_size


def with_batch_size(loader: DataLoader, batch_size: int | None) -> DataLoader:
    """Return a loader of the same data in the same order with another batch size; the loader itself if it is None."""
    if batch_size is None:
        return loader
    names = ("num_workers", "multiprocessing_context", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
    common: dict[str, Any] = {name: getattr(loader, name) for name in names}
    common["generator"] = loader.generator or torch.Generator()  # its own generator, as in `get_dataloaders`
    sampler = loader.batch_sampler
    if isinstance(sampler, ShuffledBatches):
        batches = ShuffledBatches(sampler.number_of_blocks, batch_size, sampler.seed)
        return DataLoader(loader.dataset, batch_sampler=batches, **common)
    if not isinstance(loader.dataset, IterableDataset):
        common["sampler"] = loader.sampler
    return DataLoader(loader.dataset, batch_size=batch_size, drop_last=loader.drop_last, **common)
