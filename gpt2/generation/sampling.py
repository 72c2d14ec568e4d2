"""Sampling: from logits to the next token.

Each filter is a pure function and equals the logits processor of its name in `transformers`, bit for bit. To add one,
write it here, add its field to `SamplingParams` and its line to `FILTERS`, and add the field of the same name to
`InferenceConfig`.

Axes: b sequences, t time, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from gpt2.config import InferenceConfig

# None is PyTorch's global generator. A sequence has one generator a row, so that no row depends on the others.
Generators = torch.Generator | Sequence[torch.Generator] | None

MIN_TEMPERATURE = 1e-5  # below it, logits / temperature overflow fp32: sampling becomes greedy


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Each field has the name, type and meaning of a field of `InferenceConfig`."""

    do_sample: bool = True
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @classmethod
    def from_config(cls, config: InferenceConfig) -> Self:
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def penalize_repetition(logits: Tensor, input_ids: Tensor, penalty: float) -> Tensor:
    """Make tokens that occur in `input_ids` (b, t) less likely (CTRL, Keskar et al., 2019, section 4.1)."""
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, input_ids)
    return logits.scatter(-1, input_ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """Keep the k likeliest tokens of each row (b, v)."""
    if k is None or k >= logits.size(-1):
        return logits
    smallest_kept = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float | None) -> Tensor:
    """Keep the likeliest tokens of each row (b, v) whose probabilities add up to p (nucleus, Holtzman et al., 2020)."""
    if p is None or p >= 1.0:
        return logits
    ascending, order = logits.sort(descending=False)
    probabilities = ascending.softmax(-1)
    if torch.are_deterministic_algorithms_enabled():  # CUDA has no deterministic sum of this kind, and raises an error
        probabilities = probabilities.cpu()
    dropped = (probabilities.cumsum(-1) <= 1 - p).to(logits.device)
    dropped[..., -1] = False  # the likeliest token always stays
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits: Tensor, p: float | None) -> Tensor:
    """Keep the tokens of each row (b, v) at least p times as likely as the likeliest (Nguyen et al., 2024)."""
    if p is None:
        return logits
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}  # field of SamplingParams, in order


def next_token(logits: Tensor, input_ids: Tensor, params: SamplingParams, generators: Generators = None) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: (b, v).
        input_ids: The text so far, (b, t).

    Returns:
        Token ids (b,).
    """
    logits = penalize_repetition(logits.float(), input_ids, params.repetition_penalty)
    if not params.do_sample or params.temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)

    logits = logits / params.temperature
    for name, keep in FILTERS.items():
        logits = keep(logits, getattr(params, name))
    return sample(logits.softmax(-1), generators)


def sample(probabilities: Tensor, generators: Generators = None) -> Tensor:
    """Sample an index (b,) from each row of probabilities (b, v), as `torch.multinomial` does.

    argmax(p / Exp(1)) samples from p without a device sync (exponential-race trick).
    """
    noise = torch.empty_like(probabilities)
    if isinstance(generators, Sequence):
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
    else:
        noise.exponential_(generator=generators)
    return (probabilities / noise).argmax(-1)
