"""Folders of `transformers` that hold a tokenizer: read in each of their forms, or refused with the reason."""

import json
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer
from tests.helpers import python_source


def described(tmp_path: Path, **changes) -> Path:
    """A folder with the `tokenizer.json` of a trained tokenizer, with changes at its top level or in its `model`."""
    GPT2Tokenizer.train([python_source()], 300).to_folder(tmp_path, 64)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"].update(changes.pop("model", {}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return tmp_path


def test_either_description_in_a_folder_suffices(tmp_path):
    trained = GPT2Tokenizer.train([python_source()], 300)
    trained.to_folder(tmp_path, context_length=64)
    (tmp_path / "pair").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(tmp_path / "pair" / name)
    for folder in (tmp_path, tmp_path / "pair"):
        assert GPT2Tokenizer.from_folder(folder).fingerprint == trained.fingerprint


def test_merges_in_the_format_of_older_libraries(tmp_path):
    folder = described(tmp_path)
    expected = GPT2Tokenizer.from_folder(folder).fingerprint
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert GPT2Tokenizer.from_folder(folder).fingerprint == expected


def test_added_tokens_outside_the_vocabulary_are_read(tmp_path):
    folder = described(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["<|endoftext|>"]
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "[PAD]"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = GPT2Tokenizer.from_folder(folder)
    assert (tokenizer.eos_token_id, tokenizer.vocab_size, tokenizer.ids_in_use) == (299, 301, 300)
    assert [token["content"] for token in tokenizer.added] == ["<|endoftext|>", "[PAD]"]


OTHER_KINDS = [
    ({"model": {"type": "WordPiece"}}, "its model is WordPiece, not BPE"),
    ({"model": {"ignore_merges": True}}, "its BPE has options that GPT-2 does not use"),
    ({"model": {"dropout": 0.1}}, "its BPE has options"),
    ({"normalizer": {"type": "NFC"}}, "it normalizes the text"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "it splits the text by Whitespace, not ByteLevel"),
    ({"pre_tokenizer": None}, "it splits the text by None"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "it adds a space before the text"),
    ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "it does not split the text into words"),
    ({"model": {"vocab": [1]}}, "holds no GPT-2 tokenizer"),
    ({"model": None}, "holds no GPT-2 tokenizer"),
]


@pytest.mark.parametrize(("changes", "complaint"), OTHER_KINDS, ids=[complaint for _, complaint in OTHER_KINDS])
def test_other_kinds_of_tokenizer_are_refused_with_the_reason(tmp_path, changes, complaint):
    if changes == {"model": None}:
        folder = described(tmp_path)
        (folder / "tokenizer.json").write_text("{}")
    else:
        folder = described(tmp_path, **changes)
    with pytest.raises(UserError, match=complaint):
        GPT2Tokenizer.from_folder(folder)
