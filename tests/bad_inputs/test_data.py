"""Text that is missing, unreadable, too short or binary; paths that cannot be read or written; no network."""

import pytest

from tests.bad_inputs.harness import TRAIN, check, rows

FILES = [
    ("a missing file", "nowhere.txt", "data.files: no file matches 'nowhere.txt'"),
    ("an empty file", "empty.txt", "data: there is no text in the train split"),
    ("white space alone", "blank.txt", "data: there is no text in the train split"),
    ("a byte order mark alone", "mark_only.txt", "data: there is no text in the train split"),
    ("one token", "one_token.txt", "data: "),
    ("a folder", "folder", "data.files: ... folder"),
    ("a loop of links", "loop.txt", "data.files: ... loop.txt"),
    ("a dangling link", "dangling.txt", "data.files: ... dangling.txt"),
    ("a named pipe", "pipe.txt", "data.files: ... pipe.txt"),
    ("an endless device", "/dev/zero", "data.files: ... /dev/zero"),
    ("an empty device", "/dev/null", "data.files: ... /dev/null"),
    ("Latin-1", "not_utf8.txt", "data.files: ... not_utf8.txt is not UTF-8 at byte 1703; convert it or leave it out"),
    ("not UTF-8 at the beginning", "first_byte.txt", "data.files: ... first_byte.txt is not UTF-8 at byte 0"),
    ("not UTF-8 at the end", "last_byte.txt", "data.files: ... last_byte.txt is not UTF-8 at byte 1700"),
    ("UTF-16", "utf16.txt", "data.files: ... utf16.txt"),
    ("UTF-16 without a mark", "utf16_without_mark.txt", "data.files: ... utf16_without_mark.txt"),
    ("UTF-32", "utf32.txt", "data.files: ... utf32.txt"),
    ("NUL bytes", "nul.txt", "data.files: ... nul.txt"),
    ("a compressed file", "gzip.txt", "data.files: ... gzip.txt"),
    ("a parquet file", "parquet.txt", "data.files: ... parquet.txt"),
    ("a picture", "picture.txt", "data.files: ... picture.txt"),
    ("a file of tokens", "tokens.bin", "data.files: ... tokens.bin"),
    ("a pattern without a match", "'*.md'", "data.files: no file matches '*.md'"),
    ("a pattern that matches only folders", "'fold*'", "data.files: ... is a folder"),
    ("a path below a file", "corpus.txt/a.txt", "data.files: no file matches 'corpus.txt/a.txt'"),
    ("a name of 300 characters", "a" * 300, "data.files: no file matches 'aaa"),
    ("an empty name", "''", "data.files: no file matches ''"),
    ("a name with an escape sequence", "'esc*.txt'", "data.files: ... esc"),
]

OTHERS = [
    ("no files", "data.files=[]", "data.files: the list is empty"),
    ("all files excluded", "data.files=[corpus.txt] data.exclude=[corpus.txt]", "data.exclude"),
    ("a missing tokenizer", "data.files=[corpus.txt] data.tokenizer=nowhere", "data.tokenizer: 'nowhere'"),
    ("a folder without a tokenizer", "data.files=[corpus.txt] data.tokenizer=folder", "data.tokenizer: folder"),
    ("a tokenizer that is a text", "data.files=[corpus.txt] data.tokenizer=corpus.txt", "corpus.txt"),
    (
        "GPT-2's tokenizer without a network",
        "data.files=[corpus.txt] data.tokenizer=gpt2",
        "gpt2 ... without a network",
    ),
    (
        "a tokenizer on the Hub without a network",
        "data.files=[corpus.txt] data.tokenizer=a/b",
        "a/b ... without a network",
    ),
    ("a dataset without a network", "data=wikitext2 data.files=null", "'wikitext' ... without a network"),
    (
        "a missing folder",
        "data=wikitext2 data.files=null data.dataset_name=./nowhere",
        "data.dataset_name: there is no folder",
    ),
    ("a cache that is a file", "data.files=[corpus.txt] data.cache_dir=corpus.txt", "data.cache_dir: ... corpus.txt"),
    ("a cache in /proc", "data.files=[corpus.txt] data.cache_dir=/proc/a", "data.cache_dir: ... /proc/a"),
    ("an invalid regular expression", "data.files=[corpus.txt] 'data.document_start=\"[\"'", "data.document_start"),
    ("a vocabulary of another size", "data.files=[corpus.txt] model.vocab_size=300", "model.vocab_size: 300 is not"),
]


LIMITED = [
    (
        "a file that may not be read",
        f"user:{TRAIN} data.files=[unreadable.txt]",
        "data.files: cannot read ... unreadable",
    ),
    (
        "a cache that may not be written",
        f"user:{TRAIN} data.files=[corpus.txt] data.cache_dir=closed/a",
        "data.cache_dir",
    ),
    ("a full disk", f"full:{TRAIN} data.validation_fraction=0.2", "File too large: ... MB are free there", 1),
]


def training_on(table: list) -> list:
    return [(what, f"{TRAIN} {words}", *rest) for what, words, *rest in table]


@rows(training_on([(what, f'"data.files=[{name}]"', *rest) for what, name, *rest in FILES]))
def test_files(place, row):
    check(place, row)


@rows(training_on(OTHERS))
def test_paths_and_settings(place, row):
    check(place, row)


@rows(LIMITED)
def test_limits(place, row):
    check(place, row)


DATASET = "data=wikitext2 data.files=null data.dataset_name=./dataset data.dataset_config=null data.document_start=null"


@pytest.mark.slow  # importing `datasets` takes two seconds each
@rows(
    training_on(
        [
            (
                "no such split",
                f"{DATASET} data.validation_split=null data.test_split=null data.train_split=nowhere",
                "data.dataset_name: ... nowhere",
            ),
            (
                "no such column",
                f"{DATASET} data.validation_split=null data.test_split=null",
                "data.text_column: 'text'",
            ),
            (
                "a column of numbers",
                f"{DATASET} data.validation_split=null data.test_split=null data.text_column=number",
                "data.text_column: 'number' holds int64, not text",
            ),
        ]
    )
)
def test_datasets(place, row):
    check(place, row)
