"""Text to packed tokens on disk to batches.

A corpus is prepared once: its documents are tokenized and laid end to end, `<|endoftext|>` after each, in one file of
integers a split, in a folder named by a fingerprint of everything that decides its content. Training maps that file
into memory and cuts it into blocks. Which block comes when is a pure function of (seed, epoch, position), so a place
in the data is one integer and resuming is arithmetic.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from gpt2.config import DataConfig, TrainingConfig, UserError
from gpt2.hub import WITHOUT_NETWORK, connect
from gpt2.model import IGNORE
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.tracking import track

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

FORMAT = 1  # of the files below; a change makes every cached corpus be prepared anew
SPLITS = ("train", "validation", "test")
PIECE = 1 << 16  # characters: a tokenizer slows down on longer strings
BATCH = 1 << 22  # characters encoded at a time: bounds memory, and is enough for every thread to work on
BORDER = re.compile(r"(?<=\S)\s")
FEW_DOCUMENTS = 5  # fewer held out than this would be no fair sample

Documents = Iterable[str]


# ---------------------------------------------------------------------------------------------------------------------
# Sources: where documents come from


@dataclass
class Source:
    """The documents of each split. A `validation` of None is held out of `train`; a `test` of None is `validation`."""

    fingerprint: str
    documents: dict[str, Documents | None]
    number_of_documents: int  # in train


class TextFiles:
    """One document a file, in the order of their names."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            try:
                yield path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.files: {path} is not UTF-8 at byte {error.start}; convert it or leave it out (data.exclude)"
                ) from error
            except OSError as error:
                raise UserError(f"data.files: cannot read {path}: {error.strerror}") from error


class Rows:
    """The documents of a table: a row each, or, with a pattern, all rows from one that matches up to the next."""

    def __init__(self, table: "datasets.Dataset", column: str, document_start: str | None):
        self.table, self.column = table, column
        self.starts_document = re.compile(document_start).match if document_start else None

    def __iter__(self) -> Iterator[str]:
        rows = (text for batch in self.table.iter(1000) for text in batch[self.column])
        if self.starts_document is None:
            yield from rows
            return
        document: list[str] = []
        for row in rows:
            if document and self.starts_document(row):
                yield "".join(document)
                document = []
            document.append(row if row.endswith("\n") else row + "\n")
        yield "".join(document)


def find_files(patterns: list[str], exclude: list[str]) -> list[Path]:
    """The files that match any pattern and no exclusion, sorted."""
    matches = {path for pattern in patterns for path in glob(pattern, recursive=True)}
    kept = (path for path in matches if not any(fnmatch(path, unwanted) for unwanted in exclude))
    return sorted(path for path in map(Path, kept) if path.is_file())


def text_source(config: DataConfig) -> Source:
    """The files that `config.files` names, identified by their content."""
    paths = find_files(config.files or [], config.exclude)
    if not paths:
        raise UserError(f"data.files: no file matches {config.files} once data.exclude={config.exclude} is taken out")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Source(digest.hexdigest(), {"train": TextFiles(paths), "validation": None, "test": None}, len(paths))


def hub_source(config: DataConfig) -> Source:
    """A dataset of the Hugging Face Hub, of its cache, or of a local folder laid out like one.

    Raises:
        UserError: It cannot be reached, or has no such configuration, split or column.
    """
    is_local = Path(config.dataset_name).exists()
    if not is_local:
        connect()
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    def load(split: str) -> "datasets.Dataset":
        return load_dataset(config.dataset_name, config.dataset_config, split=split, cache_dir=config.cache_dir)

    wanted = dict(zip(SPLITS, (config.train_split, config.validation_split, config.test_split), strict=True))
    try:
        tables = {split: load(name) if name else None for split, name in wanted.items()}
    except (ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"could not reach dataset {config.dataset_name!r} on the Hugging Face Hub, nor find it in the cache; "
            f"{WITHOUT_NETWORK}"
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"data: {config.dataset_name!r}: {' '.join(str(error).split())}") from error

    train = tables["train"]
    assert train is not None
    for table in filter(None, tables.values()):
        if config.text_column not in table.column_names:
            raise UserError(f"data.text_column: {config.text_column!r} is not one of {table.column_names}")
    key = [(split, table and table._fingerprint) for split, table in tables.items()]
    return Source(
        fingerprint=json.dumps([key, config.text_column, config.document_start]),
        documents={
            split: Rows(table, config.text_column, config.document_start) if table else None
            for split, table in tables.items()
        },
        number_of_documents=len(train),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Splitting and packing


def held_out(count: int, fraction: float) -> set[int] | None:
    """Numbers of the documents that form the validation split: drawn with a fixed seed, the same on every machine.

    None if they would be too few to stand for the rest: then the end of every document is held out instead.
    """
    size = round(count * fraction)
    if size < FEW_DOCUMENTS:
        return None
    return set(np.random.default_rng(0).permutation(count)[:size].tolist())


def split_documents(documents: Documents, chosen: set[int] | None, fraction: float, validation: bool) -> Iterator[str]:
    """The part of `documents` that is held out for validation, or the rest of them."""
    for number, document in enumerate(documents):
        if chosen is not None:
            if (number in chosen) == validation:
                yield document
        else:
            cut = int(len(document) * (1 - fraction))
            yield document[cut:] if validation else document[:cut]


def split_of(source: Source, split: str, config: DataConfig) -> Documents:
    """The documents of one split, held out of the training split where the source brings none."""
    if source.documents["validation"] is not None or split == "test":
        return source.documents[split] or ()
    documents = source.documents["train"] or ()
    chosen = held_out(source.number_of_documents, config.validation_fraction)
    return split_documents(documents, chosen, config.validation_fraction, validation=split == "validation")


def pieces(document: str) -> Iterator[tuple[str, bool]]:
    """A document in pieces of about PIECE characters, and whether it ends there; the tokens are those of the whole.

    GPT-2's pattern never joins a space to a character before it that is none, so such a place is always a border of
    tokens.
    """
    start = 0
    while border := BORDER.search(document, start + PIECE):
        yield document[start : border.start()], False
        start = border.start()
    yield document[start:], True


def batched(documents: Documents) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents in batches of about BATCH characters. Empty documents are left out."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in (piece for document in documents if document for piece in pieces(document)):
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type that holds the vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def pack(documents: Documents, tokenizer: GPT2Tokenizer, path: Path, description: str) -> int:
    """Write the tokens of all documents to a file, `<|endoftext|>` after each. Returns how many."""
    dtype = token_dtype(tokenizer.vocab_size)
    total = 0
    with path.open("wb") as file, track(description, unit="tokens") as advance:
        for batch in batched(documents):
            encoded = tokenizer.encode_batch([text for text, _ in batch])
            for ids, (_, ends_document) in zip(encoded, batch, strict=True):
                tokens = [*ids, tokenizer.eos_token_id] if ends_document else ids
                np.asarray(tokens, dtype=dtype).tofile(file)
                total += len(tokens)
            advance(total)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def cache_folder(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2"


def fixed_tokenizer(name: str) -> GPT2Tokenizer | None:
    """The tokenizer of that name, or None if it has yet to be trained on the corpus."""
    if name == "train":
        return None
    if name == "bytes":
        return GPT2Tokenizer.of_bytes()
    return GPT2Tokenizer.from_hub() if name == "gpt2" else GPT2Tokenizer.from_folder(name)


@dataclass
class PreparedData:
    """A corpus in tokens, on disk: `train.bin`, `validation.bin`, `test.bin`, `tokenizer.json`, `about.json`."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "about.json").read_text())

    def is_whole(self) -> bool:
        """Whether every file has the size that was written: a file cut short, by a full disk say, is noticed."""
        try:
            return all((self.folder / name).stat().st_size == size for name, size in self.about["bytes"].items())
        except (OSError, ValueError, KeyError):
            return False

    def tokenizer(self) -> GPT2Tokenizer:
        return GPT2Tokenizer.from_json((self.folder / "tokenizer.json").read_text(encoding="utf-8"))


def prepare(config: DataConfig) -> PreparedData:
    """Have the corpus in tokens: from the cache, or made now. Of several processes that start at once, one makes it.

    Raises:
        UserError: The source cannot be reached, read or tokenized, or there is too little of it.
    """
    # Read when the tokenizer's threads start; and forked data workers must not make it warn about them.
    os.environ.setdefault("RAYON_NUM_THREADS", str(config.preprocessing_num_workers))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    source = text_source(config) if config.files is not None else hub_source(config)
    tokenizer = fixed_tokenizer(config.tokenizer)
    decisive = {
        "format": FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint if tokenizer else {"train": config.vocab_size},
        "validation_fraction": config.validation_fraction if source.documents["validation"] is None else None,
    }
    fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    prepared = PreparedData(cache_folder(config) / "tokens" / fingerprint)
    prepared.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(prepared.folder.with_suffix(".lock")):
        if prepared.is_whole():
            log.info("Data: %s, from the cache %s", _summary(prepared), prepared.folder)
            return prepared
        shutil.rmtree(prepared.folder, ignore_errors=True)
        prepared = PreparedData(prepared.folder)
        _make(prepared.folder, source, tokenizer, config, {"fingerprint": fingerprint, **decisive})
    log.info("Data: %s, cached in %s", _summary(prepared), prepared.folder)
    return prepared


def _make(folder: Path, source: Source, tokenizer: GPT2Tokenizer | None, config: DataConfig, about: dict) -> None:
    """Fill a folder beside the target, then give it the target's name: it is there whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as beside:
        making = Path(beside) / folder.name
        making.mkdir()
        if tokenizer is None:
            with track("Training the tokenizer", unit="characters") as advance:
                documents = _counted(split_of(source, "train", config), advance)
                tokenizer = GPT2Tokenizer.train(documents, config.vocab_size)
        (making / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        tokens = {}
        for split in SPLITS:
            path = making / f"{split}.bin"
            tokens[split] = pack(split_of(source, split, config), tokenizer, path, f"Tokenizing {split}")
        for split in ("train", "validation"):
            if tokens[split] < 2:
                raise UserError(f"data: the {split} split holds {tokens[split]} tokens, at least 2 are needed")
        sizes = {file.name: file.stat().st_size for file in making.iterdir()}
        dtype = token_dtype(tokenizer.vocab_size).name
        about = {**about, "tokens": tokens, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "bytes": sizes}
        (making / "about.json").write_text(json.dumps(about, indent=1))
        making.rename(folder)


def _counted(documents: Documents, advance: Any) -> Iterator[str]:
    total = 0
    for document in documents:
        total += len(document)
        advance(total)
        yield document


def _summary(prepared: PreparedData) -> str:
    tokens = prepared.about["tokens"]
    return f"{tokens['train']:,} tokens to train on, {tokens['validation']:,} to validate, vocabulary of " + (
        f"{prepared.about['vocab_size']:,}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Blocks and batches


class TokenBlocks(Dataset):
    """A file of tokens as blocks of `length` inputs and the `length` tokens that follow them.

    Block i starts at token i * length and shares its last target with the first input of block i + 1, so each token
    but the very first is predicted exactly once. The last block is filled up with ignored targets.
    """

    def __init__(self, path: Path, dtype: str, length: int, tokenizer: GPT2Tokenizer | None = None):
        self.path, self.dtype, self.length = path, dtype, length
        self.tokenizer = tokenizer  # travels into the checkpoints of what is trained on these blocks
        self.number_of_tokens = path.stat().st_size // np.dtype(dtype).itemsize

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        """Without the map, a worker process opens its own, and without the tokenizer, which it does not need."""
        return {**{key: value for key, value in vars(self).items() if key != "tokens"}, "tokenizer": None}

    def __len__(self) -> int:
        return max(0, -(-(self.number_of_tokens - 1) // self.length))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """`input_ids` and `targets`, (b, length) each: what `GPT2Model.forward` takes."""
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"block {indices} of {len(self)}")
        batch = torch.full((len(indices), self.length + 1), IGNORE, dtype=torch.int64)
        for row, index in enumerate(indices):
            block = self.tokens[index * self.length : (index + 1) * self.length + 1]
            batch[row, : len(block)] = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": batch[:, :-1].clamp(min=0), "targets": batch[:, 1:]}


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


def load_text_data(data_config: DataConfig) -> tuple[TokenBlocks, TokenBlocks, TokenBlocks, GPT2Tokenizer]:
    """Text as `data_config` describes it -> training, validation and test blocks, and the tokenizer that made them.

    A source without a test split is tested on its validation split.

    Raises:
        UserError: See `prepare`.
    """
    prepared = prepare(data_config)
    tokenizer = prepared.tokenizer()

    def blocks(split: str) -> TokenBlocks:
        path = prepared.folder / f"{split}.bin"
        return TokenBlocks(path, prepared.about["dtype"], data_config.max_length, tokenizer)

    test = "test" if prepared.about["tokens"]["test"] > 1 else "validation"
    return blocks("train"), blocks("validation"), blocks(test), tokenizer


def get_dataloaders(
    train_dataset: Dataset,
    val_dataset: Dataset,
    test_dataset: Dataset,
    training_config: TrainingConfig,
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of batches as `GPT2Model.forward` takes them; training is shuffled, validation and test go in order."""
    config = training_config
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    common: dict[str, Any] = {
        "num_workers": config.num_workers,
        "pin_memory": config.pin_memory and on_cuda,
        "worker_init_fn": _leave_interrupts_to_parent,
        # A loader draws a seed for its workers whenever it starts: not from the generator that dropout draws from.
        "generator": torch.Generator(),
    }
    if isinstance(train_dataset, TokenBlocks):
        common["collate_fn"] = _as_it_is  # __getitems__ has stacked them already

    shuffled = ShuffledBatches(len(train_dataset), config.batch_size, config.seed)  # type: ignore[arg-type]
    train_loader = DataLoader(train_dataset, batch_sampler=shuffled, **common)
    val_loader, test_loader = (
        DataLoader(dataset, batch_size=config.batch_size, **common) for dataset in (val_dataset, test_dataset)
    )
    return train_loader, val_loader, test_loader


def _leave_interrupts_to_parent(_worker: int) -> None:
    """Ctrl-C goes to every process of a terminal; the trainer alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
