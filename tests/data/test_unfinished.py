"""Preparations that are killed, interrupted or fail: the next one continues, and produces the same bytes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow import Table, parquet

from gpt2.data import corpus, token_writer
from gpt2.data.corpus import prepare
from gpt2.data.hub_datasets import _require_space
from gpt2.errors import UserError
from gpt2.runtime import files
from tests.data.test_corpus import config_of, documents_of
from tests.data.test_datasets import dataset_config, write_dataset
from tests.helpers import python_source


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(token_writer, "PIECE_LENGTH", 1000)
    monkeypatch.setattr(token_writer, "BATCH_LENGTH", 2500)
    for module in (corpus, token_writer):
        monkeypatch.setattr(module, "TOKENS_PER_COMMIT", 6000)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text(python_source()[:30_000])
    return tmp_path


def after_batches(monkeypatch, number: int, stop: Callable[[], object]) -> None:
    """Call a function after a preparation has tokenized a number of batches, counted over all splits."""
    original, done = token_writer.map_in_threads, 0

    def counted(*arguments):
        nonlocal done
        for result in original(*arguments):
            yield result
            done += 1
            if done == number:
                stop()

    monkeypatch.setattr(token_writer, "map_in_threads", counted)


def kill_after(number: int, config) -> None:
    """Prepare a corpus in another process, which is killed after it has tokenized a number of batches."""
    if (child := os.fork()) == 0:
        with pytest.MonkeyPatch.context() as patch:
            after_batches(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            prepare(config)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("threads", [1, 3])
def test_killed_preparation_continues_to_the_same_bytes(text, threads, caplog):
    caplog.set_level("INFO")
    whole = prepare(config_of(text))
    config = config_of(text, cache_dir=str(text / "other"), preprocessing_num_workers=threads)
    for number in (1, 5, 3, 2):
        kill_after(number, config)
    prepared = prepare(config)
    assert contents(prepared.folder) == contents(whole.folder)
    assert "continuing the train split after its first " in caplog.text
    assert [path.name for path in prepared.folder.parent.iterdir() if path.is_dir()] == [prepared.folder.name]
    assert prepared.damage() is None


def test_rows_of_a_dataset_continue_in_each_split(tmp_path, monkeypatch):
    rows = [f"row {number} " * 30 for number in range(200)]
    folder = write_dataset(tmp_path / "tiny", train=rows, test=rows[:50])
    config = dataset_config(folder, tmp_path, document_start=None, validation_split=None)
    for number in (9, 9, 5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            after_batches(patch, number, stop(KeyboardInterrupt()))
            prepare(config)
    encoded = []
    original = corpus.GPT2Tokenizer.encode_batch
    monkeypatch.setattr(
        corpus.GPT2Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or original(self, texts)
    )
    prepared = prepare(config)
    assert sorted(documents_of(prepared, "train") + documents_of(prepared, "validation")) == sorted(rows)
    assert documents_of(prepared, "test") == rows[:50]
    assert sum(map(len, encoded)) < len("".join(rows)) / 2


class StopNowError(Exception):
    """Simulates a failure of the machine."""


def stop(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), StopNowError()])
def test_committed_tokens_survive_a_failure(text, monkeypatch, error, caplog):
    caplog.set_level("INFO")
    config = config_of(text, tokenizer="train", vocab_size=300)
    with monkeypatch.context() as patch:
        after_batches(patch, 8, stop(error))
        with pytest.raises(type(error)):
            prepare(config)
    (unfinished,) = (text / "cache" / "tokens").glob("*.unfinished")
    assert f"the tokens so far stay in {unfinished}, the same command continues from there" in caplog.text
    monkeypatch.setattr(corpus, "_train_tokenizer", stop(AssertionError("the tokenizer is learned again")))
    continued = contents(prepare(config).folder)
    monkeypatch.undo()
    assert continued == contents(prepare(config_of(text, **{**vars(config), "cache_dir": str(text / "other")})).folder)


@pytest.mark.parametrize(("number", "error"), [(1, KeyboardInterrupt()), (8, UserError("a mistake in the text"))])
def test_nothing_remains_without_a_commit_or_after_invalid_text(text, monkeypatch, number, error):
    after_batches(monkeypatch, number, stop(error))
    with pytest.raises(type(error)):
        prepare(config_of(text))
    assert [path.suffix for path in (text / "cache" / "tokens").iterdir()] == [".lock"]


def test_damaged_or_foreign_unfinished_folder_is_replaced(text, monkeypatch, caplog):
    whole = contents(prepare(config_of(text)).folder)
    config = config_of(text, cache_dir=str(text / "other"))

    def flip(folder: Path) -> None:
        content = bytearray((folder / "train.bin").read_bytes())
        content[100] ^= 1
        (folder / "train.bin").write_bytes(content)

    def other_tokenizer(folder: Path) -> None:
        progress = json.loads((folder / "progress.json").read_bytes())
        del progress["checksum"]
        (folder / "progress.json").write_text(json.dumps(corpus._with_checksum({**progress, "tokenizer": "other"})))

    damages = [
        flip,
        other_tokenizer,
        lambda folder: (folder / "train.bin").write_bytes(b""),
        lambda folder: (folder / "train.bin").unlink(),
        lambda folder: (folder / "progress.json").write_bytes(b'{"train": 5}'),
        lambda folder: files.remove(folder) or folder.write_bytes(b"a file"),
    ]
    for damage in damages:
        kill_after(9, config)
        (unfinished,) = (text / "other" / "tokens").glob("*.unfinished")
        damage(unfinished)
        caplog.clear()
        prepared = prepare(config)
        assert contents(prepared.folder) == whole
        assert ("train.bin is damaged, it is written again" in caplog.text) == (damage in (flip, *damages[2:4]))
        files.remove(prepared.folder)


def test_needed_space_is_logged_and_must_be_free(text, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(files, "MANY_BYTES", 1000)
    config = config_of(text)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=59_000))
    with pytest.raises(
        UserError, match=r"^data\.cache_dir: tokenizing 0\.0 MB of text needs about 0\.1 MB in .*/tokens,"
    ):
        prepare(config)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=61_000))
    prepared = prepare(config)
    assert "Data: tokenizing 0.0 MB of text needs about 0.1 MB in" in caplog.text
    assert sum(prepared.about["tokens"].values()) * 2 < 61_000


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_space_for_the_table_of_a_dataset_is_checked_before_it_is_made(tmp_path, monkeypatch, caplog, kind):
    rows = ["a long row " * 50] * 100
    folder = write_dataset(tmp_path / "tiny", train=rows)
    if kind == "parquet":  # parquet is compressed
        parquet.write_table(Table.from_pydict({"text": rows}), folder / "train.parquet", use_dictionary=False)
        (folder / "README.md").write_text((folder / "README.md").read_text().replace("train.jsonl", "train.parquet"))
        assert (folder / "train.parquet").stat().st_size < 10_000
    config = dataset_config(folder, tmp_path, document_start=None, validation_split=None, test_split=None)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=70_000))
    with pytest.raises(UserError, match=r"^data\.cache_dir: preparing the dataset needs about 0\.1 MB in .*/cache/"):
        prepare(config)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000))
    if kind == "parquet":  # because pyarrow would read whole files into memory
        make = Parquet.download_and_prepare
        options = []
        monkeypatch.setattr(
            Parquet,
            "download_and_prepare",
            lambda self: options.append(self.config.fragment_scan_options.pre_buffer) or make(self),
        )
    assert documents_of(prepare(config), "train") == rows[10:]
    assert "damaged" not in caplog.text
    assert kind == "jsonl" or options == [False]


def test_download_and_table_of_a_dataset_of_the_hub_must_fit(tmp_path, monkeypatch):
    fsspec.filesystem("memory").pipe("/tiny/train.parquet", bytes(1000))
    files_of = {"train": ["memory://tiny/train.parquet"], "test": ["memory://tiny/unknown", "no-such-protocol://a"]}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files_of), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    _require_space(builder)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1999))
    with pytest.raises(UserError, match=r"preparing the dataset needs about 0\.0 MB"):
        _require_space(builder)
