"""How fast text becomes tokens, against the tokenizer of `transformers`, and how fast tokens become batches."""

import logging
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from gpt2.benchmarks.common import Row, circumstances, from_to, headline, interleaved, spread, table, write_json
from gpt2.checkpoint.pretrained import open_tokenizer
from gpt2.config import DataBenchmark
from gpt2.data import corpus
from gpt2.data.sources import dataset_source, text_source
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer

TRAIN = ("train",)  # the split that is measured
PACKAGES = ("torch", "transformers", "tokenizers")


class Preparation:
    """The training split into tokens: by what `gpt2.data.corpus.prepare` does, and by a bare call of `transformers`."""

    def __init__(self, config: DataBenchmark, folder: Path):
        self.config, self.folder = config.data, folder
        data = config.data
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.source = text_source(data) if data.files is not None else dataset_source(data)
        tokenizer = None if data.tokenizer == "train" else open_tokenizer(data.tokenizer)
        self.first_seconds = self._fill(tokenizer)  # which makes the tokenizer, if there is none yet
        self.tokenizer = self._fresh()
        whole = ("".join(document) for document in corpus.documents_of_split(self.source, "train", data))
        self.documents = [document for document in whole if document.strip()]
        self.theirs = self._twin()
        self.their_ids: list[list[int]] = []
        self.bare()  # their caches fill; ours begin empty each time, as in a preparation

    def _twin(self) -> Any:
        """Their tokenizer of the same vocabulary. `<|endoftext|>` in a text is no token of its own to it either."""
        with tempfile.TemporaryDirectory() as name:
            self.tokenizer.to_folder(name, context_length=1024)
            fast: Any = transformers.GPT2TokenizerFast  # type: ignore[attr-defined]  # made when asked for
            return fast.from_pretrained(name, split_special_tokens=True)

    def _fresh(self) -> GPT2Tokenizer:
        return GPT2Tokenizer.from_json((self.folder / "tokenizer.json").read_text(encoding="utf-8"))

    def _fill(self, tokenizer: GPT2Tokenizer | None) -> float:
        began = time.perf_counter()
        corpus._fill(self.folder, self.source, tokenizer, self.config, TRAIN, {})
        return time.perf_counter() - began

    def ours(self) -> float:
        """Seconds from files to a file of tokens: reading, encoding and writing."""
        return self._fill(self._fresh())

    def bare(self) -> float:
        """Seconds of the bare call, the documents in memory already and nothing written."""
        began = time.perf_counter()
        self.their_ids = self.theirs(self.documents, return_attention_mask=False, verbose=False)["input_ids"]
        return time.perf_counter() - began

    def tokens(self) -> np.ndarray:
        return np.fromfile(self.folder / "train.bin", dtype=corpus.token_dtype(self.tokenizer.vocab_size))

    def are_same(self) -> bool:
        """Whether both made the same tokens; that each document ends with `<|endoftext|>` is ours."""
        end = self.tokenizer.eos_token_id
        theirs = np.concatenate([np.array([*ids, end], dtype=np.int64) for ids in self.their_ids])
        return bool(np.array_equal(theirs, self.tokens()))


def batches_a_turn(blocks: TokenDataset, config: DataBenchmark) -> Row:
    """Seconds to the first batch of the training loader, and a batch after it."""
    loader, _, _ = get_dataloaders(blocks, blocks, blocks, config.train)
    began = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first, count = time.perf_counter() - began, min(config.batches, len(loader) - 1)
    began = time.perf_counter()
    for _ in range(count):
        next(iterator)
    seconds = (time.perf_counter() - began) / max(1, count)
    return {"first": first, "batch": seconds, "batches": count, "workers": loader.num_workers}


def data(config: DataBenchmark) -> None:
    """Print both tables, and write it all to `config.json`."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("gpt2.runtime.console").setLevel(logging.WARNING)  # a line a repetition
    with tempfile.TemporaryDirectory() as name:
        preparation = Preparation(config, Path(name))
        found = circumstances(torch.device("cpu"), PACKAGES)
        characters, tokens = sum(map(len, preparation.documents)), len(preparation.tokens())
        print(
            f"{len(preparation.documents):,} documents, {characters:,} characters, {tokens:,} tokens, vocabulary of "
            f"{preparation.tokenizer.vocab_size:,}, medians of {config.repetitions}\n{headline(found, PACKAGES)}",
            flush=True,
        )
        seconds = interleaved([preparation.bare, preparation.ours], config.repetitions, "Preparing")
        rows = [
            {
                "contestant": who,
                "tokens_per_second": tokens / median(each),
                "tokens_per_second_of_each": [tokens / second for second in each],
                **spread("seconds", each),
                "ratio": median(seconds[0]) / median(each),
            }
            for who, each in zip(("transformers, bare call", "gpt2, files to file"), seconds, strict=True)
        ]
        same = preparation.are_same()
        cells = [
            (
                row["contestant"],
                f"{row['tokens_per_second']:,.0f}",
                from_to(row["tokens_per_second_of_each"]),
                f"{row['seconds']:.3f}",
                f"{row['ratio']:.2f}",
            )
            for row in rows
        ]
        print(f"\n{table(('', 'tokens/s', 'from - to', 'seconds', 'ratio'), cells)}\n")
        print(f"the tokens are {'the same' if same else 'NOT THE SAME'}; <|endoftext|>, which only ours writes, counts")
        loading = _loading(config, Path(name), preparation.tokenizer)
    found |= {"documents": len(preparation.documents), "characters": characters, "tokens": tokens, "same_tokens": same}
    found |= {"first_seconds": preparation.first_seconds, "results": rows, "loader": loading}
    write_json(config, "data", found)


def _loading(config: DataBenchmark, folder: Path, tokenizer: GPT2Tokenizer) -> Row:
    length, train = config.data.max_length, config.train
    blocks = TokenDataset(folder / "train.bin", corpus.token_dtype(tokenizer.vocab_size).name, length)
    if len(blocks) <= train.batch_size:
        raise UserError(
            f"data: its {len(blocks)} blocks of data.max_length={length} are less than two batches of "
            f"train.batch_size={train.batch_size}, of which the speed of a loader could be told"
        )
    (turns,) = interleaved([partial(batches_a_turn, blocks, config)], config.repetitions, "Loading")
    each = [turn["batch"] for turn in turns]
    loading = {
        **spread("batch_seconds", each),
        "batches_per_second": 1 / median(each),
        "first_batch_seconds": median(turn["first"] for turn in turns),
        "batches": turns[0]["batches"],
        "workers": turns[0]["workers"],
        "batch": {"batch_size": train.batch_size, "max_length": length},
    }
    print(
        f"\ntraining loader, batches of {train.batch_size} x {length} tokens, {loading['workers']} workers: "
        f"{loading['batches_per_second']:,.0f} batches/s, {loading['batch_seconds'] * 1e6:,.0f} microseconds a batch "
        f"({from_to([seconds * 1e6 for seconds in each])}), the first after "
        f"{loading['first_batch_seconds'] * 1e3:,.0f} ms"
    )
    return loading
