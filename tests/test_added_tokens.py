"""Words and special tokens that were added to a tokenizer are found where `transformers` finds them."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from gpt2.checkpoint.pretrained import export, open_model
from gpt2.data import token_writer
from gpt2.data.token_writer import split_into_pieces, write_tokens
from gpt2.errors import UserError
from gpt2.evaluate import bytes_of_tokens
from gpt2.tokenizer import END_OF_TEXT, GPT2Tokenizer
from tests.helpers import nasty_texts, noisy_model, python_source, tiny_config, transformers_twin
from tests.test_tokenizer import batch

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
CONTENTS = [
    "foobar",
    "foo",
    "bar",
    "oba",
    "ar b",
    "new york",
    "new",
    "\n",
    "a\nb",
    "😀",
    "👩🏽",
    "café",
    " x",
    "x ",
    "self",
]
CONTENTS += ["[PAD]", "[P", "<|x|>", "<|endoftext|>!", "é", "  ", "\u3000z", "the the", "1", "'s", "def"]
FRAGMENTS = [*CONTENTS, " ", "  ", "\n", "\t", "a", "b", "_", "f", "oo", "ba", END_OF_TEXT, ".", "A"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[Path]:
    """Folders of a tokenizer of bytes and of one with merges."""
    folders = [tmp_path_factory.mktemp(name) for name in ("bytes", "trained")]
    tokenizers = (GPT2Tokenizer.of_bytes(), GPT2Tokenizer.train([python_source()], 600))
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        tokenizer.to_folder(folder, 4096)
    return folders


def with_added(base: Path, folder: Path, added: list) -> Path:
    """Save the tokenizer of a folder with `transformers` after `add_tokens`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    return folder


def check_against_transformers(folder: Path, texts: list[str]) -> GPT2Tokenizer:
    """Compare all ways to encode with `AutoTokenizer`. Returns our tokenizer."""
    from transformers import AutoTokenizer

    ours, theirs = GPT2Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs)
    expected = [theirs(text, split_special_tokens=True)["input_ids"] for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    assert batch(ours, texts) == expected
    assert [ours.encode(text, allow_special_tokens=True) for text in texts] == [
        theirs(text)["input_ids"] for text in texts
    ]
    return ours


@pytest.mark.parametrize("seed", range(6))
def test_tokens_match_transformers_for_random_words_with_random_flags(bases, tmp_path, seed):
    from tokenizers import AddedToken

    draw = random.Random(seed)
    words = draw.sample(CONTENTS, draw.randrange(1, 10))
    added = [AddedToken(word, **{flag: draw.random() < 0.3 for flag in FLAGS}) for word in words]
    texts = ["".join(draw.choices([*words, *FRAGMENTS], k=draw.randrange(14))) for _ in range(200)]
    for number, base in enumerate(bases):
        ours = check_against_transformers(
            with_added(base, tmp_path / str(number), added), [*texts, *nasty_texts(20, seed)]
        )
        again = GPT2Tokenizer.from_json(ours.to_json())
        assert again.fingerprint == ours.fingerprint
        assert batch(again, texts) == batch(ours, texts)
        (tmp_path / f"{number} again").mkdir()
        ours.to_folder(tmp_path / f"{number} again", 4096)
        assert check_against_transformers(tmp_path / f"{number} again", texts).fingerprint == ours.fingerprint


def declared(number: int, content: str, special: bool, **flags: bool) -> dict[str, dict]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special}
    return {str(number): {"content": content, **plain, "special": special, **flags}}


N = 600
AS_VERSIONS_WROTE_THEM = {
    "added_tokens.json": {
        "added_tokens.json": {"foobar": N, "[PAD]": N + 1},
        "special_tokens_map.json": {"pad_token": "[PAD]", "eos_token": END_OF_TEXT},
    },
    "a name with flags": {
        "added_tokens.json": {"foobar": N, "[PAD]": N + 1, "[X]": N + 2},
        "special_tokens_map.json": {"pad_token": {"content": "[PAD]", "lstrip": True, "rstrip": False}},
        "tokenizer_config.json": {"additional_special_tokens": ["[X]"]},
    },
    "added_tokens_decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": declared(N, "foobar", False, rstrip=True) | declared(N + 1, "[PAD]", False),
            "pad_token": "[PAD]",
            "add_bos_token": False,
            "cls_token": None,
        }
    },
}


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("version", AS_VERSIONS_WROTE_THEM)
def test_files_of_all_versions_are_read(bases, tmp_path, version, with_json):
    files = AS_VERSIONS_WROTE_THEM[version]
    if with_json and "added_tokens.json" in files:
        pytest.skip("versions that wrote this file wrote no tokenizer.json")
    shutil.copytree(bases[1], tmp_path, dirs_exist_ok=True)
    if not with_json:
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for name, content in files.items():
        before = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
        (tmp_path / name).write_text(json.dumps(before | content))
    texts = ["a foobar b [PAD] c [X]<|endoftext|>", "foobarfoobar  x", " [PAD]  [PAD]foobar   False None"]
    assert check_against_transformers(tmp_path, texts).ids_in_use == N + 1


def test_a_prefix_space_that_only_the_configuration_names_is_refused(bases, tmp_path):
    shutil.copytree(bases[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json adds a space before the text"):
        GPT2Tokenizer.from_folder(tmp_path)


def ordinary(*words: str, **flags: bool) -> GPT2Tokenizer:
    """Bytes and some words."""
    vocabulary = GPT2Tokenizer.of_bytes().vocabulary
    vocabulary = {**vocabulary, **{word: 257 + number for number, word in enumerate(words)}}
    special = {"content": END_OF_TEXT, "special": True}
    return GPT2Tokenizer(vocabulary, [], [special, *({"content": word, **flags} for word in words)])


def test_words_are_decoded_counted_and_part_of_the_identity():
    words = ["foobar", "new york", "a\nb", "😀", "café"]
    tokenizer = ordinary(*words)
    assert tokenizer.encode("a foobar b") == [97, 32, 257, 32, 98]
    assert [tokenizer.encode(word) for word in words] == [[257], [258], [259], [260], [261]]
    assert list(tokenizer.stream([257, 32, 260, 0xC3, 261])) == ["foobar", " ", "😀", "", "\ufffdcafé", ""]
    assert tokenizer.ids_in_use == 262
    assert bytes_of_tokens(tokenizer, 264).tolist()[256:] == [0, 6, 8, 3, 4, 5, 0, 0]
    others = [ordinary(*words[::-1]), ordinary(*words, lstrip=True), ordinary(*words, special=True)]
    assert len({other.fingerprint for other in [tokenizer, *others]}) == 4


def test_tokenizer_saved_without_added_tokens_is_read():
    """Checkpoints of an earlier version list no added tokens: tokens that no merge makes are special."""
    old = json.dumps({"vocabulary": {**GPT2Tokenizer.of_bytes().vocabulary, "[PAD]": 257}, "merges": []})
    tokenizer = GPT2Tokenizer.from_json(old)
    assert json.loads(tokenizer.to_json()) == json.loads(old)
    assert 257 not in tokenizer.encode("a[PAD]")
    assert tokenizer.encode("a[PAD]", allow_special_tokens=True) == [97, 257]


@pytest.mark.parametrize("flag", ["", "lstrip", "rstrip", "single_word"])
def test_pieces_of_a_text_do_not_cut_added_words(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(token_writer, "PIECE_LENGTH", 3)
    words = ["new york", "foo", " x", "x ", "a\nb", "longer than a piece"]
    tokenizer = ordinary(*words, **({flag: True} if flag else {}))
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices([*words, " ", "  ", "\n", "a", "b", "foofoo", "new ", "york", "_"], k=30))
        parts = [text[start : start + 7] for start in range(0, len(text), 7)]
        pieces = [piece for piece, _ in split_into_pieces(parts, words)]
        assert pieces == [piece for piece, _ in split_into_pieces([text], words)]
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
    monkeypatch.setattr(token_writer, "MAX_PIECE_LENGTH", 40)
    text = "newyorkfoo" * 20
    assert all(piece.endswith(("foo", "newyork")) for piece, _ in split_into_pieces([text], ["newyork", "foo"]))
    write_tokens([["new ", "york foo"]], tokenizer, tmp_path / "tokens", "test")
    assert (tmp_path / "tokens").read_bytes()[-2:] == (256).to_bytes(2, "little")


def test_training_evaluating_writing_and_exporting_use_the_words(workspace, bases, folder, tmp_path):
    transformers_twin(noisy_model(tiny_config(vocab_size=259), std=0.1)).save_pretrained(folder)
    with_added(bases[0], folder, ["function", "argument):\n"])
    done = workspace.run(
        *("train.py", f"train.init_from={folder}", "data=text", "data.files=[corpus.txt]", "wandb=off"),
        *("train.max_steps=1", "train.batch_size=2", "train.num_workers=0", "train.warmup_steps=0"),
    )
    assert "words were added to it" in done.stdout
    (tokens,) = (workspace.folder / "cache" / "gpt2" / "tokens").glob("*/train.bin")
    expected = GPT2Tokenizer.from_folder(folder).encode((workspace.folder / "corpus.txt").read_text()[:1000])
    assert torch.frombuffer(bytearray(tokens.read_bytes()), dtype=torch.uint16)[: len(expected)].tolist() == expected
    assert {257, 258} <= set(expected)
    (run,) = workspace.runs()
    assert "bits per byte" in workspace.run("evaluate.py", f"checkpoint={run}").stdout
    written = workspace.run("generate.py", f"checkpoint={run}", "prompt=a function", "inference.max_new_tokens=3")
    assert "read 3 tokens" in written.stderr
    export(open_model(str(run)), tmp_path / "out")
    check_against_transformers(tmp_path / "out", ["def function_1(argument):\n", "argument\n  function"])
