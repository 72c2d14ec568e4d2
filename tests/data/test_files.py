"""The files that `data.files` and `data.exclude` select, and the documents read from them."""

import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest

from gpt2.config import DataConfig
from gpt2.data import text_files
from gpt2.data.corpus import prepare
from gpt2.data.text_files import find_files, open_files
from gpt2.data_loader import load_text_data
from gpt2.errors import UserError
from gpt2.validation import validate
from tests.data.test_corpus import config_of, documents_of


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A folder with files, some of whose names look like patterns, in which the test runs."""
    for name in (
        "f1.txt",
        "f2.txt",
        "g1.txt",
        "g[1].txt",
        "dir[1]/a.txt",
        "dir[1]/b.txt",
        "dir1/c.txt",
        "deep/er/d.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "link.txt").symlink_to("f2.txt")
    (tmp_path / "other").symlink_to("deep")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# `data.files`, `data.exclude` (HERE is the absolute path of the folder), and the files that remain.
EXCLUDED = [
    (["g*.txt"], ["g[1].txt"], ["g1.txt"]),
    (["HERE/f*.txt"], ["f1.txt"], ["f2.txt"]),
    (["./f*.txt"], ["f1.txt"], ["f2.txt"]),
    (["f*.txt"], ["./f1.txt"], ["f2.txt"]),
    (["f*.txt"], ["HERE/f1.txt"], ["f2.txt"]),
    (["HERE/f*.txt"], ["f?.txt", "f1.txt"], []),
    (["dir1/../f*.txt"], ["f1.txt"], ["f2.txt"]),
    (["f*.txt"], ["deep/../f1.txt"], ["f2.txt"]),
    (["f*.txt"], ["link.txt"], ["f1.txt"]),
    (["link.txt", "f1.txt"], ["f2.txt"], ["f1.txt"]),
    (["other/**/*.txt", "f1.txt"], ["deep/er/*"], ["f1.txt"]),
    (["HERE/dir*/*.txt"], ["dir[1]/*.txt"], ["dir1/c.txt"]),
    (["dir[1]/*.txt"], ["dir[1]/a.txt"], ["dir[1]/b.txt"]),
    (["**/*.txt"], ["deep/**/d.txt", "dir*", "g*", "link.txt"], ["f1.txt"]),
    (["HERE/**/d.txt", "f1.txt"], ["deep/*"], ["f1.txt"]),
    (["dir[1]"], [], []),
]


@pytest.mark.parametrize(("files", "exclude", "remaining"), EXCLUDED, ids=str)
def test_files_are_excluded_by_any_form_of_their_path(texts, caplog, files, exclude, remaining):
    files, exclude = ([name.replace("HERE", str(texts)) for name in names] for names in (files, exclude))
    assert find_files(files, exclude) == sorted(texts / name for name in remaining)
    assert not caplog.text


def test_exclusion_that_matches_nothing_is_noted(texts, caplog):
    assert find_files(["f*.txt"], ["f3.txt", "f1.txt", "g1.txt"]) == [texts / "f2.txt"]
    assert caplog.messages == ["Note: data.exclude: no file of data.files matches 'f3.txt', 'g1.txt'."]


def test_broken_links_and_pipes_are_left_out_with_a_note(texts, caplog):
    (texts / "fa.txt").symlink_to("gone")
    os.mkfifo(texts / "fb.txt")
    assert find_files(["f*.txt"], []) == [texts / "f1.txt", texts / "f2.txt"]
    (note,) = caplog.messages
    assert note.endswith(f"broken links are left out: {texts}/fa.txt, {texts}/fb.txt")
    caplog.clear()
    assert find_files(["f*.txt"], ["fa.txt", "fb*"]) == [texts / "f1.txt", texts / "f2.txt"]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("deep", "'deep' is a folder; name its files, such as 'deep/**/*.txt'"),
        ("de*", "'deep' is a folder"),
        ("gone.txt", "'gone.txt' is a pipe, a socket, a device or a broken link"),
        ("loop.txt", "'loop.txt' is a pipe, a socket, a device or a broken link"),
        ("pipe", "'pipe' is a pipe, a socket, a device or a broken link"),
        ("/dev/null", "'/dev/null' is a pipe, a socket, a device or a broken link"),
        ("nothing.txt", "no file matches 'nothing.txt' (looked from "),
        ("dir[2]/*.txt", "no file matches 'dir[2]/*.txt'"),
        ("", "no file matches ''"),
    ],
)
def test_names_that_are_no_files_are_reported(texts, name, complaint):
    (texts / "gone.txt").symlink_to("missing.txt")
    (texts / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(texts / "pipe")
    (problem,) = validate(DataConfig(files=[name, "f1.txt"], tokenizer="bytes"), "data.")
    assert problem.startswith(f"data.files: {complaint}")
    assert find_files([name, "f1.txt"], []) == [texts / "f1.txt"]
    with pytest.raises(UserError) as refused:
        load_text_data(DataConfig(files=[name], tokenizer="bytes"))
    assert refused.value.problems == [problem]


# ---------------------------------------------------------------------------------------------------------------------
# Records

RECORDS = {
    "a.jsonl": '{"text": "one\\ntwo", "id": 1}\n\n{"text": "drei, ä"}\n{"text": null}',
    "a.ndjson": '{"text": "one\\ntwo"}\r\n{"text": "drei, ä"}\r\n',
    "a.CSV": '\ufeffid,text\r\n1,"one\ntwo"\r\n2,"drei, ä"\r\n3,\r\n',
    "a.tsv": 'id\ttext\n1\t"one\ntwo"\n2\tdrei, ä\n',
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_record_is_a_document(tmp_path, name):
    (tmp_path / name).write_bytes(RECORDS[name].encode())
    (tmp_path / "b.txt").write_text('{"text": "plain"}')
    config = config_of(tmp_path, files=[str(tmp_path / "*.*")], validation_fraction=0.0001, document_start=None)
    prepared = prepare(config, only="all")
    assert documents_of(prepared, "all") == ["one\ntwo", "drei, ä", '{"text": "plain"}']


def test_records_are_sampled_and_identified_by_their_column(tmp_path, monkeypatch):
    read, passes = text_files.RECORDS[".jsonl"], []
    monkeypatch.setitem(text_files.RECORDS, ".jsonl", lambda lines: passes.append(1) or read(lines))
    lines = [f'{{"a": "left {number}", "b": "right {number}"}}\n' for number in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    prepared = [prepare(config_of(tmp_path, files=[str(tmp_path / "*.jsonl")], text_column=column)) for column in "ab"]
    assert len(passes) == 2 * 4  # passes: count, estimate of space, two splits
    assert prepared[0].folder != prepared[1].folder
    assert len(documents_of(prepared[0], "validation")) == 10
    everything = documents_of(prepared[1], "train") + documents_of(prepared[1], "validation")
    assert sorted(everything) == sorted(f"right {number}" for number in range(100))


def test_array_of_records_in_a_json_file_is_noted(tmp_path, caplog):
    (tmp_path / "records.json").write_text('\n [{"text": "a"}]')
    (tmp_path / "settings.json").write_text('{"text": ["a"]}')
    open_files(DataConfig(files=[str(tmp_path / "*.json")]))
    (note,) = caplog.messages
    assert note.startswith(f"Note: {tmp_path / 'records.json'} is read as plain text; for a document per record")


def utf16(mark: bytes, kind: str) -> bytes:
    return mark + ("plain text\n" * 9).encode(kind)


UNREADABLE = {
    "a.jsonl": [
        (b'{"text": "a"}\n{"body": "b", "id": 3}', r"data.text_column: line 2 of .*a.jsonl has body, id, not 'text'"),
        (b'{"text": "a"}\n{"text": 3}', r"data.text_column: 'text' in line 2 of .*a.jsonl is int, not text"),
        (b'{"text": "a"}\n\n{"text": \n', r"data.files: line 3 of .*a.jsonl cannot be read: Expecting value"),
        (b"[1]\n", r"data.text_column: line 1 of .*a.jsonl has no names, not 'text'"),
        (b'{"text": "\xe9"}', r"data.files: .*a.jsonl is not UTF-8 at byte 10; convert it or leave it out"),
        (b'{"a":' * 100_000, r"data.files: line 1 of .*a.jsonl cannot be read: "),
    ],
    "a.csv": [
        (b"body,id\nb,3\n", r"data.text_column: line 2 of .*a.csv has body, id, not 'text'"),
        (b'id,text\n1,"a\n', r"data.files: line 3 of .*a.csv cannot be read: unexpected end of data"),
        (b"id,text\n0,hello, world\n", r"data.files: line 2 of .*a.csv has more fields than the header; quote texts"),
    ],
    "a.txt": [
        (utf16(b"\xff\xfe", "utf-16-le"), r"data.files: .*a.txt is UTF-16, not UTF-8 text; convert it or leave it out"),
        (utf16(b"\xfe\xff", "utf-16-be"), r"a.txt is UTF-16, not UTF-8 text"),
        (utf16(b"", "utf-16-le"), r"a.txt has a NUL at byte 1, so it is UTF-16 or not text; convert it"),
        (utf16(b"", "utf-16-be"), r"a.txt has a NUL at byte 0, so it is UTF-16 or not text"),
        (b"plain text " * 9 + b"\0" + b"text " * 9, r"a.txt has a NUL at byte 99"),
        (gzip.compress(b"plain text", mtime=0), r"a.txt is compressed, not UTF-8 text"),
        (b"PK\3\4 and so on", r"a.txt is a zip, not UTF-8 text"),
        (lzma.compress(b"a text"), r"a.txt is compressed, not UTF-8 text"),
        (bz2.compress(b"a text"), r"a.txt is compressed, not UTF-8 text"),
        (b"\x28\xb5\x2f\xfd and so on", r"a.txt is compressed, not UTF-8 text"),
        (b"%PDF-1.7 and so on", r"a.txt is a PDF, not UTF-8 text"),
        (b"PAR1 and so on", r"a.txt is Parquet \(data.dataset_name=FOLDER reads it\), not UTF-8 text"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [(name, content, complaint) for name, cases in UNREADABLE.items() for content, complaint in cases],
)
def test_files_without_text_are_refused_in_a_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as refused:
        prepare(config_of(tmp_path, files=[str(tmp_path / name)]))
    assert "\n" not in str(refused.value)
