"""The cache of tokenized corpora: changes that need another corpus, damage, concurrent processes."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2.data import documents
from gpt2.data.corpus import PreparedData, prepare
from gpt2.data.hub_datasets import TableDocuments
from gpt2.errors import UserError
from gpt2.runtime import files
from gpt2.tokenizer import GPT2Tokenizer
from tests.data.test_corpus import config_of, documents_of, start_preparing, write_files
from tests.data.test_datasets import dataset_config, write_dataset
from tests.helpers import python_source


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The modification time and content of every file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_prepared_corpus_is_read_from_the_cache(tmp_path):
    write_files(tmp_path, 3)
    first = prepare(config_of(tmp_path))
    before = state_of(first.folder)
    os.utime(tmp_path / "000.txt")  # touched, not changed
    again = prepare(config_of(tmp_path, max_length=7, preprocessing_num_workers=1, exclude=["nothing"]))
    assert again.folder == first.folder
    assert state_of(again.folder) == before


def test_changed_configuration_is_another_corpus(tmp_path):
    write_files(tmp_path, 3)
    changes = [{}, {"tokenizer": "train"}, {"tokenizer": "train", "vocab_size": 300}, {"validation_fraction": 0.2}]
    folders = [prepare(config_of(tmp_path, **change)).folder for change in changes]
    assert len(set(folders)) == len(changes)
    assert [prepare(config_of(tmp_path, **change)).folder for change in changes] == folders


def test_changed_tokenizer_of_the_same_name_is_another_corpus(tmp_path):
    write_files(tmp_path, 3)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    prepared = []
    for tokenizer in (GPT2Tokenizer.train([python_source()[:5000]], 280), GPT2Tokenizer.of_bytes()):
        (folder / "vocab.json").write_text(json.dumps(tokenizer.vocabulary))
        (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in tokenizer.merges))
        prepared.append(prepare(config_of(tmp_path, tokenizer=str(folder))))
    assert prepared[0].folder != prepared[1].folder
    assert prepared[1].tokenizer.fingerprint == GPT2Tokenizer.of_bytes().fingerprint


def test_changed_text_is_another_corpus(tmp_path):
    write_files(tmp_path, 3)
    first = prepare(config_of(tmp_path))
    path = tmp_path / "001.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("001", "XYZ"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # with the same size and modification time
    second = prepare(config_of(tmp_path))
    assert second.folder != first.folder
    assert "XYZ" in "".join(documents_of(second, "train"))


def flip(path: Path) -> None:
    """Flip one bit in the middle, and restore the modification time."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def become_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DAMAGES: list[Callable[[Path], object]] = [
    *(flip, become_folder, link_to_itself, Path.unlink),
    lambda path: path.write_bytes(path.read_bytes()[:-2]),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
    lambda path: path.write_bytes(path.read_bytes() + b"x"),
    *map(write, (b"", b"[]", b"{}", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"checksum": 5, "sha256": [1]}')),
]


@pytest.mark.parametrize("file", ["train.bin", "validation.bin", "tokenizer.json", "about.json"])
def test_damaged_corpus_is_prepared_again(tmp_path, monkeypatch, caplog, file):
    monkeypatch.setattr(files, "TIME_RESOLUTION", 0)  # so that verified files are recorded at once
    write_files(tmp_path, 3)
    first = prepare(config_of(tmp_path))
    whole = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    for damage in DAMAGES:
        damage(first.folder / file)
        caplog.clear()
        again = prepare(config_of(tmp_path))
        assert again.folder == first.folder
        assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == whole
        (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"the cache {first.folder} is damaged (" in message
        assert file in message
        assert prepare(config_of(tmp_path)).damage() is None


def test_about_with_other_values_is_damaged(tmp_path):
    write_files(tmp_path, 3)
    prepared = prepare(config_of(tmp_path))
    path = prepared.folder / "about.json"
    about = json.loads(path.read_text())
    for name, value in {"tokens": {"train": 5}, "dtype": "uint8", "vocab_size": "x", "sha256": {}, "other": 1}.items():
        path.write_text(json.dumps({**about, name: value}))
        assert "about.json" in (PreparedData(prepared.folder).damage() or "")


def test_corpus_under_the_name_of_another_is_damaged(tmp_path, caplog):
    write_files(tmp_path, 3)
    one, two = (prepare(config_of(tmp_path, validation_fraction=fraction)) for fraction in (0.1, 0.2))
    before = documents_of(one, "train")
    shutil.rmtree(one.folder)
    two.folder.rename(one.folder)
    assert documents_of(prepare(config_of(tmp_path, validation_fraction=0.1)), "train") == before
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("what", ["tokens/*/", "tokens/*.verified"])
def test_invalid_cache_entry_is_replaced(tmp_path, monkeypatch, what):
    monkeypatch.setattr(files, "TIME_RESOLUTION", 0)
    write_files(tmp_path, 3)
    prepare(config_of(tmp_path))
    whole = documents_of(prepare(config_of(tmp_path)), "train")
    (place,) = (tmp_path / "cache").glob(what)
    for content in (b"", b"[1]", b'{"train.bin": 5}', b"\xff"):
        files.remove(place)
        place.write_bytes(content)
        assert documents_of(prepare(config_of(tmp_path)), "train") == whole
        assert prepare(config_of(tmp_path)).damage() is None


def test_verified_files_are_not_read_again(tmp_path, monkeypatch, caplog):
    read: list[str] = []
    sums = files.sha256_of_each
    monkeypatch.setattr(
        files, "sha256_of_each", lambda paths, task: read.extend(p.name for p in paths) or sums(paths, task)
    )
    write_files(tmp_path, 3)
    config = config_of(tmp_path)

    def files_read() -> list[str]:
        read.clear()
        prepare(config)
        return sorted(read)

    names = ["test.bin", "tokenizer.json", "train.bin", "validation.bin"]
    assert files_read() == []  # the checksums are computed while the corpus is written
    assert files_read() == names
    assert files_read() == names  # written a moment ago: a change might not change their times
    monkeypatch.setattr(files, "TIME_RESOLUTION", 0)
    assert files_read() == names
    assert files_read() == []
    train = next((tmp_path / "cache").rglob("train.bin"))
    os.utime(train)
    assert "bytes in" not in caplog.text
    monkeypatch.setattr(files, "MANY_BYTES", 100)  # now all files count as large
    caplog.set_level(logging.INFO)
    assert files_read() == ["train.bin"]
    assert re.search(r"Reading the files: [\d,]+ bytes in [\d.]+ s\n", caplog.text)
    assert f"Verifying the cache: {train.stat().st_size:,} bytes in " in caplog.text
    assert files_read() == []


def test_large_sources_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    read: list[Path] = []
    sums = files.sha256_of_each
    monkeypatch.setattr(files, "sha256_of_each", lambda paths, task: read.extend(paths) or sums(paths, task))
    monkeypatch.setattr(files, "TIME_RESOLUTION", 0)
    monkeypatch.setattr(documents, "MANY_BYTES", 100)
    write_files(tmp_path, 3)
    config = config_of(tmp_path)

    def prepared() -> Path:
        read.clear()
        return prepare(config).folder

    first = prepared()
    assert [path.name for path in read] == ["000.txt", "001.txt", "002.txt"]
    assert prepared() == first
    assert not [path for path in read if path.suffix == ".txt"]
    path, times = tmp_path / "001.txt", (tmp_path / "001.txt").stat()
    path.write_text(path.read_text().replace("001", "XYZ"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepared() != first
    assert read[0] == path
    (memory,) = (tmp_path / "cache" / "sums").iterdir()
    for content in (b"[1]", b'{"x": 5}', b"\xff", memory.read_bytes().replace(b"[", b"{")):
        memory.write_bytes(content)
        assert prepared() != first


def test_fingerprint_is_that_of_the_contents(tmp_path):
    """Other inputs with the same tokens, such as a renamed file, are the same corpus for a resumed run."""
    write_files(tmp_path, 3)
    one = prepare(config_of(tmp_path))
    same = prepare(config_of(tmp_path, cache_dir=str(tmp_path / "elsewhere")))
    other = prepare(config_of(tmp_path, validation_fraction=0.2))
    assert one.about["fingerprint"] == same.about["fingerprint"] != other.about["fingerprint"]
    assert one.about["key"] == same.about["key"]


def test_damaged_tables_of_a_folder_are_made_again(tmp_path, caplog):
    rows = [f"row {number}" for number in range(50)]
    folder = write_dataset(tmp_path / "tiny", train=rows, validation=rows[:9], test=rows[:9])
    config = dataset_config(folder, tmp_path, document_start=None)

    def warnings_and_train() -> tuple[list[str], list[str]]:
        caplog.clear()
        shutil.rmtree(tmp_path / "cache" / "tokens", ignore_errors=True)
        train = documents_of(prepare(config), "train")
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING], train

    assert warnings_and_train() == ([], rows)
    assert warnings_and_train() == ([], rows)
    (table,) = tmp_path.glob("cache/datasets/**/tiny-train.arrow")
    (info,) = tmp_path.glob("cache/datasets/**/dataset_info.json")
    (sums,) = tmp_path.glob("cache/datasets/*.json")
    damages = [(table, flip), (table, Path.unlink), (info, flip), (info, write(b"[]")), (sums, write(b"[]"))]
    for file, damage in damages:
        damage(file)
        (message,), train = warnings_and_train()
        assert "cache/datasets/" in message
        assert "is damaged (" in message
        assert train == rows


@pytest.mark.parametrize("error", [ValueError("Invalid flatbuffers"), SystemError("Negative size"), OSError("Input")])
def test_damaged_table_is_a_user_error(error):
    class Table:
        def iter(self, _size: int):
            yield {"text": ["a row", None]}
            raise error

    documents = iter(TableDocuments(Table(), "text", None))
    assert [next(documents).text, next(documents).text] == ["a row", ""]
    with pytest.raises(UserError, match=f"data.dataset_name: its cached table is damaged: {error}"):
        next(documents)


def test_one_of_four_concurrent_processes_prepares(tmp_path):
    (tmp_path / "a.txt").write_text(python_source())
    fields = {"files": ["a.txt"], "tokenizer": "train", "vocab_size": 400}
    processes = [start_preparing(tmp_path, **fields) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("cached in" in output for output in outputs) == 1
    assert sum("from the cache" in output for output in outputs) == 3
    folder = Path(outputs[0].splitlines()[-1])
    leftovers = {path.name for path in folder.parent.iterdir()} - {folder.name, f"{folder.name}.verified"}
    assert leftovers == {f"{folder.name}.lock"}
