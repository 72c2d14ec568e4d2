"""Text to packed tokens on disk.

A corpus is prepared once: its documents are tokenized and laid end to end, `<|endoftext|>` after each, in one file of
integers a split, in a folder named by a fingerprint of everything that decides its content.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from gpt2.checkpoint.pretrained import open_tokenizer
from gpt2.config import DataConfig
from gpt2.data.sources import Documents, Source, cache_folder, dataset_source, text_source
from gpt2.errors import UserError
from gpt2.runtime.console import track
from gpt2.tokenizer import GPT2Tokenizer

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

FORMAT = 1  # of the files below; a change makes every cached corpus be prepared anew
SPLITS: tuple[str, ...] = ("train", "validation", "test")
PIECE = 1 << 16  # characters: a tokenizer slows down on longer strings
LONGEST_PIECE = 1 << 20  # characters: bounds memory where a text has no border
BATCH = 1 << 18  # characters that a thread encodes at a time: bounds memory, and is worth handing over
BORDER = re.compile(r"(?<=\S)[ \t\n\r]")  # what the tokenizer's pattern and Python's both take for a border
FEW_DOCUMENTS = 5  # fewer held out than this would be no fair sample


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


def documents_of_split(source: Source, split: str, config: DataConfig) -> Iterator[Iterator[str]]:
    """The documents of one split, in parts; held out of the training split where the source brings none; or `all`."""
    if split == "all":
        for documents in filter(None, (source.train, source.validation, source.test)):
            yield from (document.parts() for document in documents)
        return
    brought: Documents | None = getattr(source, split)
    if source.validation is not None or split == "test":
        yield from (document.parts() for document in brought or ())
        return
    fraction, validation = config.validation_fraction, split == "validation"
    chosen = held_out(len(source.train), fraction)
    for number, document in enumerate(source.train):
        if chosen is not None:
            if (number in chosen) == validation:
                yield document.parts()
        else:
            yield document.parts(1 - fraction, 1) if validation else document.parts(0, 1 - fraction)


def pieces(document: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document, given in parts, in pieces of about PIECE characters, and whether it ends there.

    The tokens are those of the whole: GPT-2's pattern never joins a space to a character before it that is none, so
    such a place is always a border of tokens. A text in which LONGEST_PIECE characters bring no such place is cut
    there nevertheless. At such a cut, and nowhere else, the tokens may be others than those of the whole.
    """
    rest = ""
    for part in document:
        rest += part
        start = 0
        while end := _end_of_piece(rest, start):
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    yield rest, True


def _end_of_piece(text: str, start: int) -> int | None:
    """Where the piece that begins at `start` ends; None if that depends on what follows the text."""
    if border := BORDER.search(text, start + PIECE, start + LONGEST_PIECE):
        return border.start()
    return start + LONGEST_PIECE if len(text) >= start + LONGEST_PIECE else None


def with_text(documents: Iterable[Iterable[str]]) -> Iterator[Iterable[str]]:
    """The documents, given in parts, that are not blank."""
    for document in documents:
        parts, read = iter(document), []
        for part in parts:
            read.append(part)
            if part.strip():
                yield chain(read, parts)
                break


def batched(documents: Iterable[Iterable[str]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents in batches of about BATCH characters. Blank documents are left out."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in (piece for document in with_text(documents) for piece in pieces(document)):
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


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """What a function makes of each item, in order. Few items are taken before their results are."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pack(
    documents: Iterable[Iterable[str]], tokenizer: GPT2Tokenizer, path: Path, description: str, threads: int = 1
) -> int:
    """Write the tokens of all documents, given in parts, to a file, `<|endoftext|>` after each. Returns how many."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eos_token_id])
    tokenizer.encode_batch([])  # what it needs is made now, not once by each thread

    def encode(batch: list[tuple[str, bool]]) -> np.ndarray:
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        ended = ((ids, end) if ends else (ids,) for ids, (_, ends) in zip(encoded, batch, strict=True))
        return np.concatenate([*chain.from_iterable(ended)], dtype=dtype, casting="unsafe")

    total = 0
    with path.open("wb") as file, track(description, unit="tokens") as advance:
        for tokens in map_in_threads(encode, batched(documents), threads):
            file.write(tokens.data)
            total += len(tokens)
            advance(total)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The cache


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


def prepare(config: DataConfig, only: str | None = None) -> PreparedData:
    """Have the corpus in tokens: from the cache, or made now. Of several processes that start at once, one makes it.

    Args:
        only: The one split that is wanted, or `all` for the three in one; `test` is `validation` where the source
            brings none. None: the three of them.

    Raises:
        UserError: The source cannot be reached, read or tokenized, or there is too little of it.
    """
    # Read when the tokenizer's threads start; and forked data workers must not make it warn about them.
    os.environ.setdefault("RAYON_NUM_THREADS", str(config.preprocessing_num_workers))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    source = text_source(config) if config.files is not None else dataset_source(config)
    tokenizer = None if config.tokenizer == "train" else open_tokenizer(config.tokenizer)
    splits = SPLITS if only is None else ("validation" if only == "test" and source.test is None else only,)
    decisive = {
        "format": FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint if tokenizer else {"train": config.vocab_size},
        "validation_fraction": config.validation_fraction if source.validation is None else None,
        **({} if only is None else {"splits": splits}),
    }
    if source.validation is None and config.files and held_out(len(source.train), config.validation_fraction) is None:
        decisive["cut"] = "bytes"  # of each file: earlier versions counted characters
    fingerprint = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    prepared = PreparedData(cache_folder(config) / "tokens" / fingerprint)
    prepared.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(prepared.folder.with_suffix(".lock")):
        if prepared.is_whole():
            log.info("Data: %s, from the cache %s", _summary(prepared), prepared.folder)
            return prepared
        shutil.rmtree(prepared.folder, ignore_errors=True)
        prepared = PreparedData(prepared.folder)
        about = {"fingerprint": fingerprint, **decisive}
        _make(prepared.folder, lambda folder: _fill(folder, source, tokenizer, config, splits, about))
    log.info("Data: %s, cached in %s", _summary(prepared), prepared.folder)
    return prepared


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside the target, then give it the target's name: it is there whole or not at all."""
    making = folder.with_name(f".making-{folder.name}")
    shutil.rmtree(making, ignore_errors=True)  # left by a process that was killed
    making.mkdir()
    try:
        fill(making)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _fill(
    folder: Path,
    source: Source,
    tokenizer: GPT2Tokenizer | None,
    config: DataConfig,
    splits: tuple[str, ...],
    about: dict,
) -> None:
    if tokenizer is None:
        with track("Training the tokenizer", unit="characters") as advance:
            texts = (text for document in documents_of_split(source, "train", config) for text, _ in pieces(document))
            tokenizer = GPT2Tokenizer.train(_counted(texts, advance), config.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    tokens = {
        split: pack(
            documents_of_split(source, split, config),
            tokenizer,
            folder / f"{split}.bin",
            f"Tokenizing {split}",
            config.preprocessing_num_workers,
        )
        for split in splits
    }
    for split in splits:
        if not tokens[split] and (split != "test" or len(splits) == 1):  # validation stands in for an empty test
            raise UserError(f"data: there is no text in the {split} split")
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    dtype = token_dtype(tokenizer.vocab_size).name
    about = {**about, "tokens": tokens, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "bytes": sizes}
    (folder / "about.json").write_text(json.dumps(about, indent=1))


def _counted(texts: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    total = 0
    for text in texts:
        total += len(text)
        advance(total)
        yield text


def _summary(prepared: PreparedData) -> str:
    purposes = {"train": "to train on", "validation": "to validate", "test": "to test", "all": "in all"}
    tokens = prepared.about["tokens"]
    parts = [f"{tokens[split]:,} tokens {purpose}" for split, purpose in purposes.items() if tokens.get(split)]
    return f"{', '.join(parts)}, vocabulary of {prepared.about['vocab_size']:,}"
