"""Speculative decoding by prompt lookup (Saxena, 2023): the draft is what followed the same tokens before.

On a CPU, a forward pass over a few tokens takes about as long as one over a single token: both read all weights. So
the newest token and a draft of the next ones are read together. The sampler then chooses one token after the other,
each from the logits after the text that it continues, as without a draft, until a token differs from the draft. Only
the number of passes changes: greedy and sampled texts, penalties, seeds and stops are the same, but for rounding, since
larger products round differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

MAX_PASS_TOKENS = 6  # limit for all texts together: such a pass takes about as long as one over a single token
NGRAMS = (3, 2, 1)  # lengths of the endings that are looked up; the first that occurred before decides


def draft_length(texts: int) -> int:
    """Tokens of a draft if this number of texts is generated side by side; 0 if there is no room for any."""
    return max(0, MAX_PASS_TOKENS // texts - 1)


@dataclass
class Drafts:
    """Counts of speculative decoding, over all texts."""

    passes: int = 0  # forward passes
    drafted: int = 0  # tokens that were read as a draft
    accepted: int = 0  # drafted tokens that were then chosen

    def __str__(self) -> str:
        return f"{self.accepted:,} of {self.drafted:,} drafted tokens accepted, {self.passes:,} passes"


class PromptLookup:
    """Growing texts, and where each n-gram of a text occurred last."""

    def __init__(self, texts: Sequence[list[int]], drafts: Drafts):
        """`drafts`: Counts to add to."""
        self.drafts = drafts
        self.texts: list[list[int]] = [[] for _ in texts]
        self.next: list[dict[tuple[int, ...], int]] = [{} for _ in texts]  # n-gram -> index of the token after it
        for row, text in enumerate(texts):
            for token in text:
                self.append(row, token)

    def append(self, row: int, token: int) -> None:
        text = self.texts[row]
        for n in NGRAMS:
            if n <= len(text):
                self.next[row][tuple(text[-n:])] = len(text)
        text.append(token)

    def draft(self, length: int) -> list[list[int]] | None:
        """The same number of tokens for each text, if there are any for all."""
        drafts = [self._followers(row, length) for row in range(len(self.texts))]
        return drafts if all(drafts) else None

    def _followers(self, row: int, length: int) -> list[int]:
        """What followed the latest earlier occurrence of the text's ending, repeated up to `length`."""
        text = self.texts[row]
        for n in NGRAMS:
            if (start := self.next[row].get(tuple(text[-n:]))) is not None:
                return list(islice(cycle(text[start : start + length]), length))
        return []
