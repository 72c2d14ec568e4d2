"""GPT-2's byte-level BPE tokenizer (Radford et al., 2019; after Sennrich et al., 2016).

A text is divided into words by `PATTERN`, each word into its UTF-8 bytes, and the bytes are merged into tokens by a
list of merges, which is learned from a corpus. The merges are OpenAI's (`gpt2`), those of a folder, none (`bytes`), or
learned from the training text (`train`).
"""

import codecs
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import UserError, one_line
from gpt2.runtime.plain_values import brief

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
# Files of `transformers` with added tokens, beside those of the tokenizer.
ADDED_FILES = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
ADDED_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")  # fields of an added token
MAX_LEARNED_WORD = 1000  # bytes
# OpenAI's pattern, for tiktoken. The ByteLevel of the `tokenizers` library has it built in.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a GPT-2 vocabulary, as in OpenAI's `bytes_to_unicode`.

    Printable Latin-1 characters stand for themselves, the other bytes are U+0100 and up, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitute = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitute)) for byte in range(256)]


def _make_backend(model: "tokenizers.models.Model", added: Iterable[dict[str, Any]] = ()) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(**token) for token in added])
    return backend


def _check_kind(description: dict[str, Any], folder: Path) -> None:
    """Refuse a `tokenizer.json` whose tokens are not those of the BPE that `_make_backend` makes."""
    model, words = description["model"], description.get("pre_tokenizer") or {}
    other_options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    reasons = {
        f"its model is {model.get('type')}, not BPE": model.get("type", "BPE") != "BPE",
        "its BPE has options that GPT-2 does not use": any(map(model.get, other_options)),
        "it normalizes the text": description.get("normalizer") is not None,
        f"it splits the text by {words.get('type')}, not ByteLevel": words.get("type") != "ByteLevel",
        "it adds a space before the text": words.get("add_prefix_space", False),
        "it does not split the text into words": not words.get("use_regex", True),
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        raise UserError(f"tokenizer: {folder / 'tokenizer.json'} is not a GPT-2 tokenizer: {reason}")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_added(folder: Path, description: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a folder. Versions of `transformers` keep them in different files.

    Tokens that have a name, such as `pad_token`, are special, and so is `<|endoftext|>`.

    Args:
        description: The content of `tokenizer.json`; empty if there is none.
    """
    config, names, ids = (_read_json(folder / name) if (folder / name).is_file() else {} for name in ADDED_FILES)
    if config.get("add_prefix_space"):
        raise UserError(f"tokenizer: {folder / ADDED_FILES[0]} adds a space before the text, which GPT-2 does not")
    named = [value for key, value in (config | names).items() if key.endswith("_token")]
    special = {END_OF_TEXT, *(token["content"] if isinstance(token, dict) else token for token in named if token)}
    if "added_tokens_decoder" in config:
        added = [{**token, "id": int(i)} for i, token in config["added_tokens_decoder"].items()]
    else:
        extra = config.get("additional_special_tokens") or []
        added = [{"content": token, "id": i, "normalized": True, "special": token in extra} for token, i in ids.items()]
        added += description.get("added_tokens") or []
    tokens = {content: {"content": content} for content in special} | {token["content"]: token for token in added}
    return [
        {**token, "special": content in special or token.get("special", False)} for content, token in tokens.items()
    ]


class GPT2Tokenizer:
    """GPT-2's byte-level BPE. It encodes every text, and decoding returns the text.

    `<|endoftext|>` in a text is encoded as thirteen ordinary characters. No corpus or prompt can contain the special
    token `eos_token_id`, unless `encode` is called with `allow_special_tokens`. The same holds for other special
    tokens. Words that were added to a tokenizer as ordinary tokens are found in every text.
    """

    def __init__(
        self, vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[dict[str, Any]] | None = None
    ):
        """
        Args:
            vocabulary: The id of each token, in characters of `byte_alphabet`. Ids are 0..n-1.
            merges: Pairs of tokens to merge, by falling priority.
            added: Tokens that are searched for in a text before it is divided into words: their `content` and the
                flags of `tokenizers.AddedToken`. None: the tokens that no merge produces, as special tokens.

        Raises:
            UserError: The vocabulary lacks a byte or `<|endoftext|>`, has other ids, or does not fit the merges.
        """
        from tokenizers import models

        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise UserError(f"tokenizer: the ids of its {len(vocabulary)} tokens are not 0..{len(vocabulary) - 1}")
        if missing := [token for token in (*byte_alphabet(), END_OF_TEXT) if token not in vocabulary]:
            raise UserError(f"tokenizer: its vocabulary lacks {missing[0]!r}, so it is not GPT-2's byte-level BPE")
        declared = {token["content"] for token in added or []}
        if foreign := set("".join(vocabulary.keys() - declared)) - set(byte_alphabet()):
            raise UserError(
                f"tokenizer: {min(foreign)!r} in its vocabulary stands for no byte, so it is not GPT-2's BPE"
            )
        self.vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        self.merges = merges
        self.eos_token_id = vocabulary[END_OF_TEXT]
        if added is None:
            added = self._special_by_default
        known = (token for token in added if token["content"] in vocabulary)
        self.added = _with_all_flags(sorted(known, key=lambda token: vocabulary[token["content"]]))
        try:
            self.backend = _make_backend(models.BPE(vocab=vocabulary, merges=merges), self.added)
            self.backend.encode_special_tokens = True  # encode their names as text
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(f"tokenizer: its merges or added tokens do not fit its vocabulary: {error}") from error

    @classmethod
    def of_bytes(cls) -> "GPT2Tokenizer":
        """A tokenizer without merges: the id of a token is its byte, and `<|endoftext|>` is 256."""
        return cls({token: i for i, token in enumerate([*byte_alphabet(), END_OF_TEXT])}, [])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "GPT2Tokenizer":
        """Learn merges from texts until there are `vocab_size` tokens, or no pair of tokens occurs twice.

        Words of more than `MAX_LEARNED_WORD` bytes are cut: the time to learn a word is quadratic in its length.

        Raises:
            UserError: `vocab_size` is below 257, or `texts` is a single text.
        """
        if isinstance(texts, str):
            raise UserError(f"tokenizer: {brief(texts)} is not a list of texts")
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise UserError(f"tokenizer: {vocab_size} tokens are too few for the 256 bytes and {END_OF_TEXT}")
        backend = _make_backend(models.BPE())
        cut = pre_tokenizers.FixedLength(length=MAX_LEARNED_WORD)
        backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, cut])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # <|endoftext|> is added last, as in OpenAI's vocabulary
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        backend.train_from_iterator(texts, trainer)
        learned = json.loads(backend.to_str())["model"]
        vocabulary = {**learned["vocab"], END_OF_TEXT: len(learned["vocab"])}
        return cls(vocabulary, [(left, right) for left, right in learned["merges"]])

    @classmethod
    def from_folder(cls, folder: str | Path) -> "GPT2Tokenizer":
        """Read `tokenizer.json` of `transformers`, or else OpenAI's `vocab.json` and `merges.txt`.

        Raises:
            UserError: A file is missing or invalid, or describes another kind of tokenizer.
        """
        folder = Path(folder)
        try:
            description: dict[str, Any] = {}
            if (folder / "tokenizer.json").is_file():
                description = _read_json(folder / "tokenizer.json")
                _check_kind(description, folder)
                vocabulary, pairs = description["model"]["vocab"], description["model"]["merges"]
            elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
                vocabulary = _read_json(folder / "vocab.json")
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
                pairs = [line for line in lines if line and not line.startswith("#version")]
            else:
                raise UserError(f"tokenizer: {folder} holds neither tokenizer.json nor vocab.json with merges.txt")
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
            added = _read_added(folder, description)
            vocabulary = {**vocabulary, **{token["content"]: token["id"] for token in added if "id" in token}}
            try:
                return cls(vocabulary, merges, added)  # fails if an entry of `merges` is not a pair
            except UserError as error:
                raise UserError(f"{error} (in {folder})") from error
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise UserError(f"tokenizer: {folder} holds no GPT-2 tokenizer: {error}") from error

    def to_folder(self, folder: str | Path, context_length: int) -> None:
        """Write the files that `from_folder`, and `AutoTokenizer.from_pretrained` of `transformers`, read."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT),
            "padding_side": "left",  # so that a batch of prompts can be continued
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_hub(cls, name: str = "gpt2") -> "GPT2Tokenizer":
        """The tokenizer of a model on the Hugging Face Hub or in its cache.

        Raises:
            UserError: It is in neither.
        """
        from gpt2.runtime.hub import WITHOUT_NETWORK, hub_folder

        return cls.from_folder(hub_folder(name, [*TOKENIZER_FILES, *ADDED_FILES], WITHOUT_NETWORK))

    @classmethod
    def from_json(cls, text: str) -> "GPT2Tokenizer":
        """The tokenizer that `to_json` wrote.

        Raises:
            UserError: The text is another one.
        """
        try:
            saved = json.loads(text)
            merges = [(left, right) for left, right in saved["merges"]]
            return cls(saved["vocabulary"], merges, saved.get("added"))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise UserError(f"tokenizer: not one that was saved by this program: {one_line(error)}") from error

    def to_json(self) -> str:
        """The tokenizer as a string, for checkpoints and caches."""
        added = {} if self.added == self._special_by_default else {"added": self.added}
        return json.dumps({"vocabulary": self.vocabulary, "merges": self.merges, **added}, ensure_ascii=False)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers with equal vocabularies, merges and added tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def __len__(self) -> int:
        return self.vocab_size

    @cached_property
    def _text_tokens(self) -> dict[str, int]:
        """The vocabulary without the tokens that no merge produces: `<|endoftext|>`, and any that were added later."""
        from_text = {*byte_alphabet(), *("".join(pair) for pair in self.merges)} - {END_OF_TEXT}
        return {token: i for token, i in self.vocabulary.items() if token in from_text}

    @property
    def _special_by_default(self) -> list[dict[str, Any]]:
        unmade = [token for token in self.vocabulary if token not in self._text_tokens]
        return _with_all_flags([{"content": token, "special": True} for token in unmade])

    @cached_property
    def added_words(self) -> list[str]:
        """The added tokens that are not special, which are found in every text."""
        return [token["content"] for token in self.added if not token["special"]]

    @cached_property
    def ids_in_use(self) -> int:
        """The size of the vocabulary that a model needs: one more than the largest id in a tokenized corpus."""
        return 1 + max(self.vocabulary[token] for token in (END_OF_TEXT, *self._text_tokens, *self.added_words))

    def encode(self, text: str, allow_special_tokens: bool = False) -> list[int]:
        """The tokens of a text. A lone surrogate, which is not a character, is replaced by a question mark.

        Args:
            allow_special_tokens: Encode the names of special tokens, such as `<|endoftext|>`, as these tokens.
        """
        backend = self._backend_with_special_tokens if allow_special_tokens else self.backend
        return backend.encode(_without_surrogates(text), add_special_tokens=False).ids

    @cached_property
    def _backend_with_special_tokens(self) -> "tokenizers.Tokenizer":
        return _make_backend(self.backend.model, self.added)

    def encode_batch(self, texts: list[str]) -> "list[np.ndarray]":
        """The tokens of each text, as from `encode` but several times faster. Thread-safe."""
        return self._batch_encoder(texts)

    @cached_property
    def _batch_encoder(self) -> "Callable[[list[str]], list[np.ndarray]]":
        """The fastest exact encoder of many texts. Making it takes longer than encoding a prompt."""
        import numpy as np

        if not self.merges and not self.added_words:
            ids = np.array([self.vocabulary[token] for token in byte_alphabet()], dtype=np.uint32)
            return lambda texts: [ids[np.frombuffer(text.encode("utf-8", "replace"), np.uint8)] for text in texts]
        if reason := self._reason_against_tiktoken():
            log.warning("Note: tokenizing with tokenizers, not several times faster with tiktoken: %s.", reason)
            return self._encode_with_tokenizers
        return self._tiktoken_encoder()

    def _encode_with_tokenizers(self, texts: list[str]) -> "list[np.ndarray]":
        import numpy as np

        encodings = self.backend.encode_batch_fast([*map(_without_surrogates, texts)], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _tiktoken_encoder(self) -> "Callable[[list[str]], list[np.ndarray]]":
        import numpy as np
        import tiktoken

        ranks = {self.token_bytes[i]: i for i in self._text_tokens.values()}
        special = {END_OF_TEXT: self.eos_token_id}
        encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

        def encode(text: str) -> np.ndarray:
            try:
                return encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # a lone surrogate, or a run of spaces that is too long for its regular expressions
                return np.array(self.encode(text), dtype=np.uint32)

        return lambda texts: [encode(text) for text in texts]

    def _reason_against_tiktoken(self) -> str | None:
        """Why tiktoken would give other tokens than the merges do; None if it gives the same.

        tiktoken has no list of merges. Of all neighbors that form a token it merges those with the lowest id, and it
        never splits a word that is a token. It gives the same tokens if (1) ids rise in the order of the merges and
        (2) the merges turn the bytes of each token into that token. Proof by induction over the ids: neighbors form a
        token in a text by the merges that form it from its own bytes, since a merge across its borders would have been
        earlier and would have left no such neighbors.
        """
        from tokenizers import Tokenizer, pre_tokenizers

        if self.added_words:
            return "words were added to it"
        merged = [self.vocabulary["".join(pair)] for pair in self.merges]
        if not all(earlier < later for earlier, later in pairwise(merged)):
            return "its ids do not rise in the order of its merges"
        words = Tokenizer(self.backend.model)  # its words are separated by a space, which stands for no byte
        words.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
        tokens = list(self._text_tokens)
        lines = [" ".join(tokens[start : start + 500]) for start in range(0, len(tokens), 500)]
        encodings = words.encode_batch_fast(lines, add_special_tokens=False)
        if [i for encoding in encodings for i in encoding.ids] != list(self._text_tokens.values()):
            return "its merges do not reach every token of its vocabulary"
        return None

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, by its id."""
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        literal = {token["content"] for token in self.added} - self._text_tokens.keys()
        return [
            token.encode() if token in literal else bytes(byte_of[character] for character in token)
            for token in self.vocabulary
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8, such as a part of a character, become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode tokens one by one. A character is yielded as soon as its last byte is decoded.

        Ids outside the vocabulary are skipped: a model with a padded vocabulary can generate some, and in labels -100
        stands for no token.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes[i] if 0 <= i < self.vocab_size else b"")
        yield decoder.decode(b"", final=True)


def _with_all_flags(added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Added tokens with all of their flags. The results for lists of the same meaning are equal.

    GPT-2 normalizes no text: `normalized` only decides which tokens are searched for after the others.
    """
    differ = len({token.get("normalized", False) for token in added}) > 1
    tokens = [
        {"content": token["content"], **{flag: token.get(flag, False) for flag in ADDED_FLAGS}} for token in added
    ]
    return [{**token, "normalized": differ and token["normalized"]} for token in tokens]


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
