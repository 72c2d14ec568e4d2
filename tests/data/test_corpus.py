"""Tokenized corpora: every document once, cached, and errors of a source reported in one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2.config import DataConfig
from gpt2.data import token_writer
from gpt2.data.corpus import PreparedData, prepare
from gpt2.data.token_writer import (
    MAX_PIECE_LENGTH,
    PIECE_LENGTH,
    map_in_threads,
    split_into_pieces,
    token_dtype,
    write_tokens,
)
from gpt2.data_loader import load_text_data
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer
from tests.helpers import ROOT, nasty_texts, python_source

EOS = 256  # of the bytes tokenizer


@pytest.fixture(scope="module")
def trained() -> GPT2Tokenizer:
    return GPT2Tokenizer.train([python_source(), *nasty_texts(300)], 1000)


def config_of(tmp_path: Path, **fields) -> DataConfig:
    """Text files as bytes, cached in the test's own folder."""
    defaults = {"files": [str(tmp_path / "*.txt")], "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**{**defaults, **fields})


def tokens_of(prepared: PreparedData, split: str) -> list[int]:
    return np.fromfile(prepared.folder / f"{split}.bin", dtype=prepared.about["dtype"]).tolist()


def documents_of(prepared: PreparedData, split: str) -> list[str]:
    """The documents of a split, tokenized as bytes; each must end with <|endoftext|>."""
    *documents, rest = "".join(chr(i) for i in tokens_of(prepared, split)).split(chr(EOS))
    assert rest == ""
    return [document.encode("latin-1").decode() for document in documents]


def with_end(text: str) -> list[int]:
    return [*text.encode(), EOS]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing


LONG = {
    "lines": str,
    "one line": lambda text: text.replace("\n", " "),
    "no space at all": lambda text: "".join(text.split()),
    "long runs of spaces": lambda text: text.replace(" ", " " * 10),
    "nasty": lambda _: "".join(nasty_texts(6000)),
}


@pytest.mark.parametrize("kind", LONG)
def test_pieces_have_the_tokens_of_the_whole_document(trained, kind):
    document = LONG[kind](python_source())
    parts = [text for text, _ in split_into_pieces([document])]
    assert "".join(parts) == document
    assert len(parts) > 1 or kind == "no space at all"
    assert len(document) > 2 * PIECE_LENGTH
    assert [i for part in parts for i in trained.encode(part)] == trained.encode(document)


def test_pieces_are_bounded_and_the_last_one_is_marked():
    parts = list(split_into_pieces([python_source()]))
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(text) for text, _ in parts) < PIECE_LENGTH + 100


@pytest.mark.parametrize("space", [chr(i) for i in range(0x10000) if chr(i).isspace()], ids=ascii)
def test_pieces_end_at_token_boundaries_for_every_white_space(monkeypatch, space):
    """Some characters are white space for Python but not for the tokenizer, so tokens can contain them."""
    monkeypatch.setattr(token_writer, "PIECE_LENGTH", 2)
    document = f"ab,{space},cd" * 5
    tokenizer = GPT2Tokenizer.train([document] * 10, 400)
    assert [i for text, _ in split_into_pieces([document]) for i in tokenizer.encode(text)] == tokenizer.encode(
        document
    )


@pytest.mark.parametrize("size", [1, 7, 100, PIECE_LENGTH])
def test_pieces_do_not_depend_on_how_the_document_is_read(monkeypatch, size):
    monkeypatch.setattr(token_writer, "PIECE_LENGTH", 50)
    monkeypatch.setattr(token_writer, "MAX_PIECE_LENGTH", 200)
    document = python_source()[:20_000] + "a" * 1000 + " " * 1000 + "漢" * 300 + " the end"
    parts = [document[start : start + size] for start in range(0, len(document), size)]
    assert list(split_into_pieces(parts)) == list(split_into_pieces([document]))
    assert "".join(text for text, _ in split_into_pieces(parts)) == document


def test_text_without_boundaries_is_cut_at_the_maximum_length():
    document = "a" * MAX_PIECE_LENGTH + "b" * MAX_PIECE_LENGTH + "c d"
    assert [text for text, _ in split_into_pieces([document])] == [
        "a" * MAX_PIECE_LENGTH,
        "b" * MAX_PIECE_LENGTH,
        "c d",
    ]


def test_map_in_threads_keeps_order_and_takes_few_items_ahead():
    taken = []

    def numbers():
        for number in range(100):
            taken.append(number)
            yield number

    def square(number: int) -> int:
        time.sleep(0.002 if number % 2 else 0)
        return number**2

    results = map_in_threads(square, numbers(), 2)
    assert next(results) == 0
    assert len(taken) < 10
    assert list(results) == [number**2 for number in range(1, 100)]


def test_map_in_threads_raises_errors_of_the_function():
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda number: 1 // number, [2, 1, 0, 1], 2))


def test_map_in_threads_starts_nothing_after_an_interruption():
    begun = []
    results = map_in_threads(begun.append, range(100), 1)
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    before = len(begun)
    time.sleep(0.05)
    assert len(begun) == before < 10


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 100, 1 << 22])
def test_documents_are_written_in_order_with_end_of_text(tmp_path, monkeypatch, batch, threads):
    monkeypatch.setattr(token_writer, "BATCH_LENGTH", batch)  # characters in a batch
    documents = ["first", "", "zweites äöü", "x" * 300, "", " " * 99 + "y", python_source(), "\n"]
    in_parts = ([document[:50], document[50:]] for document in documents)
    total = write_tokens(in_parts, GPT2Tokenizer.of_bytes(), tmp_path / "tokens.bin", "test", threads).tokens
    packed = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16).tolist()
    assert packed == [i for document in documents if document.strip() for i in with_end(document)]
    assert total == len(packed)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (50257, "uint16"), (65536, "uint16"), (65537, "uint32"), (200_000, "uint32")],
)
def test_token_dtype_is_the_smallest_that_fits(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.array([vocab_size - 1]).astype(dtype)[0] == vocab_size - 1


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_files(folder: Path, count: int) -> list[str]:
    """Files of equal length with different numbers in them."""
    texts = [f"document {number:03} " + "words " * 20 for number in range(count)]
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return texts


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_end_of_a_single_file_is_for_validation(tmp_path, fraction):
    text = python_source()[:10_000]
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepared = prepare(config_of(tmp_path, validation_fraction=fraction))
    (train,), (validation,) = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert train + validation == text
    assert len(validation) == pytest.approx(fraction * len(text), abs=1)


def test_end_of_each_of_few_files_is_for_validation(tmp_path):
    texts = write_files(tmp_path, 20)
    prepared = prepare(config_of(tmp_path))
    parts = zip(documents_of(prepared, "train"), documents_of(prepared, "validation"), strict=True)
    assert [train + validation for train, validation in parts] == texts


@pytest.mark.parametrize(("count", "fraction"), [(60, 0.1), (60, 0.5), (11, 0.5)])
def test_whole_files_of_many_are_for_validation(tmp_path, count, fraction):
    texts = write_files(tmp_path, count)
    prepared = prepare(config_of(tmp_path, validation_fraction=fraction))
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert sorted([*train, *validation]) == texts
    assert len(validation) == round(fraction * count)
    assert train == sorted(train), "documents keep the order of their files"
    assert validation != texts[-len(validation) :], "a sample, not the end of the alphabet"


def write_records(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_whole_records_are_for_validation(tmp_path):
    texts = [f"{number:02}. The answer is forty-two." for number in range(20)]
    write_records(tmp_path / "a.jsonl", texts)
    prepared = prepare(config_of(tmp_path, files=[str(tmp_path / "a.jsonl")]))
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert len(validation) == 2
    assert sorted([*train, *validation]) == texts


def test_small_validation_split_is_noted(tmp_path, caplog):
    write_records(tmp_path / "a.jsonl", ["short"] * 60)
    (tmp_path / "long.txt").write_text("long " * 10_000)
    load_text_data(config_of(tmp_path, files=[str(tmp_path / "*.*")]))
    assert "the validation split has 0.071 % of the tokens, not data.validation_fraction=0.1" in caplog.text


@pytest.mark.parametrize(("text", "notes"), [("one<|endoftext|>two " * 99, 2), ("one two " * 99, 0)])
def test_spelled_end_of_text_is_noted(tmp_path, caplog, text, notes):
    (tmp_path / "a.txt").write_text(text)
    prepare(config_of(tmp_path))
    assert caplog.text.count("the text contains <|endoftext|>, which is encoded as ordinary characters") == notes


def test_files_for_validation_are_not_trained_on(tmp_path):
    texts = write_files(tmp_path, 4)
    (tmp_path / "other").mkdir()
    write_records(tmp_path / "other" / "a.jsonl", ["one", "two"])
    split = {"validation_files": [str(tmp_path / "002.txt"), str(tmp_path / "other" / "*")]}
    prepared = prepare(config_of(tmp_path, **split))
    assert documents_of(prepared, "train") == [texts[0], texts[1], texts[3]]
    assert documents_of(prepared, "validation") == [texts[2], "one", "two"]
    assert prepare(config_of(tmp_path)).about["fingerprint"] != prepared.about["fingerprint"]
    with pytest.raises(UserError, match=r"is left without data\.validation_files="):
        prepare(config_of(tmp_path, validation_files=[str(tmp_path / "*.txt")]))


def test_validation_split_replaces_a_missing_test_split(tmp_path):
    write_files(tmp_path, 1)
    train, validation, test, tokenizer = load_text_data(config_of(tmp_path, max_length=8))
    assert test.path == validation.path != train.path
    assert (train.length, tokenizer.fingerprint) == (8, GPT2Tokenizer.of_bytes().fingerprint)


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 900 + "xy " * 100)
    *_, tokenizer = load_text_data(config_of(tmp_path, tokenizer="train", vocab_size=300))
    assert "ab" in tokenizer.vocabulary
    assert "xy" not in tokenizer.vocabulary


@pytest.mark.parametrize(("size", "is_noted"), [(5000, True), (260, False)])
def test_vocabulary_that_the_text_cannot_fill_is_noted(tmp_path, caplog, size, is_noted):
    (tmp_path / "a.txt").write_text("some words " * 99)
    load_text_data(config_of(tmp_path, tokenizer="train", vocab_size=size))
    assert ("tokens to learn, not data.vocab_size=5,000" in caplog.text) == is_noted


def test_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"a" * 100)
    assert documents_of(prepare(config_of(tmp_path)), "train") == ["a" * 90]


def test_line_ends_are_unchanged(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n" * 10)
    assert documents_of(prepare(config_of(tmp_path)), "train") == ["a\r\nb\rc\n" * 9]


def test_excluded_files_are_left_out(tmp_path):
    for name in ("keep.txt", "skip.txt", "tests/a.txt", "deep/er/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 10)
    exclude = [str(tmp_path / "skip.*"), "*/tests/*"]
    prepared = prepare(config_of(tmp_path, files=[str(tmp_path / "**" / "*.txt")], exclude=exclude))
    assert [document.split(".txt")[0] for document in documents_of(prepared, "train")] == ["deep/er/b", "keep"]


def test_file_named_twice_is_read_once(tmp_path, monkeypatch):
    """Otherwise it could be in both the training and the validation split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a" * 100)
    names = ["a.txt", "./a.txt", "*.txt", str(tmp_path / "a.txt")]
    assert documents_of(prepare(config_of(tmp_path, files=names)), "train") == ["a" * 90]


@pytest.mark.parametrize("name", ["[draft] a.txt", "a?.txt"])
def test_file_name_that_looks_like_a_pattern_is_found(tmp_path, name):
    (tmp_path / name).write_text("a" * 100)
    assert documents_of(prepare(config_of(tmp_path, files=[str(tmp_path / name)])), "train") == ["a" * 90]


def test_invalid_utf8_is_reported_with_file_and_place(tmp_path):
    (tmp_path / "good.txt").write_text("good" * 100)
    (tmp_path / "latin.txt").write_bytes(b"caf" + b"\xe9" + b" noir" * 100)
    with pytest.raises(UserError) as error:
        prepare(config_of(tmp_path))
    assert str(tmp_path / "latin.txt") in str(error.value)
    assert "byte 3" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.bin")), "a corpus that failed halfway leaves nothing behind"


@pytest.mark.parametrize("content", ["", " \n", "a"])
def test_too_little_text_is_a_user_error(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=r"there is no text in the (train|validation) split"):
        prepare(config_of(tmp_path))


MEMORY = """
import pathlib, re, sys
from gpt2.config import DataConfig
from gpt2.data.corpus import prepare

def peak():  # of this program; ru_maxrss starts with that of the process that it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) // 1024

before = peak()
path, tokenizer = sys.argv[1:]
prepare(DataConfig(files=[path + "/*.txt"], tokenizer=tokenizer, vocab_size=300, cache_dir=path))
print(peak() - before)
"""


def memory_to_prepare(path: Path, tokenizer: str) -> int:
    """How many MiB the preparation of the texts of a folder adds to the peak of its process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return int(subprocess.check_output([sys.executable, "-c", MEMORY, path, tokenizer], env=environment))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "files", "kind"),
    [
        ("train", 1, "text"),
        ("bytes", 20, "text"),
        ("bytes", 1, "text"),
        ("bytes", 1, "no border"),
        ("bytes", 1, "blank"),
    ],
)
def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, files, kind):
    text = {"text": python_source().encode(), "no border": b"ab" * 100_000, "blank": b" " * 200_000}[kind]
    needed = []
    for size in (20_000_000, 50_000_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        for number in range(files):
            content = [b"the beginning ", *[text] * (size // files // len(text)), b" the end"]
            (folder / f"{number}.txt").write_bytes(b"".join(content))
        needed.append(memory_to_prepare(folder, tokenizer))
    assert needed[0] > 10  # it works on pieces of this size
    assert needed[1] < needed[0] + 25  # the number of pieces in threads varies


def test_excluding_all_files_is_a_user_error(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"data\.files"):
        prepare(config_of(tmp_path, exclude=["*.txt"]))


PREPARE = """
import json, logging, os, sys
from gpt2.config import DataConfig
from gpt2.errors import UserError
from gpt2.data.corpus import prepare

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
print("ready", flush=True)
input()
try:
    print(prepare(DataConfig(**json.loads(sys.argv[1]))).folder)
except UserError as error:
    print(f"HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE')}")
    print(error)
"""


def start_preparing(folder: Path, **fields) -> subprocess.Popen:
    """A process that prepares a corpus after a line on its input, with its cache in `folder` and without the Hub."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PREPARE, json.dumps({"cache_dir": str(folder / "cache"), **fields})]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
