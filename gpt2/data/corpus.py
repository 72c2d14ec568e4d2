"""Tokenize a corpus and cache it on disk.

The tokens of all documents of a split are concatenated in one file, with `<|endoftext|>` after each document. The
folder of the files is named by a hash of everything that determines their contents.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from gpt2.checkpoint.pretrained import open_tokenizer
from gpt2.config import DataConfig
from gpt2.data.documents import BYTES_PER_TOKEN, Documents, Source, cache_folder
from gpt2.data.sources import open_source
from gpt2.data.token_files import DTYPE, TokenFile, check_vocabulary, count_tokens, split_end
from gpt2.data.token_writer import (
    TOKENS_PER_COMMIT,
    Parts,
    Written,
    batched,
    split_into_pieces,
    token_dtype,
    write_tokens,
)
from gpt2.errors import UserError
from gpt2.runtime.console import track
from gpt2.runtime.files import atomic_write, damaged_file, in_bytes, remove, rename_to_disk, require_free_space
from gpt2.runtime.signals import interruptibly
from gpt2.tokenizer import GPT2Tokenizer

log = logging.getLogger(__name__)

FORMAT = 3  # version of the cached files; a new number invalidates every cached corpus
ABOUT, TOKENIZER, PROGRESS = "about.json", "tokenizer.json", "progress.json"
SPLITS: tuple[str, ...] = ("train", "validation", "test")
MIN_VALIDATION_FILES = 5  # fewer whole files are too small a sample of the corpus


# ---------------------------------------------------------------------------------------------------------------------
# The documents of a split


def documents_of_split(source: Source, split: str, config: DataConfig) -> Iterator[Parts]:
    """Yield the documents of a split; `all` is the three splits together.

    If the source has no validation split, a part of the training split is used: a random sample of the documents, or
    the end of each document if there are too few to sample.
    """
    if split == "all":
        for documents in filter(None, (source.train, source.validation, source.test)):
            yield from (document.parts() for document in documents)
    elif source.validation is not None or split == "test":
        own: Documents | None = getattr(source, split)
        yield from (document.parts() for document in own or ())
    else:
        fraction, is_validation = config.validation_fraction, split == "validation"
        sample = validation_sample(source, fraction)
        for number, document in enumerate(source.train):
            if sample is None:
                yield document.parts(1 - fraction, 1) if is_validation else document.parts(0, 1 - fraction)
            elif (number in sample) == is_validation:
                yield document.parts()


def validation_sample(source: Source, fraction: float) -> set[int] | None:
    """Sample the numbers of the documents for validation, with a fixed seed; None if there are too few documents.

    Of records, a sample of one suffices: if records were cut, the model would learn to end texts where they do not end.
    """
    size = round(source.count * fraction)
    if size < (1 if source.holds_records else MIN_VALIDATION_FILES):
        return None
    return set(np.random.default_rng(0).permutation(source.count)[:size].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@dataclass
class PreparedData:
    """A tokenized corpus on disk: `train.bin`, `validation.bin`, `test.bin`, `tokenizer.json` and `about.json`.

    Attributes:
        in_place: The token files of each split, if another program wrote them; the folder then holds no `.bin` files.
    """

    folder: Path
    in_place: dict[str, list[TokenFile]] = field(default_factory=dict)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The content of `about.json`: what determines the corpus, `tokens` of each split, `sha256` of each file, ...

        Its `fingerprint` is a hash of these checksums, so it changes with the tokens and the tokenizer.

        Raises:
            OSError, ValueError: The file cannot be read, or is damaged.
        """
        about = _read_checked(self.folder / ABOUT)
        if about["key"] != self.folder.name:
            raise ValueError("it is another corpus")
        return about

    def damage(self) -> str | None:
        """Say what is wrong with the files of the folder; None if they are intact."""
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


def _with_checksum(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "checksum": _sum_of(values)}


def _read_checked(path: Path) -> dict[str, Any]:
    """Read the values of a JSON file that `_with_checksum` made, and verify them.

    Raises:
        OSError, ValueError: The file cannot be read, or is damaged.
    """
    try:
        values = json.loads(path.read_bytes())
        is_intact = values.pop("checksum") == _sum_of(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_intact = False
    if not is_intact:
        raise ValueError(f"wrong checksum of {path.name}")
    return values


def prepare(config: DataConfig, only: str | None = None) -> PreparedData:
    """Return the tokenized corpus, from the cache if possible. Of several concurrent processes, one tokenizes it.

    Args:
        only: The only split to prepare, or `all` for the three splits in one file. `test` becomes `validation` if the
            source has no test split.

    Raises:
        UserError: The source cannot be reached, read or tokenized, or a split has no text.
    """
    # `tokenizers` reads both. Without the second, it prints a warning when data workers are forked.
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
    identity["key"] = _sum_of(identity)[:16]
    in_place = files_in_place(source, splits, config)
    prepared = PreparedData(cache_folder(config) / "tokens" / identity["key"], in_place)
    unfinished = prepared.folder.with_suffix(".unfinished")
    prepared.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(prepared.folder.with_suffix(".lock")):
        if os.path.lexists(prepared.folder):
            problem = prepared.damage()
            if problem is None:
                log.info("Data: %s, from %s", prepared, "its files" if in_place else f"the cache {prepared.folder}")
                return prepared
            log.warning("data: the cache %s is damaged (%s), the corpus is tokenized again", prepared.folder, problem)
            remove(prepared.folder)
        if source.text_bytes and only in (None, "all"):
            require_space(source, tokenizer, config, unfinished)
        with finished_corpus(unfinished, prepared.folder):
            write_corpus(unfinished, source, tokenizer, config, splits, identity, in_place)
        prepared = PreparedData(prepared.folder, in_place)
    log.info("Data: %s, %s", prepared, "read in place" if in_place else f"cached in {prepared.folder}")
    return prepared


def files_in_place(source: Source, splits: tuple[str, ...], config: DataConfig) -> dict[str, list[TokenFile]]:
    """The token files of each split, if the source has any. The end of `train` replaces a missing `validation`."""
    if source.token_files is None:
        return {}
    files = {**source.token_files, "all": [*chain.from_iterable(source.token_files.values())]}
    if source.validation is None:
        files["train"], files["validation"] = split_end(files["train"], config.validation_fraction)
    return {split: files[split] for split in splits}


@contextmanager
def finished_corpus(unfinished: Path, folder: Path) -> Iterator[None]:
    """Create the folder `unfinished`, in which the block writes a corpus, and rename it to `folder` at the end.

    If the block raises after a commit, the folder stays, and the next preparation of the corpus continues there. If the
    text has a mistake, the folder is removed, because the corrected text is another corpus.
    """
    if not unfinished.is_dir():
        remove(unfinished)
    unfinished.mkdir(exist_ok=True)
    try:
        yield
        rename_to_disk(unfinished, folder)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(folder)  # the error of a failed write names no file
        is_mistake = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
        if is_mistake or not (unfinished / PROGRESS).exists():
            remove(unfinished)
        else:
            log.info("Data: the tokens so far stay in %s, the same command continues from there.", unfinished)
        raise


def require_space(source: Source, tokenizer: GPT2Tokenizer | None, config: DataConfig, folder: Path) -> None:
    """Check that the disk has space for the tokens of a text. Their number is estimated from the beginning of the text.

    Raises:
        UserError: There is less free space.
    """
    tokens_per_byte = 1 / BYTES_PER_TOKEN
    if tokenizer:
        first = [text for text, _ in next(batched((document.parts() for document in source.train), []), [])]
        tokens = len(first) + sum(map(len, tokenizer.encode_batch(first)))
        tokens_per_byte = tokens / max(1, len("".join(first).encode("utf-8", "replace")))
    vocab_size = tokenizer.vocab_size if tokenizer else config.vocab_size
    needed = int(source.text_bytes * tokens_per_byte) * token_dtype(vocab_size).itemsize
    written = sum(path.stat().st_size for path in folder.glob("*.bin"))
    require_free_space(folder, needed - written, f"tokenizing {in_bytes(source.text_bytes)} of text")


def write_corpus(
    folder: Path,
    source: Source,
    tokenizer: GPT2Tokenizer | None,
    config: DataConfig,
    splits: tuple[str, ...],
    identity: dict[str, Any],
    in_place: dict[str, list[TokenFile]] | None = None,
) -> None:
    """Tokenize the splits into files of a folder. Continue where an earlier call was interrupted.

    Args:
        tokenizer: None: train one on the text.
        in_place: The token files of each split, if they exist already.

    Raises:
        UserError: A split has no text, or a token is unknown.
    """
    if tokenizer is None:
        try:
            tokenizer = GPT2Tokenizer.from_json((folder / TOKENIZER).read_text(encoding="utf-8"))
        except (OSError, ValueError, UserError):
            tokenizer = _train_tokenizer(source, config)
    description = tokenizer.to_json().encode()
    (folder / TOKENIZER).write_bytes(description)
    sums, tokens = {TOKENIZER: hashlib.sha256(description).hexdigest()}, {}
    for split in splits:
        if in_place:
            check_vocabulary(in_place[split], tokenizer)
            tokens[split] = count_tokens(in_place[split])
        else:
            written = _write_split(folder, source, split, tokenizer, config)
            tokens[split], sums[f"{split}.bin"] = written.tokens, written.sha256
        if not tokens[split] and (split != "test" or len(splits) == 1):  # validation replaces an empty test split
            hint = "; the name of a token file decides its split" if in_place else ""
            raise UserError(f"data: there is no text in the {split} split{hint}")
    about = {
        **identity,
        "fingerprint": identity["key"] if in_place else _sum_of(sums)[:16],
        "tokens": tokens,
        "dtype": token_dtype(tokenizer.vocab_size).name if not in_place else DTYPE.name,
        "vocab_size": tokenizer.vocab_size,
        "sha256": sums,
    }
    (folder / ABOUT).write_text(json.dumps(_with_checksum(about), indent=1))
    (folder / PROGRESS).unlink(missing_ok=True)


def _write_split(folder: Path, source: Source, split: str, tokenizer: GPT2Tokenizer, config: DataConfig) -> Written:
    """Write the tokens of a split. Continue where an earlier call was interrupted."""
    try:
        progress = _read_checked(folder / PROGRESS)
    except (OSError, ValueError):
        progress = {}
    if progress.get("tokenizer") != tokenizer.fingerprint:
        progress = {"tokenizer": tokenizer.fingerprint}
    written, path = Written(**progress.get(split, {})), folder / f"{split}.bin"
    if written.is_complete and path.exists():
        return written
    if written.tokens:
        log.info("Data: continuing the %s split after its first %s tokens", split, f"{written.tokens:,}")

    def commit(now: Written) -> None:
        if now.tokens >= TOKENS_PER_COMMIT:
            with atomic_write(folder / PROGRESS) as file:
                file.write(json.dumps(_with_checksum({**progress, split: asdict(now)})).encode())

    documents, threads = documents_of_split(source, split, config), config.preprocessing_num_workers
    return write_tokens(documents, tokenizer, path, f"Tokenizing {split}", threads, written, commit)


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
    if tokenizer.vocab_size < config.vocab_size:
        wanted = f"data.vocab_size={config.vocab_size:,}"
        log.warning(f"Note: this text has only {tokenizer.vocab_size:,} tokens to learn, not {wanted}.")
    return tokenizer
