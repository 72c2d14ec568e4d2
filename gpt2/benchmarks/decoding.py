"""The clock of generation: seconds up to the first new token, and for each later one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from gpt2.generation.decode import CompiledDecoding, decode
from gpt2.generation.prompt_lookup import Drafts
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.model import GPT2Model


@dataclass
class Timing:
    """One run of a contestant."""

    clock: list[float]  # at the start and at each token, seconds
    tokens: Tensor  # (b, n)
    is_even: bool = True  # False: a pass yields several tokens

    @property
    def prefill_seconds(self) -> float:
        """Up to the first new token."""
        return self.clock[1] - self.clock[0]

    @property
    def step_seconds(self) -> float:
        """For each later token: the median, or the mean of uneven times."""
        if not self.is_even:
            return (self.clock[-1] - self.clock[1]) / (len(self.clock) - 2)
        return median(after - before for before, after in pairwise(self.clock[1:]))


Generate = Callable[[Tensor, int], Timing]  # (prompts (b, t), number of new tokens)


def ours(model: GPT2Model, compiled: CompiledDecoding | None = None, speculates: bool = False) -> Generate:
    def run(input_ids: Tensor, max_new_tokens: int) -> Timing:
        sampler = partial(next_token, params=SamplingParams(do_sample=False))
        clock, tokens = [time.perf_counter()], []
        drafts = Drafts() if speculates else None
        for token, _ in decode(model, input_ids, max_new_tokens, sampler, compiled=compiled, drafts=drafts):
            tokens.append(token.tolist())
            clock.append(time.perf_counter())
        return Timing(clock, torch.tensor(tokens).T, is_even=not speculates)

    return run
