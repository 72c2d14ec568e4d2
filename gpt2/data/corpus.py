"""Tokenize a corpus and cache it on disk.

The tokens of all documents of a split are concatenated in one file, each document followed by `<|endoftext|>`. The
files lie in a folder named by a fingerprint of everything that determines their contents.
"""

import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from gpt2.data.sources import Documents, Source, cache_folder, open_source
from gpt2.errors import UserError
from gpt2.runtime.console import track
from gpt2.runtime.files import atomic_folder, damaged_file, remove
from gpt2.runtime.signals import interruptibly
from gpt2.tokenizer import GPT2Tokenizer

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Parts = Iterable[str]  # a document: its text, in parts

FORMAT = 2  # of the cached files; a new number invalidates every cached corpus
ABOUT, TOKENIZER = "about.json", "tokenizer.json"
SPLITS: tuple[str, ...] = ("train", "validation", "test")
MIN_VALIDATION_DOCUMENTS = 5  # with fewer, whole documents are too small a sample of the corpus

# Lengths in characters.
PIECE_LENGTH = 1 << 16  # of the strings that are encoded: the tokenizer slows down on longer ones
MAX_PIECE_LENGTH = 1 << 20  # if no boundary follows: bounds memory
BATCH_LENGTH = 1 << 18  # encoded by a thread at a time: bounds memory, and outweighs the cost of a hand-over
BOUNDARY = re.compile(r"(?<=\S)[ \t\n\r]")  # white space to Python and to the tokenizer's pattern alike


# ---------------------------------------------------------------------------------------------------------------------
# The documents of a split


def documents_of_split(source: Source, split: str, config: DataConfig) -> Iterator[Parts]:
    """The documents of a split; `all` is the three splits together.

    If the source has no validation split, a part of the training split is used: a random sample of the documents, or,
    if there are few, the end of each document.
    """
    if split == "all":
        for documents in filter(None, (source.train, source.validation, source.test)):
            yield from (document.parts() for document in documents)
    elif source.validation is not None or split == "test":
        own: Documents | None = getattr(source, split)
        yield from (document.parts() for document in own or ())
    else:
        fraction, is_validation = config.validation_fraction, split == "validation"
        sample = validation_sample(len(source.train), fraction)
        for number, document in enumerate(source.train):
            if sample is None:
                yield document.parts(1 - fraction, 1) if is_validation else document.parts(0, 1 - fraction)
            elif (number in sample) == is_validation:
                yield document.parts()


def cuts_documents(source: Source, config: DataConfig) -> bool:
    """Whether the end of each document is used for validation."""
    return source.validation is None and validation_sample(len(source.train), config.validation_fraction) is None


def validation_sample(count: int, fraction: float) -> set[int] | None:
    """The numbers of the documents used for validation, drawn with a fixed seed; None if they would be too few."""
    size = round(count * fraction)
    if size < MIN_VALIDATION_DOCUMENTS:
        return None
    return set(np.random.default_rng(0).permutation(count)[:size].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing


def write_tokens(
    documents: Iterable[Parts],
    tokenizer: GPT2Tokenizer,
    path: Path,
    description: str,
    threads: int = 1,
    digest: "hashlib._Hash | None" = None,
) -> int:
    """Write the tokens of documents to a file, `<|endoftext|>` after each, and return their number.

    Blank documents are left out. `digest` is updated with the content of the file.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.eos_token_id])
    tokenizer.encode_batch([])  # builds its encoder once, not in each thread
    words = [token["content"] for token in tokenizer.added] if tokenizer.added_words else []

    def encode(batch: list[tuple[str, bool]]) -> np.ndarray:
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        arrays = ((ids, end_of_text) if is_last else (ids,) for ids, (_, is_last) in zip(encoded, batch, strict=True))
        return np.concatenate([*chain.from_iterable(arrays)], dtype=dtype, casting="unsafe")

    total = 0
    with path.open("wb") as file, track(description, unit="tokens") as advance:
        for tokens in map_in_threads(encode, batched(documents, words), threads):
            file.write(tokens.data)
            if digest is not None:
                digest.update(tokens.data)
            total += len(tokens)
            advance(total)
    return total


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type that holds the vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def batched(documents: Iterable[Parts], words: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """Batches of about BATCH_LENGTH characters of the pieces of all documents that are not blank."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in chain.from_iterable(split_into_pieces(document, words) for document in without_blanks(documents)):
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_LENGTH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def without_blanks(documents: Iterable[Parts]) -> Iterator[Parts]:
    """The documents that are not blank, each read no further than to its first character that is not a space."""
    for document in documents:
        parts, seen = iter(document), []
        for part in parts:
            seen.append(part)
            if part.strip():
                yield chain(seen, parts)
                break


def split_into_pieces(document: Parts, words: Sequence[str] = ()) -> Iterator[tuple[str, bool]]:
    """Pieces of about PIECE_LENGTH characters that together are the document, each with whether it is the last.

    Pieces begin at white space after another character. GPT-2's pattern always separates tokens there, so the pieces
    have the tokens of the whole. Only where MAX_PIECE_LENGTH characters contain no such place is the text cut anywhere.

    Args:
        words: Those that were added to the tokenizer: no piece begins within one or, at white space, next to one.
    """
    rest = ""
    for part in document:
        rest += part
        start = 0
        while end := _end_of_piece(rest, start, words):
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    yield rest, True


def _end_of_piece(text: str, start: int, words: Sequence[str]) -> int | None:
    """The end of the piece that begins at `start`; None if that depends on what follows the text."""
    longest, last = max(map(len, words), default=0), start + MAX_PIECE_LENGTH
    for boundary in BOUNDARY.finditer(text, start + PIECE_LENGTH, min(last, len(text) - longest)):
        if not _meets(text, boundary.start(), words, margin=1):
            return boundary.start()
    if len(text) < last + longest:
        return None
    return next((place for place in range(last, last - longest, -1) if not _meets(text, place, words)), last)


def _meets(text: str, place: int, words: Sequence[str], margin: int = 0) -> bool:
    """Whether a place in a text is within one of the words, or, with a margin, at its beginning or end."""
    reaches = ((word, len(word) - 1 + margin) for word in words)
    return any(text.find(word, max(0, place - reach), place + reach) >= 0 for word, reach in reaches)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Like `ThreadPoolExecutor.map`, but takes only a few items before their results are consumed."""
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption waits for what is running only


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@dataclass
class PreparedData:
    """A tokenized corpus on disk: `train.bin`, `validation.bin`, `test.bin`, `tokenizer.json` and `about.json`."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """What determines it, `tokens` of each split, their `dtype`, `sha256` of each file, and its fingerprint.

        The fingerprint is that of the files: other tokens, or another tokenizer, have another one.

        Raises:
            OSError, ValueError: It cannot be read, or is damaged.
        """
        try:
            about = json.loads((self.folder / ABOUT).read_bytes())
            is_intact = about.pop("checksum") == _sum_of(about)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_intact = False
        if not is_intact:
            raise ValueError(f"wrong checksum of {ABOUT}")
        if about["key"] != self.folder.name:
            raise ValueError("it is another corpus")
        return about

    def damage(self) -> str | None:
        """What is wrong with the files; None if they have their checksums."""
        try:
            return damaged_file(self.folder, self.about["sha256"])
        except OSError as error:
            return f"{ABOUT}: {error.strerror}"
        except ValueError as error:
            return str(error)

    @cached_property
    def tokenizer(self) -> GPT2Tokenizer:
        return GPT2Tokenizer.from_json((self.folder / TOKENIZER).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        about = self.about
        sizes = [f"{split} {tokens:,} tokens" for split, tokens in about["tokens"].items() if tokens]
        return f"{', '.join(sizes)}, vocabulary of {about['vocab_size']:,}"


def _sum_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(config: DataConfig, only: str | None = None) -> PreparedData:
    """The tokenized corpus, from the cache if it is there. Of several concurrent processes one tokenizes it.

    Args:
        only: Prepare this split alone, or `all`, the three splits in one file. `test` becomes `validation` if the
            source has no test split.

    Raises:
        UserError: The source cannot be reached, read or tokenized, or a split has no text.
    """
    # Both are read by `tokenizers`. Without the second, forked data workers make it print a warning.
    os.environ.setdefault("RAYON_NUM_THREADS", str(config.preprocessing_num_workers))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    source = open_source(config)
    tokenizer = None if config.tokenizer == "train" else open_tokenizer(config.tokenizer)
    splits = SPLITS if only is None else ("validation" if only == "test" and source.test is None else only,)
    identity: dict[str, Any] = {
        "format": FORMAT,
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint if tokenizer else {"train": config.vocab_size},
        "validation_fraction": config.validation_fraction if source.validation is None else None,
    }
    if only is not None:
        identity["splits"] = splits
    if source.length_unit and cuts_documents(source, config):
        identity["cut"] = source.length_unit

    identity["key"] = _sum_of(identity)[:16]
    prepared = PreparedData(cache_folder(config) / "tokens" / identity["key"])
    prepared.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(prepared.folder.with_suffix(".lock")):
        if os.path.lexists(prepared.folder):
            problem = prepared.damage()
            if problem is None:
                log.info("Data: %s, from the cache %s", prepared, prepared.folder)
                return prepared
            log.warning("data: the cache %s is damaged (%s), the corpus is tokenized again", prepared.folder, problem)
            remove(prepared.folder)
        with atomic_folder(prepared.folder) as folder:
            write_corpus(folder, source, tokenizer, config, splits, identity)
        prepared = PreparedData(prepared.folder)
    log.info("Data: %s, cached in %s", prepared, prepared.folder)
    return prepared


def write_corpus(
    folder: Path,
    source: Source,
    tokenizer: GPT2Tokenizer | None,
    config: DataConfig,
    splits: tuple[str, ...],
    identity: dict[str, Any],
) -> None:
    """Tokenize the splits into files of a folder, with a tokenizer that is learned if it is None.

    Raises:
        UserError: A split has no text.
    """
    if tokenizer is None:
        tokenizer = _train_tokenizer(source, config)
    description = tokenizer.to_json().encode()
    (folder / TOKENIZER).write_bytes(description)
    digests, tokens = {TOKENIZER: hashlib.sha256(description)}, {}
    for split in splits:
        documents, path = documents_of_split(source, split, config), folder / f"{split}.bin"
        digest = digests[path.name] = hashlib.sha256()
        threads = config.preprocessing_num_workers
        tokens[split] = write_tokens(documents, tokenizer, path, f"Tokenizing {split}", threads, digest)
        if not tokens[split] and (split != "test" or len(splits) == 1):  # otherwise validation replaces an empty test
            raise UserError(f"data: there is no text in the {split} split")
    sums = {name: digest.hexdigest() for name, digest in digests.items()}
    about = {
        **identity,
        "fingerprint": _sum_of(sums)[:16],
        "tokens": tokens,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "sha256": sums,
    }
    (folder / ABOUT).write_text(json.dumps({**about, "checksum": _sum_of(about)}, indent=1))


def _train_tokenizer(source: Source, config: DataConfig) -> GPT2Tokenizer:
    total = 0

    def texts() -> Iterator[str]:
        nonlocal total
        for document in documents_of_split(source, "train", config):
            for text, _ in split_into_pieces(document):
                total += len(text)
                yield text

    with track("Training the tokenizer", unit="characters") as advance:
        tokenizer = interruptibly(lambda: GPT2Tokenizer.train(texts(), config.vocab_size), lambda: advance(total))
        advance(total)
    return tokenizer
