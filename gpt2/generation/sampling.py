"""From logits to the next token: pure functions, each equal to the logits processor of its name in `transformers`.

Axes: b sequences, v vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Where chance comes from: PyTorch's global generator, one for all rows, or one for each, so that a row does not depend
# on the others.
Randomness = torch.Generator | Sequence[torch.Generator] | None

COLDEST = 1e-5  # below it, logits over temperature leave the range of fp32; greedy is what they would amount to


def penalize_repetition(logits: Tensor, input_ids: Tensor, penalty: float) -> Tensor:
    """Make tokens that already stand in `input_ids` (b, t) less likely (CTRL, Keskar et al., 2019, section 4.1)."""
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, input_ids)
    return logits.scatter(-1, input_ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Leave the k likeliest tokens of each row (b, v); a k beyond the vocabulary leaves all."""
    if k is None or k >= logits.size(-1):
        return logits
    smallest_kept = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float | None) -> Tensor:
    """Leave the likeliest tokens of each row (b, v) whose probabilities reach p together (Holtzman et al., 2020)."""
    if p is None or p >= 1.0:
        return logits
    ascending, order = logits.sort(descending=False)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False  # never all of them
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float | None) -> Tensor:
    """Leave the tokens of each row (b, v) at least p times as likely as the likeliest (Nguyen et al., 2024)."""
    if p is None:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def next_token(
    logits: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    do_sample: bool = True,
    generator: Randomness = None,
    min_p: float | None = None,
) -> Tensor:
    """Choose one token a row (b,) from logits (b, v), given what stands before it, input_ids (b, t)."""
    logits = penalize_repetition(logits.float(), input_ids, repetition_penalty)
    if not do_sample or temperature < COLDEST:
        return logits.argmax(-1)
    logits = keep_min_p(keep_top_p(keep_top_k(logits / temperature, top_k), top_p), min_p)
    return sample(logits.softmax(-1), generator)


def sample(probabilities: Tensor, generator: Randomness = None) -> Tensor:
    """One index a row (b,), drawn by its probabilities (b, v): torch.multinomial, without waiting for the device.

    An exponential clock for each index, at the rate of its probability: the first to ring is drawn.
    """
    clocks = torch.empty_like(probabilities)
    if isinstance(generator, Sequence):
        for row, own in zip(clocks, generator, strict=True):
            row.exponential_(generator=own)
    else:
        clocks.exponential_(generator=generator)
    return (probabilities / clocks).argmax(-1)
