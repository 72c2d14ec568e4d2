"""Speed of tokenization, against the tokenizer of `transformers`, and of the training data loader."""

import logging
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from gpt2.benchmarks.common import Row, circumstances, from_to, headline, interleaved, spread, table, write_json
from gpt2.checkpoint.pretrained import open_tokenizer
from gpt2.config import DataBenchmark, DataConfig
from gpt2.data import corpus
from gpt2.data.sources import open_source
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer

PACKAGES = ("torch", "transformers", "tokenizers")


class Tokenization:
    """The training split as tokens: by `gpt2.data.corpus`, from files to a file, and by a call of `transformers`."""

    def __init__(self, config: DataConfig, folder: Path):
        self.config, self.folder = config, folder
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.source = open_source(config)
        tokenizer = None if config.tokenizer == "train" else open_tokenizer(config.tokenizer)
        self.first_seconds = self._prepare(tokenizer)  # trains the tokenizer, if there is none yet
        self.tokenizer = self._new_tokenizer()
        documents = ("".join(parts) for parts in corpus.documents_of_split(self.source, "train", config))
        self.documents = [document for document in documents if document.strip()]
        fast: Any = transformers.GPT2TokenizerFast  # type: ignore[attr-defined]  # a lazy attribute
        (folder / "theirs").mkdir()
        self.tokenizer.to_folder(str(folder / "theirs"), context_length=1024)
        # `<|endoftext|>` in a text is plain text to it, as to ours.
        self.theirs = fast.from_pretrained(folder / "theirs", split_special_tokens=True)
        self.their_ids: list[list[int]] = []
        self.transformers()  # fills its cache; that of ours is empty at the start of each preparation

    def _new_tokenizer(self) -> GPT2Tokenizer:
        return GPT2Tokenizer.from_json((self.folder / "tokenizer.json").read_text(encoding="utf-8"))

    def _prepare(self, tokenizer: GPT2Tokenizer | None) -> float:
        began = time.perf_counter()
        corpus.write_corpus(self.folder, self.source, tokenizer, self.config, ("train",), {})
        return time.perf_counter() - began

    def ours(self) -> float:
        """Seconds from files to a file of tokens: reading, encoding and writing."""
        return self._prepare(self._new_tokenizer())

    def transformers(self) -> float:
        """Seconds of the bare call: the documents are in memory, and nothing is written."""
        began = time.perf_counter()
        self.their_ids = self.theirs(self.documents, return_attention_mask=False, verbose=False)["input_ids"]
        return time.perf_counter() - began

    def tokens(self) -> np.ndarray:
        return np.fromfile(self.folder / "train.bin", dtype=corpus.token_dtype(self.tokenizer.vocab_size))

    def tokens_agree(self) -> bool:
        """Whether both give the same tokens, apart from the `<|endoftext|>` that only ours adds to each document."""
        end = self.tokenizer.eos_token_id
        theirs = np.concatenate([np.array([*ids, end], dtype=np.int64) for ids in self.their_ids])
        return bool(np.array_equal(theirs, self.tokens()))


def data(config: DataBenchmark) -> None:
    """Print both tables, and write everything that was measured to `config.json`."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("gpt2.runtime.console").setLevel(logging.WARNING)  # else a line a repetition
    about = circumstances(torch.device("cpu"), PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        tokenization = Tokenization(config.data, Path(name))
        record = _compare_tokenizers(tokenization, config.repetitions, headline(about, PACKAGES))
        record["loader"] = _measure_loader(config, Path(name), tokenization.tokenizer)
    write_json(config.json, {"benchmark": "data", "config": asdict(config), **about, **record})


def _compare_tokenizers(tokenization: Tokenization, repetitions: int, about: str) -> Row:
    characters, tokens = sum(map(len, tokenization.documents)), len(tokenization.tokens())
    print(
        f"{len(tokenization.documents):,} documents, {characters:,} characters, {tokens:,} tokens, vocabulary of "
        f"{tokenization.tokenizer.vocab_size:,}, medians of {repetitions}\n{about}",
        flush=True,
    )
    theirs, ours = interleaved([tokenization.transformers, tokenization.ours], repetitions, "Tokenizing")
    rows = [
        {
            "contestant": name,
            "tokens_per_second": tokens / median(each),
            "tokens_per_second_of_each": [tokens / second for second in each],
            **spread("seconds", each),
            "ratio": median(theirs) / median(each),
        }
        for name, each in (("transformers, bare call", theirs), ("gpt2, files to file", ours))
    ]
    speeds = [(f"{row['tokens_per_second']:,.0f}", from_to(row["tokens_per_second_of_each"])) for row in rows]
    cells = [
        (row["contestant"], *speed, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}")
        for row, speed in zip(rows, speeds, strict=True)
    ]
    agree = tokenization.tokens_agree()
    print(f"\n{table(('', 'tokens/s', 'from - to', 'seconds', 'ratio'), cells)}\n")
    print(f"the tokens are {'the same' if agree else 'NOT THE SAME'}; <|endoftext|>, which only ours writes, counts")
    return {
        "documents": len(tokenization.documents),
        "characters": characters,
        "tokens": tokens,
        "same_tokens": agree,
        "first_seconds": tokenization.first_seconds,
        "results": rows,
    }


def _measure_loader(config: DataBenchmark, folder: Path, tokenizer: GPT2Tokenizer) -> Row:
    length, batch_size = config.data.max_length, config.train.batch_size
    blocks = TokenDataset(folder / "train.bin", corpus.token_dtype(tokenizer.vocab_size).name, length)
    if len(blocks) <= batch_size:
        raise UserError(
            f"data: {len(blocks)} blocks of data.max_length={length} make fewer than two batches of "
            f"train.batch_size={batch_size}, too few to measure a loader"
        )
    loader, _, _ = get_dataloaders(blocks, blocks, blocks, config.train)
    count = min(config.batches, len(loader) - 1)

    def read() -> tuple[float, float]:
        """Seconds to the first batch, and per batch after it."""
        began = time.perf_counter()
        batches = iter(loader)
        next(batches)
        first = time.perf_counter()
        for _ in range(count):
            next(batches)
        return first - began, (time.perf_counter() - first) / max(1, count)

    (turns,) = interleaved([read], config.repetitions, "Loading")
    firsts, each = zip(*turns, strict=True)
    rate, first = 1 / median(each), median(firsts)
    print(
        f"\ntraining loader, batches of {batch_size} x {length} tokens, {loader.num_workers} workers: "
        f"{rate:,.0f} batches/s, {median(each) * 1e6:,.0f} microseconds a batch "
        f"({from_to([seconds * 1e6 for seconds in each])}), the first after {first * 1e3:,.0f} ms"
    )
    return {
        **spread("batch_seconds", each),
        "batches_per_second": rate,
        "first_batch_seconds": first,
        "batches": count,
        "workers": loader.num_workers,
        "batch": {"batch_size": batch_size, "max_length": length},
    }
