"""Compare the speed of tokenization with the tokenizer of `transformers`.

Run: python -m gpt2.main benchmark data [repetitions=5] [json=data.json] [OVERRIDES of `data`]
"""

import argparse
import os
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers

from gpt2.analysis.tables import from_to, table
from gpt2.benchmarks.common import circumstances, headline, interleaved, spread, write_json
from gpt2.checkpoint.pretrained import open_tokenizer
from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose
from gpt2.cli.error_lines import errors_as_lines
from gpt2.data import corpus
from gpt2.data.sources import open_source
from gpt2.data.token_writer import token_dtype
from gpt2.runtime.files import writable_file
from gpt2.tokenizer import GPT2Tokenizer

COLUMNS = {
    "": lambda row: row["contestant"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "MB/s": lambda row: f"{row['megabytes_per_second']:.1f}",
    "seconds": lambda row: f"{row['seconds']:.3f}",
    "from - to": lambda row: from_to(row["seconds_of_each"], 3),
    "ratio": lambda row: f"{row['ratio']:.2f}",
}


class Tokenization:
    """Tokenizes the training split with `gpt2.data.corpus`, from files to a file, and with a call of `transformers`."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        self.source = open_source(config)
        self._write(None if config.tokenizer == "train" else open_tokenizer(config.tokenizer))
        self.tokenizer = self._new_tokenizer()
        documents = ("".join(parts) for parts in corpus.documents_of_split(self.source, "train", config))
        self.documents = [document for document in documents if document.strip()]
        (folder / "theirs").mkdir()
        self.tokenizer.to_folder(str(folder / "theirs"), context_length=1024)
        # Both tokenizers treat `<|endoftext|>` in a text as plain text.
        self.theirs = transformers.GPT2TokenizerFast.from_pretrained(folder / "theirs", split_special_tokens=True)
        self.their_ids = []
        self.transformers()  # fills its cache; our cache is empty at the start of each preparation

    def _new_tokenizer(self):
        return GPT2Tokenizer.from_json((self.folder / "tokenizer.json").read_text(encoding="utf-8"))

    def _write(self, tokenizer, threads=1):
        config = replace(self.config, preprocessing_num_workers=threads)
        corpus.write_corpus(self.folder, self.source, tokenizer, config, ("train",), {})

    def ours(self, threads):
        """Return the seconds from files to a file of tokens: reading, encoding and writing."""
        began = time.perf_counter()
        self._write(self._new_tokenizer(), threads)
        return time.perf_counter() - began

    def transformers(self):
        """Return the seconds of one call: the documents are in memory, and nothing is written."""
        began = time.perf_counter()
        self.their_ids = self.theirs(self.documents, return_attention_mask=False, verbose=False)["input_ids"]
        return time.perf_counter() - began

    def tokens(self):
        return np.fromfile(self.folder / "train.bin", dtype=token_dtype(self.tokenizer.vocab_size))

    def tokens_agree(self):
        """Whether the tokens are equal, apart from the `<|endoftext|>` that only we add to each document."""
        end = self.tokenizer.eos_token_id
        theirs = np.concatenate([np.array([*ids, end], dtype=np.int64) for ids in self.their_ids])
        return bool(np.array_equal(theirs, self.tokens()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", help="such as data=text data.files=['books/*.txt'] data.tokenizer=bytes"
    )
    words = [word.partition("=") for word in parser.parse_args().overrides]
    options = {"repetitions": "5", "json": ""}
    options |= {key: value for key, _, value in words if key in options}
    if not options["repetitions"].isdecimal() or int(options["repetitions"]) < 1:
        parser.error(f"repetitions: {options['repetitions']} is not a whole number of at least 1")
    repetitions = int(options["repetitions"])
    overrides = ["".join(word) for word in words if word[0] not in options]
    with errors_as_lines():
        config = resolve("train", compose("train", ["data=stdlib", *overrides]), overrides).data
        if options["json"]:
            with writable_file(Path(options["json"]), "json"):
                pass  # checked before the measurements

    transformers.logging.set_verbosity_error()
    about = circumstances(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        tokenization = Tokenization(config, Path(folder))
        facts = {
            "documents": len(tokenization.documents),
            "characters": sum(map(len, tokenization.documents)),
            "bytes": sum(len(document.encode("utf-8", "replace")) for document in tokenization.documents),
            "tokens": len(tokenization.tokens()),
        }
        print(
            f"{', '.join(f'{count:,} {what}' for what, count in facts.items())}, vocabulary of "
            f"{tokenization.tokenizer.vocab_size:,}, medians of {repetitions}\n{headline(about)}",
            flush=True,
        )
        counts = sorted({1, config.preprocessing_num_workers})
        turns = [tokenization.transformers, *(partial(tokenization.ours, threads) for threads in counts)]
        seconds = interleaved(turns, repetitions, "Tokenizing")
        agree = tokenization.tokens_agree()

    names = ["transformers, bare call", *(f"gpt2, files to file, threads: {threads}" for threads in counts)]
    rows = [
        {
            "contestant": name,
            "tokens_per_second": facts["tokens"] / median(each),
            "megabytes_per_second": facts["bytes"] / median(each) / 1e6,
            **spread("seconds", each),
            "ratio": median(seconds[0]) / median(each),
        }
        for name, each in zip(names, seconds, strict=True)
    ]
    print(f"\n{table(rows, COLUMNS)}\n")
    print(f"the tokens are {'the same' if agree else 'NOT THE SAME'}, except for <|endoftext|>, which only gpt2 writes")
    record = {"benchmark": "data", "config": asdict(config), **about, **facts, "same_tokens": agree, "results": rows}
    write_json(options["json"] or None, record)


if __name__ == "__main__":
    main()
