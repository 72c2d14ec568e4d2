"""Text to tokens and back. There is one kind of tokenizer, GPT-2's byte-level BPE, and three sources of its merges:
OpenAI's (`gpt2`, or a folder that holds such a vocabulary), none at all (`bytes`), or those of a corpus (`train`).
"""

import codecs
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt"]
# How OpenAI cuts a text into what is merged: `tokenizers` has the same inside its ByteLevel.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0..255 in a GPT-2 vocabulary (OpenAI's `bytes_to_unicode`).

    Printable Latin-1 stands for itself, the rest for U+0100 and up in order.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_in = iter(range(256, 512))
    return [chr(byte if byte in itself else next(stand_in)) for byte in range(256)]


def _backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


_OTHER_WAYS_TO_MERGE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")


def _refuse_other_kinds(described: dict[str, Any], folder: Path) -> None:
    """Refuse a `tokenizer.json` whose tokens are not those that `_backend` gives."""
    model, cut = described["model"], described.get("pre_tokenizer") or {}
    reasons = {
        f"its model is {model.get('type')}, not BPE": model.get("type", "BPE") != "BPE",
        "its merges are not all that makes a token": any(map(model.get, _OTHER_WAYS_TO_MERGE)),
        "it normalizes the text": described.get("normalizer") is not None,
        f"it cuts the text by {cut.get('type')}, not ByteLevel": cut.get("type") != "ByteLevel",
        "it puts a space before the text": cut.get("add_prefix_space", False),
        "it does not cut the text into words": not cut.get("use_regex", True),
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        raise UserError(f"tokenizer: {folder / 'tokenizer.json'} is no GPT-2 tokenizer: {reason}")


class GPT2Tokenizer:
    """GPT-2's byte-level BPE. Every text can be encoded, and decodes to itself.

    `<|endoftext|>` in a text is thirteen ordinary characters: the special token `eos_token_id` exists as a number
    only, so no text, from a corpus or from a user, can bring it in unless `encode` is told to allow it.
    """

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        """`vocabulary`: token (bytes in `byte_alphabet`) to id; `merges`: pairs of tokens, the first joined first.

        Raises:
            UserError: The vocabulary lacks a byte or `<|endoftext|>`, or its ids are not 0..n-1.
        """
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise UserError(f"tokenizer: the ids of its {len(vocabulary)} tokens are not 0..{len(vocabulary) - 1}")
        lacking = [token for token in (*byte_alphabet(), END_OF_TEXT) if token not in vocabulary]
        if lacking:
            raise UserError(f"tokenizer: its vocabulary lacks {lacking[0]!r}, so it is no GPT-2 byte-level BPE")
        if foreign := set("".join(vocabulary)) - set(byte_alphabet()):
            raise UserError(f"tokenizer: {min(foreign)!r} in its vocabulary stands for no byte, so it is no GPT-2 BPE")
        self.vocabulary = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        self.merges = merges
        self.eos_token_id = vocabulary[END_OF_TEXT]
        try:
            self.backend = _backend(vocabulary, merges)
        except Exception as error:  # tokenizers raises nothing more specific
            raise UserError(f"tokenizer: its merges do not fit its vocabulary: {error}") from error

    # Where a tokenizer comes from

    @classmethod
    def of_bytes(cls) -> "GPT2Tokenizer":
        """A token a byte: id = byte value, and 256 is `<|endoftext|>`."""
        return cls({token: i for i, token in enumerate([*byte_alphabet(), END_OF_TEXT])}, [])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "GPT2Tokenizer":
        """Learn merges from texts until there are `vocab_size` tokens, or no pair of tokens occurs twice."""
        from tokenizers import pre_tokenizers, trainers

        if vocab_size < 257:
            raise UserError(f"tokenizer: {vocab_size} tokens are too few for the 256 bytes and {END_OF_TEXT}")
        backend = _backend({}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # and <|endoftext|>, last as in OpenAI's
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
        """Read `tokenizer.json`, or else `vocab.json` and `merges.txt`, as `transformers` and OpenAI write them.

        Raises:
            UserError: A file is missing or is not what its name says, or describes another kind of tokenizer.
        """
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
                _refuse_other_kinds(described, folder)
                model, added = described["model"], described.get("added_tokens") or []
                vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
                pairs = model["merges"]
            elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
                vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
                pairs = [line for line in lines if line and not line.startswith("#version")]
            else:
                raise UserError(f"tokenizer: {folder} holds neither tokenizer.json nor vocab.json with merges.txt")
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
            return cls(vocabulary, merges)  # a pair of other than two fails in here
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise UserError(f"tokenizer: {folder} holds no GPT-2 tokenizer: {error}") from error

    def to_folder(self, folder: str | Path, context_length: int) -> None:
        """Write what `from_folder`, and `AutoTokenizer.from_pretrained` of `transformers`, read."""
        folder = Path(folder)
        backend = _backend(self.vocabulary, self.merges)  # its own: here the special token is one, in texts too
        backend.add_special_tokens(self.added_tokens)
        backend.save(str(folder / "tokenizer.json"))
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        about = {
            "tokenizer_class": "GPT2Tokenizer",
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def from_hub(cls, name: str = "gpt2") -> "GPT2Tokenizer":
        """The tokenizer of a model on the Hugging Face Hub, or in its cache; by default OpenAI's.

        Raises:
            UserError: The Hub cannot be reached and the cache does not hold it.
        """
        from gpt2.runtime.hub import WITHOUT_NETWORK, hub_folder

        return cls.from_folder(hub_folder(name, TOKENIZER_FILES, WITHOUT_NETWORK))

    @classmethod
    def from_json(cls, text: str) -> "GPT2Tokenizer":
        """What `to_json` wrote."""
        saved = json.loads(text)
        return cls(saved["vocabulary"], [(left, right) for left, right in saved["merges"]])

    def to_json(self) -> str:
        """All of it as one text, for checkpoints and caches."""
        return json.dumps({"vocabulary": self.vocabulary, "merges": self.merges}, ensure_ascii=False)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that tokenize alike."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    # Text to tokens

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def __len__(self) -> int:
        return self.vocab_size

    @cached_property
    def added_tokens(self) -> list[str]:
        """The tokens that no text is encoded to: `<|endoftext|>`, and others that somebody has added, such as [PAD]."""
        from_text = {*byte_alphabet(), *("".join(pair) for pair in self.merges)} - {END_OF_TEXT}
        return [token for token in self.vocabulary if token not in from_text]

    @cached_property
    def ids_in_use(self) -> int:
        """One more than the largest id that stands in a tokenized corpus: what a model's vocabulary must reach."""
        unused = set(self.added_tokens) - {END_OF_TEXT}
        return 1 + max(i for token, i in self.vocabulary.items() if token not in unused)

    def encode(self, text: str, allow_special_tokens: bool = False) -> list[int]:
        """The tokens of a text. Half a surrogate pair, which is no character, becomes a question mark.

        Args:
            allow_special_tokens: Where the text names an added token, such as `<|endoftext|>`, it is that token.
        """
        if allow_special_tokens:
            longest_first = sorted(self.added_tokens, key=len, reverse=True)
            parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)  # what they name is every other one
            encoded = ([self.vocabulary[part]] if n % 2 else self.encode(part) for n, part in enumerate(parts))
            return [i for ids in encoded for i in ids]
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> "list[np.ndarray]":
        """The tokens of each text, as `encode` gives them, several times faster. Any number of threads may call it."""
        return self._batch_encoder(texts)

    @cached_property
    def _batch_encoder(self) -> "Callable[[list[str]], list[np.ndarray]]":
        """The fastest exact way to encode many texts. Made for a corpus: a prompt is not worth its time."""
        if not self.merges:
            return self._encode_bytes()
        if reason := self._why_not_by_rank():
            log.warning("Note: tokenized by tokenizers, not several times faster by tiktoken, because %s.", reason)
            return self._encode_by_merges
        return self._encode_by_rank()

    def _encode_bytes(self) -> "Callable[[list[str]], list[np.ndarray]]":
        """Without merges a token is a byte: looking it up is all."""
        import numpy as np

        ids = np.array([self.vocabulary[token] for token in byte_alphabet()], dtype=np.uint32)
        return lambda texts: [ids[np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)] for text in texts]

    def _encode_by_rank(self) -> "Callable[[list[str]], list[np.ndarray]]":
        """By tiktoken, from this vocabulary alone: it downloads nothing."""
        import numpy as np
        import tiktoken

        group = {self.token_bytes[i]: i for i in self._tokens_of_text.values()}
        special = {END_OF_TEXT: self.eos_token_id}
        encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=group, special_tokens=special)

        def encode(text: str) -> np.ndarray:
            try:
                return encoding.encode_to_numpy(text, disallowed_special=())
            except ValueError:  # half a surrogate pair, or a run of spaces too long for its regular expressions
                return np.array(self.encode(text), dtype=np.uint32)

        return lambda texts: [encode(text) for text in texts]

    def _encode_by_merges(self, texts: list[str]) -> "list[np.ndarray]":
        """By tokenizers, which does exactly what the merges say, whatever they are."""
        import numpy as np

        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    @cached_property
    def _tokens_of_text(self) -> dict[str, int]:
        """The vocabulary without the added tokens."""
        added = set(self.added_tokens)
        return {token: i for token, i in self.vocabulary.items() if token not in added}

    def _why_not_by_rank(self) -> str | None:
        """What keeps tiktoken from giving exactly the tokens of the merges; None: nothing.

        It knows no merges. Of all neighbours that together are a token it joins those whose token has the lowest id,
        and a word that is a token it never takes apart. Let the ids rise in the order of the merges, and let each
        token's own bytes be merged to that token. Then, by induction over the ids, it joins the same neighbours: those
        that make a token in a text are those that make it of its own bytes, for no earlier merge can have reached
        across its ends, or it would not lie there in two parts.
        """
        from tokenizers import Tokenizer, pre_tokenizers

        made = [self.vocabulary["".join(pair)] for pair in self.merges]
        if not all(earlier < later for earlier, later in pairwise(made)):
            return "its ids do not rise in the order of its merges"
        words = Tokenizer(self.backend.model)  # a space, which stands for no byte, parts one token from the next
        words.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
        tokens = list(self._tokens_of_text)
        lines = [" ".join(tokens[start : start + 500]) for start in range(0, len(tokens), 500)]
        encodings = words.encode_batch_fast(lines, add_special_tokens=False)
        found = [i for encoding in encodings for i in encoding.ids]
        if found != list(self._tokens_of_text.values()):
            return "its merges do not reach every token of its vocabulary"
        return None

    # Tokens to text

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token."""
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        return [bytes(byte_of[character] for character in token) for token in self.vocabulary]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens. Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, each character as soon as it is whole; joined, what `decode` gives.

        An id beyond the vocabulary, which a model with a padded head can produce, is no text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes[i] if i < self.vocab_size else b"")
        yield decoder.decode(b"", final=True)
