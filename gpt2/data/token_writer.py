"""Tokenize documents into one file: pieces of bounded length, encoded in threads, committed at intervals.

The tokens of all documents are concatenated, with `<|endoftext|>` after each document.
"""

import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from gpt2.runtime.console import track
from gpt2.runtime.files import sha256_of_next
from gpt2.tokenizer import END_OF_TEXT, GPT2Tokenizer

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Parts = Iterable[str]  # a document: its text, in parts

# Lengths in characters.
PIECE_LENGTH = 1 << 16  # length of an encoded string: the tokenizer slows down on longer ones
MAX_PIECE_LENGTH = 1 << 20  # length of a string without a boundary: bounds memory
BATCH_LENGTH = 1 << 18  # total length of the strings in a task of a thread: bounds memory, amortizes the overhead
BOUNDARY = re.compile(r"(?<=\S)[ \t\n\r]")  # white space both to Python and to the tokenizer's pattern

TOKENS_PER_COMMIT = 1 << 24  # a kill loses at most this many tokens: a few seconds of work


@dataclass(frozen=True)
class Written:
    """The part of a token file that is safely on disk: the tokens of the first `pieces` of its split."""

    pieces: int = 0
    tokens: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    is_complete: bool = False


def write_tokens(
    documents: Iterable[Parts],
    tokenizer: GPT2Tokenizer,
    path: Path,
    description: str,
    threads: int = 1,
    written: Written = Written(),
    commit: Callable[[Written], object] = lambda _: None,
) -> Written:
    """Write the tokens of documents to a file, with `<|endoftext|>` after each document.

    Blank documents are left out. The tokens do not depend on where an earlier, interrupted call stopped.

    Args:
        written: The last argument of `commit` in an interrupted call; the file is continued from there.
        commit: Called with the state on disk, after every TOKENS_PER_COMMIT tokens and at the end.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    end_of_text = np.array([tokenizer.eos_token_id])
    tokenizer.encode_batch([])  # creates the encoder once, not in each thread
    words = [token["content"] for token in tokenizer.added] if tokenizer.added_words else []
    contains_end = False

    def encode(batch: list[tuple[str, bool]]) -> tuple[int, np.ndarray]:
        nonlocal contains_end
        contains_end = contains_end or any(END_OF_TEXT in text for text, _ in batch)
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        arrays = ((ids, end_of_text) if is_last else (ids,) for ids, (_, is_last) in zip(encoded, batch, strict=True))
        return len(batch), np.concatenate([*chain.from_iterable(arrays)], dtype=dtype, casting="unsafe")

    with path.open("r+b" if path.exists() else "w+b") as file, track(description, unit="tokens") as advance:
        digest = sha256_of_next(file, written.tokens * dtype.itemsize)
        if digest.hexdigest() != written.sha256:
            log.warning("data: %s is damaged, it is written again", path)
            digest, written = hashlib.sha256(), Written()
            file.seek(0)
        file.truncate()
        pieces = total = committed = 0

        def state(is_complete: bool = False) -> Written:
            file.flush()
            os.fsync(file.fileno())
            return Written(written.pieces + pieces, written.tokens + total, digest.hexdigest(), is_complete)

        for count, tokens in map_in_threads(encode, batched(documents, words, written.pieces), threads):
            file.write(tokens.data)
            digest.update(tokens.data)
            pieces, total = pieces + count, total + len(tokens)
            advance(total)
            if total - committed >= TOKENS_PER_COMMIT:
                committed = total
                commit(state())
        commit(result := state(is_complete=True))
    if contains_end:
        log.warning(
            f"Note: the text contains {END_OF_TEXT}, which is encoded as ordinary characters. To separate documents by "
            "that token, make them records of a .jsonl file."
        )
    return result


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type that holds the vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def batched(documents: Iterable[Parts], words: Sequence[str], skip: int = 0) -> Iterator[list[tuple[str, bool]]]:
    """The pieces of documents, without blank documents and the first `skip` pieces, in batches of BATCH_LENGTH."""
    batch: list[tuple[str, bool]] = []
    size = 0
    pieces = chain.from_iterable(split_into_pieces(document, words) for document in without_blanks(documents))
    for piece in islice(pieces, skip, None):
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_LENGTH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def without_blanks(documents: Iterable[Parts]) -> Iterator[Parts]:
    """Yield the documents that are not blank. Here, each is read only up to its first part with text."""
    for document in documents:
        parts, seen = iter(document), []
        for part in parts:
            seen.append(part)
            if part.strip():
                yield chain(seen, parts)
                break


def split_into_pieces(document: Parts, words: Sequence[str] = ()) -> Iterator[tuple[str, bool]]:
    """Divide a document into pieces of about PIECE_LENGTH characters, and yield each with whether it is the last.

    Pieces begin at white space after another character. GPT-2's pattern always separates tokens there, so the tokens
    are those of the whole document. A text without such a place is cut anywhere after MAX_PIECE_LENGTH characters.

    Args:
        words: Words that were added to the tokenizer. No piece begins within one or, at white space, next to one.
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
    """Return the end of the piece that begins at `start`; None if it depends on text that is not read yet."""
    longest, last = max(map(len, words), default=0), start + MAX_PIECE_LENGTH
    for boundary in BOUNDARY.finditer(text, start + PIECE_LENGTH, min(last, len(text) - longest)):
        if not _is_in_word(text, boundary.start(), words, margin=1):
            return boundary.start()
    if len(text) < last + longest:
        return None
    return next((place for place in range(last, last - longest, -1) if not _is_in_word(text, place, words)), last)


def _is_in_word(text: str, place: int, words: Sequence[str], margin: int = 0) -> bool:
    """Whether a place in a text is within one of the words or, with a margin of 1, at its beginning or end."""
    reaches = ((word, len(word) - 1 + margin) for word in words)
    return any(text.find(word, max(0, place - reach), place + reach) >= 0 for word, reach in reaches)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Like `ThreadPoolExecutor.map`, but takes only a few items ahead of the results that are consumed."""
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
        pool.shutdown(cancel_futures=True)  # an interruption waits only for the items that are being worked on
