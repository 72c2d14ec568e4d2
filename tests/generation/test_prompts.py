"""Prompts from a file."""

import pytest

from gpt2.errors import UserError
from gpt2.generation.prompts import read_prompts


def test_each_line_is_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes('one\r\n  two \n\n{"prompt": 1}\nthree\u2028still'.encode())
    assert read_prompts(file) == [{"prompt": p} for p in ("one", "  two ", '{"prompt": 1}', "three\u2028still")]


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    for name, content in (("p.txt", "one\rstill\r\n"), ("p.jsonl", '{"prompt": "one\\rstill"}')):
        (tmp_path / name).write_bytes(("\ufeff" + content).encode())
        assert read_prompts(tmp_path / name) == [{"prompt": "one\rstill"}]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.JSONL", "prompts.ndjson"])
def test_json_lines_preserve_other_keys(tmp_path, name):
    file = tmp_path / name
    file.write_text('{"prompt": "a\\nb", "id": 7}\n\n{"prompt": ""}\n')
    assert read_prompts(str(file)) == [{"prompt": "a\nb", "id": 7}, {"prompt": ""}]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", b"", r"p.txt has no prompt"),
        ("p.txt", b"\n \n", r"p.txt has no prompt"),
        ("p.txt", b"\xef\xbb\xbfab\xe9", r"p.txt is not UTF-8 text at byte 5"),
        ("p.txt", b"\xff\xfe", r"p.txt is not UTF-8 text at byte 0"),
        ("p.txt", "ab".encode("utf-16-le"), r"p.txt has a NUL at byte 1, so it is UTF-16 or not text"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16-be"), r"p.jsonl has a NUL at byte 0, so it is UTF-16"),
        ("p.txt", "a".encode("utf-16"), r"p.txt .*UTF-"),
        ("p.jsonl", b'{"prompt": "a"}\nb\n', r"p.jsonl, line 2: not JSON"),
        ("p.jsonl", b'\n{"text": "a"}\n', r'line 2: expected an object with a string "prompt"'),
        ("p.jsonl", b'{"prompt": 3}\n', r"line 1: expected an object"),
        ("p.jsonl", b'{"prompt": ' + b"[" * 100_000, r"line 1: not JSON"),
        ("p.json", b"\n", r"p.json has no prompt"),
        ("p.jsonl", b'"prompt"\n', r"line 1: expected an object"),
    ],
)
def test_an_invalid_file_is_reported(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"prompts_file: .*{complaint}"):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"prompts_file: .*nowhere.txt cannot be read: .*No such file"):
        read_prompts(tmp_path / "nowhere.txt")
