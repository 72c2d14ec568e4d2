"""Text to tokens and back. There is one kind of tokenizer, GPT-2's byte-level BPE, and three sources of its merges:
OpenAI's (`gpt2`, or a folder that holds such a vocabulary), none at all (`bytes`), or those of a corpus (`train`).
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.config import UserError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"


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


class GPT2Tokenizer:
    """GPT-2's byte-level BPE. Every text can be encoded, and decodes to itself.

    `<|endoftext|>` in a text is thirteen ordinary characters: the special token `eos_token_id` exists as a number
    only, so no text, from a corpus or from a user, can ever bring it in.
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
        self.vocabulary = vocabulary
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
        """Read `vocab.json` and `merges.txt`, as OpenAI and `transformers` write them.

        Raises:
            UserError: A file is missing or is not what its name says.
        """
        folder = Path(folder)
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise UserError(f"data.tokenizer: {folder} holds no {name}")
        try:
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            return cls(vocabulary, merges)  # type: ignore[arg-type]  # a line of other than two words fails in here
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"data.tokenizer: {folder} is no GPT-2 tokenizer: {error}") from error

    @classmethod
    def from_hub(cls, name: str = "gpt2") -> "GPT2Tokenizer":
        """OpenAI's tokenizer from the Hugging Face Hub, or from its cache.

        Raises:
            UserError: The Hub cannot be reached and the cache does not hold it.
        """
        from gpt2.hub import hub_file

        return cls.from_folder({hub_file(name, file).parent for file in ("vocab.json", "merges.txt")}.pop())

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

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Half a surrogate pair, which is no character, becomes a question mark."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts on all the threads that `RAYON_NUM_THREADS` allows."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    # Tokens to text

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token."""
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        by_id = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        return [bytes(byte_of[character] for character in token) for token in by_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens. Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, each character as soon as it is whole; joined, what `decode` gives."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes[i])
        yield decoder.decode(b"", final=True)
