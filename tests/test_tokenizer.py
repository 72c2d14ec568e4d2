"""Decoding restores any text, tokens match `transformers`, and text never contains special tokens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.errors import UserError
from gpt2.tokenizer import END_OF_TEXT, GPT2Tokenizer, byte_alphabet
from tests.helpers import ROOT, nasty_texts, python_source, shared

TEXTS = [
    "",
    "Hello, world! It's GPT-2's tokenizer; we'll see, they've said.",
    " leading and trailing ",
    "a  b   c\t\td\n\n\ne \n f\r\n\r\ng\u00a0h\u3000i\u2003 j",
    "    def f(x):\n        return {**x, 'y': [1, 22, 333, 4444]}  # comment\n",
    "naïve café, Ångström, Straße, ﬁne, e\u0301",
    "日本語のテキスト、漢字かな交じり文。한국어 문장. Русский текст",
    "שלום עולם، مرحبا بالعالم",
    "😀👩‍👩‍👧‍👦👍🏽🇩🇪 ☃️",
    "1234567890 3.14159 ½ ٣ Ⅷ 1,000,000",
    "\x00\x01\x1c\x1d\x7f\x85\ufeff\ufffd\u200b",
    "<|endoftext|> in <|endoftext|>the text<|endoftext|",
    "https://example.org/a?b=c&d=%20#e --flag=value ~/path/to/file.tar.gz",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!!!!!!! ______ ======",
    *nasty_texts(200),
]


@pytest.fixture(scope="module")
def trained() -> GPT2Tokenizer:
    return GPT2Tokenizer.train([python_source()], vocab_size=600)


@pytest.fixture(params=["bytes", "trained", "gpt2"])
def tokenizer(request) -> GPT2Tokenizer:
    """Tokenizers of every kind."""
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return (
        GPT2Tokenizer.of_bytes() if request.param == "bytes" else GPT2Tokenizer.from_folder(shared("tokenizers/gpt2"))
    )


def batch(tokenizer: GPT2Tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def write_folder(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Path:
    """`vocab.json` and `merges.txt` as OpenAI wrote them."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


def test_tokens_match_transformers():
    from transformers import GPT2Tokenizer as TheirTokenizer

    folder = shared("tokenizers/gpt2")
    ours, theirs = GPT2Tokenizer.from_folder(folder), TheirTokenizer.from_pretrained(folder)
    assert (len(ours), ours.eos_token_id) == (50257, 50256) == (len(theirs), theirs.eos_token_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, split_special_tokens=True)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_decoding_restores_the_text(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_matches_single_texts(tokenizer):
    assert batch(tokenizer, TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_text_never_contains_the_special_token(tokenizer):
    for text in [END_OF_TEXT, f"a{END_OF_TEXT}b", END_OF_TEXT * 3, f" {END_OF_TEXT}\n", *TEXTS]:
        assert tokenizer.eos_token_id not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eos_token_id]) == END_OF_TEXT


def test_special_tokens_are_encoded_only_if_allowed(tokenizer):
    text = "a<|endoftext|>b <|endoftext|><|endoftext|>"
    end = [tokenizer.eos_token_id]
    allowed = tokenizer.encode(text, allow_special_tokens=True)
    assert allowed == [*tokenizer.encode("a"), *end, *tokenizer.encode("b "), *end, *end]
    assert tokenizer.decode(allowed) == tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id not in tokenizer.encode(text)
    assert tokenizer.encode("", allow_special_tokens=True) == []


def test_saved_tokenizer_is_equal(tokenizer):
    again = GPT2Tokenizer.from_json(tokenizer.to_json())
    assert again.vocabulary == tokenizer.vocabulary
    assert again.merges == [tuple(merge) for merge in tokenizer.merges]
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.fingerprint == tokenizer.fingerprint
    assert batch(again, TEXTS) == batch(tokenizer, TEXTS)


def test_fingerprint_distinguishes_tokenizers(trained):
    others = [GPT2Tokenizer.of_bytes(), GPT2Tokenizer(trained.vocabulary, trained.merges[:-1])]
    assert len({tokenizer.fingerprint for tokenizer in [trained, *others]}) == 3


def test_lone_surrogate_is_replaced():
    """Python represents invalid UTF-8 on the command line this way."""
    tokenizer = GPT2Tokenizer.of_bytes()
    text = tokenizer.decode(tokenizer.encode("a\udcffb"))
    assert (text[0], text[-1]) == ("a", "b")


# ---------------------------------------------------------------------------------------------------------------------
# Batches: tiktoken gives the same tokens as tokenizers, or is not used


def both_ways(tokenizer: GPT2Tokenizer, texts: list[str]) -> None:
    """Compare `encode_batch` with the tokenizers library."""
    expected = [encoding.ids for encoding in tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)]
    for text, ids, right in zip(texts, batch(tokenizer, texts), expected, strict=True):
        assert ids == right, ascii(text[:200])


CONTEXTS = ["{}", "a{}b", " {} ", "1{}{}2", "'{}s.{}!", "\u3000{}\n"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_tiktoken_splits_every_character_like_tokenizers(context):
    """With merges of all neighbors, so that a different split into words would change the tokens."""
    merges = [(left, right) for left in byte_alphabet() for right in "abs12'.!ĠĊ"]
    merges += [(left, right) for left in "ab12'.!ĠĊ" for right in byte_alphabet()]
    merges = list({"".join(pair): pair for pair in merges}.values())
    tokens = [*byte_alphabet(), *map("".join, merges), END_OF_TEXT]
    tokenizer = GPT2Tokenizer({token: i for i, token in enumerate(tokens)}, merges)
    assert tokenizer._reason_against_tiktoken() is None
    # Beyond 16 bits, each character is in one of the contexts. Of Chinese, Hangul, the private and the unassigned
    # characters, which Unicode treats alike, one in 60 is tested.
    dense = [*range(0x3400), *range(0xA000, 0xAC00), *range(0xD7A0, 0xD800), *range(0xF900, 0x10000)]
    alike = [*range(0x3400, 0xA000), *range(0xAC00, 0xD7A0), *range(0xE000, 0xF900), *range(0x20000, 0x110000)]
    number = CONTEXTS.index(context)
    characters = [chr(i) for i in [*dense, *range(0x10000 + number, 0x20000, len(CONTEXTS)), *alike[number::60]]]
    texts = [context.replace("{}", character) for character in characters]
    both_ways(tokenizer, [*texts[:0x300], *texts[0x300::500]])
    # A thousand in a text, separated by a character without merges.
    both_ways(tokenizer, ["\0".join(texts[start : start + 1000]) for start in range(0, len(texts), 1000)])


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 600, 2000])
def test_tiktoken_matches_tokenizers_for_trained_vocabularies(vocab_size):
    tokenizer = GPT2Tokenizer.train([python_source(), *nasty_texts(500)], vocab_size)
    both_ways(tokenizer, [*TEXTS, python_source(), *nasty_texts(3000, seed=1)])


def test_tiktoken_matches_tokenizers_on_random_text(tokenizer):
    random = np.random.default_rng(0)
    both_ways(tokenizer, [random.bytes(200).decode("utf-8", "replace") for _ in range(500)])
    both_ways(tokenizer, [random.bytes(200).decode("latin-1") for _ in range(500)])
    spaces = [
        *" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b",
        "\r\n",
        "a",
        ".",
        "1",
    ]
    both_ways(tokenizer, ["".join(random.choice(spaces, size=30)) for _ in range(2000)])
    letters = [*"sdmtlverSDMTaé1 '’\"<|>", "endoftext", "'ll", "'re", "''s", END_OF_TEXT, " '", "\n'"]
    both_ways(tokenizer, ["".join(random.choice(letters, size=20)) for _ in range(2000)])


def test_tiktoken_matches_tokenizers_on_wikipedia(tokenizer):
    import pyarrow.parquet as parquet

    folder = shared("datasets/wikitext/wikitext-2-sample")
    texts = [text for file in sorted(folder.glob("*.parquet")) for text in parquet.read_table(file)["text"].to_pylist()]
    both_ways(tokenizer, texts)


@pytest.mark.parametrize("run", [" " * 2_000_000 + "a", "\n \n" * 700_000 + "a", "a" * 200_000, "漢" * 50_000])
def test_tiktoken_matches_tokenizers_on_long_runs(trained, run):
    """Some are too long for the regular expressions of tiktoken, which raises an error."""
    both_ways(trained, [run, "short"])


@pytest.mark.parametrize("source", ["bytes", "trained"])
def test_lone_surrogate_in_a_batch_is_replaced(source, trained):
    tokenizer = trained if source == "trained" else GPT2Tokenizer.of_bytes()
    assert batch(tokenizer, ["a\udcffb", "c"]) == [tokenizer.encode("a\udcffb"), tokenizer.encode("c")]


def with_merges(*merges: tuple[str, str], order: int = 1) -> GPT2Tokenizer:
    """Bytes, `<|endoftext|>`, [PAD], and the tokens of the merges, in their order or (-1) in reverse."""
    made = list(dict.fromkeys(map("".join, merges)))[::order]
    return GPT2Tokenizer({token: i for i, token in enumerate([*BYTES, "[PAD]", *made])}, list(merges))


UNREACHED = [
    ("a", "b"),
    ("b", "c"),
    ("a", "bc"),
]  # "abc" becomes "ab" and "c": text never contains the token "abc"


@pytest.mark.parametrize(
    ("tokenizer", "complaint"),
    [
        (lambda: with_merges(("a", "b"), ("b", "c"), order=-1), "its ids do not rise in the order of its merges"),
        (lambda: with_merges(*UNREACHED), "its merges do not reach every token"),
    ],
)
def test_tokenizers_is_used_with_a_warning_where_tiktoken_differs(caplog, tokenizer, complaint):
    texts = ["abc", " abc", "abcabc ab bc", "[PAD]", END_OF_TEXT, "a\udcffb", ""]
    tokenizer = tokenizer()
    assert batch(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert complaint in caplog.text


def test_text_never_contains_added_tokens(caplog):
    tokenizer = with_merges(("a", "b"), ("ab", "c"))
    texts = ["[PAD]", " [PAD]abc", f"{END_OF_TEXT}[PAD]"]
    assert batch(tokenizer, texts) == [tokenizer.encode(text) for text in texts]
    assert not {tokenizer.eos_token_id, tokenizer.vocabulary["[PAD]"]} & {
        i for ids in batch(tokenizer, texts) for i in ids
    }
    assert not caplog.text, "tiktoken is used"


def test_tiktoken_matches_tokenizers_for_random_merges():
    """tiktoken can encode with some of these vocabularies and not with others; all must give the right tokens."""
    random = np.random.default_rng(0)
    suitable = 0
    for _ in range(200):
        tokens, merges = list("abcd"), []
        for _ in range(random.integers(1, 12)):
            pair = (str(random.choice(tokens)), str(random.choice(tokens)))
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
        tokenizer = with_merges(*merges)
        suitable += tokenizer._reason_against_tiktoken() is None
        both_ways(tokenizer, ["".join(random.choice(list("abcd "), size=40)) for _ in range(50)])
    assert 20 < suitable < 180


def test_tokenizer_is_thread_safe():
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = GPT2Tokenizer.train([python_source()], 600)
    texts = python_source().split("\n\n")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: batch(tokenizer, texts), range(4)))
    assert results == [[tokenizer.encode(text) for text in texts]] * 4


def test_import_loads_no_tokenizer_library():
    code = "import sys, gpt2.tokenizer; print({'numpy', 'tiktoken', 'tokenizers'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def test_byte_tokens_are_bytes():
    tokenizer = GPT2Tokenizer.of_bytes()
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.eos_token_id) == (257, 257, 256)
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.token_bytes == [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()]


def test_byte_alphabet_is_that_of_openai():
    from tokenizers import pre_tokenizers

    assert len(set(byte_alphabet())) == 256
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert [byte_alphabet()[byte] for byte in b"A! \n\xad\xff"] == ["A", "!", "Ġ", "Ċ", "Ń", "ÿ"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_training_fills_the_vocabulary_and_compresses(trained):
    text = python_source()
    assert trained.vocab_size == 600
    assert trained.eos_token_id == 599
    assert len(trained.encode(text)) < 0.5 * len(text.encode())


@pytest.mark.parametrize("vocab_size", [257, 258, 300])
def test_trained_vocabulary_is_bounded_and_ends_with_the_special_token(vocab_size):
    tokenizer = GPT2Tokenizer.train(["the cat, the hat, the rat"] * 2, vocab_size)
    assert 257 <= tokenizer.vocab_size <= vocab_size
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 1
    assert (tokenizer.vocab_size > 257) == (vocab_size > 257)


@pytest.mark.parametrize("texts", [[], [""], ["x"], ["abc"]], ids=str)
def test_no_merges_are_learned_without_repeated_pairs(texts):
    assert GPT2Tokenizer.train(texts, 1000).vocabulary == GPT2Tokenizer.train([], 257).vocabulary


def test_training_is_repeatable(trained):
    assert GPT2Tokenizer.train(iter([python_source()]), vocab_size=600).fingerprint == trained.fingerprint


def test_only_long_words_are_cut_for_training(monkeypatch):
    """The time to learn a word is quadratic in its length: a million letters took minutes."""
    texts = [python_source(), *nasty_texts(500)]
    before = GPT2Tokenizer.train(texts, 1000)
    monkeypatch.setattr("gpt2.tokenizer.MAX_LEARNED_WORD", 10**9)
    assert GPT2Tokenizer.train(texts, 1000).fingerprint == before.fingerprint
    monkeypatch.setattr("gpt2.tokenizer.MAX_LEARNED_WORD", 3)
    cut = GPT2Tokenizer.train(["abcdefg" * 9], 1000)
    assert max(map(len, cut.token_bytes[:-1])) == 3


def test_special_token_is_not_learned_from_text():
    tokenizer = GPT2Tokenizer.train([f"{END_OF_TEXT}a{END_OF_TEXT} "] * 100, 400)
    assert tokenizer.eos_token_id not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_folder_holds_the_whole_tokenizer(trained, tmp_path):
    again = GPT2Tokenizer.from_folder(write_folder(tmp_path, trained.vocabulary, trained.merges))
    assert again.fingerprint == trained.fingerprint


def test_windows_line_ends_are_accepted(trained, tmp_path):
    write_folder(tmp_path, trained.vocabulary, trained.merges)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert GPT2Tokenizer.from_folder(tmp_path).fingerprint == trained.fingerprint


BYTES = GPT2Tokenizer.of_bytes().vocabulary
BROKEN = {
    "a byte is missing": (json.dumps({token: i for i, token in enumerate(list(BYTES)[1:])}), ""),
    "the special token is missing": (json.dumps({token: i for i, token in enumerate(list(BYTES)[:-1])}), ""),
    "an id is missing": (json.dumps({**BYTES, "ab": 300}), ""),
    "an id is there twice": (json.dumps({**BYTES, "ab": 5}), ""),
    "an id is no number": (json.dumps({**BYTES, "ab": None}), ""),
    "JSON ends too soon": (json.dumps(BYTES)[:-9], ""),
    "JSON holds a list": (json.dumps(list(BYTES)), ""),
    "a merge has one part": (json.dumps(BYTES), "ab"),
    "a merge has three parts": (json.dumps(BYTES), "a b c"),
    "a merge makes an unknown token": (json.dumps(BYTES), "a b"),
    "a merge joins unknown tokens": (json.dumps({**BYTES, "abc": 257}), "ab c"),
    "a token is no bytes": (json.dumps({**BYTES, "a b": 257}), ""),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_invalid_vocabulary_or_merges_are_a_user_error(tmp_path, fault):
    vocabulary, merges = BROKEN[fault]
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(UserError, match=f"^tokenizer: .*{tmp_path}"):
        GPT2Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "not UTF-8"])
def test_missing_or_binary_file_is_a_user_error(tmp_path, file, content):
    write_folder(tmp_path, BYTES, [])
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        GPT2Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert content is not None or file in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("source", ["bytes", "trained"])
def test_streamed_text_matches_decoded_text(source, trained):
    tokenizer = trained if source == "trained" else GPT2Tokenizer.of_bytes()
    random = np.random.default_rng(0)
    # Draw bytes from 128 on more often: they are valid UTF-8 only in certain sequences.
    unlikely = [i for i, token in enumerate(tokenizer.token_bytes) if max(token) > 127]
    replaced = 0
    for _ in range(500):
        ids = [*random.integers(tokenizer.vocab_size, size=20), *random.choice(unlikely, size=20)]
        random.shuffle(ids)
        text = tokenizer.decode(ids)
        assert "".join(tokenizer.stream(iter(ids))) == text
        assert text == b"".join(tokenizer.token_bytes[i] for i in ids).decode("utf-8", errors="replace")
        assert text == tokenizer.backend.decode(ids, skip_special_tokens=False)
        replaced += "\ufffd" in text
    assert replaced > 400  # most texts contained invalid UTF-8


def test_streamed_text_with_incomplete_characters(trained):
    """Emoji and Chinese characters, which have several tokens, cut anywhere."""
    text = "".join(nasty_texts(40, seed=3)) + "漢字かな交じり文👩🏽‍🚀🇩🇪🏴‍☠️" * 20
    ids = trained.encode(text)
    random = np.random.default_rng(1)
    replaced = 0
    for _ in range(500):
        start = random.integers(len(ids))
        part = ids[start : start + random.integers(1, 30)]
        pieces = list(trained.stream(part))
        assert "".join(pieces) == trained.backend.decode(part, skip_special_tokens=False)
        replaced += "\ufffd" in pieces[-1]
    assert replaced > 50


def test_character_is_streamed_with_its_last_byte():
    tokenizer = GPT2Tokenizer.of_bytes()
    pieces = list(tokenizer.stream(tokenizer.encode("aé€😀b")))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_incomplete_character_is_streamed_at_the_end():
    tokenizer = GPT2Tokenizer.of_bytes()
    assert list(tokenizer.stream("a😀".encode()[:3])) == ["a", "", "", "\ufffd"]


def test_stream_reads_one_token_at_a_time():
    """So that text is printed while the model generates."""
    taken = []

    def ids():
        for i in b"abc":
            taken.append(i)
            yield i

    stream = GPT2Tokenizer.of_bytes().stream(ids())
    assert [next(stream), next(stream)] == ["a", "b"]
    assert taken == [*b"ab"]


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="256 tokens are too few"):
        GPT2Tokenizer.train(["text"], 256)


def test_training_needs_a_list_of_texts():
    with pytest.raises(UserError, match="tokenizer: 'ab ab ab' is not a list of texts"):
        GPT2Tokenizer.train("ab ab ab", 300)


def test_ids_outside_the_vocabulary_are_skipped():
    assert GPT2Tokenizer.of_bytes().decode([97, 257, -100, 98, 9999]) == "ab"
