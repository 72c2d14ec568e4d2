"""Documents of text files: two parts make up the whole text for any cut, and invalid UTF-8 is reported."""

import numpy as np
import pytest

from gpt2.config import DataConfig
from gpt2.data import text_files
from gpt2.data.documents import TextDocument
from gpt2.data.sources import SOURCES, describe_source, open_source
from gpt2.data.text_files import TextFile
from gpt2.errors import UserError


def test_sources_are_named_by_fields():
    assert {name for names in SOURCES for name in names} <= vars(DataConfig()).keys()
    assert describe_source(DataConfig()) == "wikitext, wikitext-2-raw-v1"
    assert describe_source(DataConfig(dataset_config=None)) == "wikitext"
    assert describe_source(DataConfig(files=["a.txt", "b*"])) == "a.txt, b*"


@pytest.mark.parametrize("part", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
def test_parts_of_a_file_are_its_text(tmp_path, monkeypatch, part, mark):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", part)
    text = "aé€😀\r\n\ufeff" * 3
    (tmp_path / "a.txt").write_bytes(mark + text.encode())
    document = TextFile(tmp_path / "a.txt")
    assert "".join(document.parts()) == text
    for share in np.linspace(0, 1, 50):
        before, after = "".join(document.parts(0, share)), "".join(document.parts(share, 1))
        assert before + after == text
        assert len(before.encode()) == pytest.approx(share * len(text.encode()), abs=4)


def test_parts_of_a_text_in_memory_are_its_text():
    document = TextDocument("aé€😀" * 10)
    assert ["".join(document.parts(*shares)) for shares in [(), (0, 0.5), (0.5, 1)]] == [
        *("aé€😀" * 10, "aé€😀" * 5, "aé€😀" * 5)
    ]


NOT_UTF8 = [b"\x80abc", b"abc\xe9", b"abc\xe2\x82", b"\xc3\xa9\xff", b"a\xed\xa0\x80b", b"ab\xf0\x9f\x98z", b"\xef\xbb"]
NOT_UTF8 += [b"\xf0\x9f\x98\x80\x80" + b"a" * 9, "漢".encode() * 5 + b"\x82\x82\x82\x82"]


@pytest.mark.parametrize("part", [1, 3, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("content", NOT_UTF8)
def test_first_byte_that_is_not_utf8_is_reported_for_every_cut(tmp_path, monkeypatch, content, mark, part):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", part)
    (tmp_path / "a.txt").write_bytes(mark + content)
    with pytest.raises(UnicodeDecodeError) as expected:
        (mark + content).decode()
    for share in np.linspace(0, 1, 20):
        document = TextFile(tmp_path / "a.txt")
        with pytest.raises(UserError) as error:
            list(document.parts(0, share)), list(document.parts(share, 1))
        assert f"at byte {expected.value.start};" in str(error.value)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"a.jsonl": '{"text": 3}\n', "b.jsonl": '{"text": "x"}\n'}, "data.dataset_name: cannot load"),
        ({"a.jsonl": '{"text": "a"}\n', "b.jsonl": '{"text": ["x"]}\n'}, "data.dataset_name: cannot load"),
        ({"a.csv": "text\n3\n", "b.csv": "text\na\n"}, "data.dataset_name: cannot load"),
        ({"a.csv": "text\na\n", "b.csv": "body\na\n"}, "data.dataset_name: cannot load"),
        (
            {"a.jsonl": '{"text": "a"}\n{"text": 3}\n'},
            "data.text_column: 'text' holds nested or mixed values, not text",
        ),
    ],
)
def test_values_of_several_types_are_a_clear_error(tmp_path, files, complaint):
    (tmp_path / "corpus").mkdir()
    for name, content in files.items():
        (tmp_path / "corpus" / name).write_text(content)
    splits = {"dataset_config": None, "validation_split": None, "test_split": None}
    with pytest.raises(UserError) as refused:
        open_source(DataConfig(str(tmp_path / "corpus"), **splits, cache_dir=str(tmp_path / "cache")))
    (line,) = refused.value.problems
    assert line.startswith(complaint)
    assert "load" not in complaint or line.endswith(
        "its files do not have the same columns with values of the same types, such as text as 'text'"
    )
