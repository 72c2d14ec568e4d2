"""Each sampling filter equals the logits processor of `transformers` of the same name."""

from typing import get_type_hints

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt2.config import InferenceConfig
from gpt2.generation.sampling import (
    FILTERS,
    SamplingParams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
    penalize_repetition,
)

VOCABULARY = 50


def test_sampling_params_are_fields_of_the_config():
    """Options are passed to `next_token` by name."""
    params, config = get_type_hints(SamplingParams), get_type_hints(InferenceConfig)
    assert params == {name: config[name] for name in params}
    assert FILTERS.keys() <= params.keys()
    values = {"temperature": 0.3, "top_k": 7, "top_p": 0.2, "min_p": 0.1, "repetition_penalty": 2.0, "do_sample": False}
    assert vars(SamplingParams.from_config(InferenceConfig(**values))) == values


def random_logits(b: int = 64, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def random_ids(b: int = 64, t: int = 20, seed: int = 1) -> torch.Tensor:
    """With t=20 of 50, tokens repeat within a row, and most rows lack some."""
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


CASES = [
    *((penalize_repetition, RepetitionPenaltyLogitsProcessor, penalty) for penalty in (1.0, 1.2, 5.0, 0.5)),
    *((keep_top_k, TopKLogitsWarper, k) for k in (1, 2, 17, VOCABULARY - 1, VOCABULARY, 10 * VOCABULARY)),
    *((keep_top_p, TopPLogitsWarper, p) for p in (1e-9, 1e-6, 0.1, 0.5, 0.95, 0.999999)),
    *((keep_min_p, MinPLogitsWarper, p) for p in (0.0, 1e-6, 0.05, 0.5, 1.0)),
]
named = {"ids": lambda value: getattr(value, "__name__", str(value))}


def apply(ours, logits: torch.Tensor, input_ids: torch.Tensor, value: float) -> torch.Tensor:
    return ours(logits, input_ids, value) if ours is penalize_repetition else ours(logits, value)


@pytest.mark.parametrize(("ours", "theirs", "value"), CASES, **named)
def test_filter_equals_transformers(ours, theirs, value):
    for spread in (0.1, 3.0, 30.0):
        logits, input_ids = random_logits(spread=spread), random_ids()
        expected = theirs(value)(input_ids, logits.clone())
        assert_close(apply(ours, logits, input_ids, value), expected, atol=0, rtol=0)


@pytest.mark.parametrize(("ours", "theirs", "value"), CASES, **named)
def test_filter_is_pure_and_rows_are_independent(ours, theirs, value):
    logits, input_ids = random_logits(), random_ids()
    before = logits.clone()
    together = apply(ours, logits, input_ids, value)
    alone = [apply(ours, logits[i : i + 1], input_ids[i : i + 1], value) for i in range(len(logits))]
    assert torch.equal(logits, before)
    assert_close(together, torch.cat(alone), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("keep", "off"),
    [(keep_top_k, None), (keep_top_p, None), (keep_top_p, 1.0), (keep_min_p, None), (keep_min_p, 0.0)],
)
def test_a_filter_that_is_off_changes_nothing(keep, off):
    logits = random_logits(spread=30.0)  # some probabilities are 0 in fp32
    assert torch.equal(keep(logits, off), logits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "penalty"),
    [(None, None, None, 1.0), (10, 0.8, None, 1.3), (3, None, None, 2.0), (None, 0.5, None, 1.1), (20, 0.8, 0.1, 1.0)],
)
def test_next_token_is_sampled_from_the_distribution_of_transformers(temperature, top_k, top_p, min_p, penalty):
    """In the order of transformers' generate(): penalty, temperature, top-k, top-p, min-p."""
    logits, input_ids = random_logits(b=512), random_ids(b=512)
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    probabilities = chain(input_ids, logits.clone()).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(7))[:, 0]

    generator = torch.Generator().manual_seed(7)
    params = SamplingParams(True, temperature, penalty, top_k, top_p, min_p)
    drawn = next_token(logits, input_ids, params, generator)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"temperature": 1e-8}, {"do_sample": False}], ids=str)
def test_greedy_is_the_argmax_after_the_penalty(greedy):
    logits, input_ids = random_logits(), random_ids()
    expected = RepetitionPenaltyLogitsProcessor(3.0)(input_ids, logits.clone()).argmax(-1)
    assert torch.equal(next_token(logits, input_ids, SamplingParams(repetition_penalty=3.0, **greedy)), expected)
    assert not torch.equal(expected, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-8, 9e-6])
def test_greedy_is_the_first_maximum_for_ties_and_huge_logits(temperature):
    """Ties give the first token, and huge logits are not divided by the temperature, which would make them infinite."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 1e35, 2e35, 1e34]]).repeat(50, 1)
    tokens = next_token(logits, torch.zeros(100, 0, dtype=torch.long), SamplingParams(temperature=temperature))
    assert tokens.tolist() == [1, 2] * 50


def test_a_low_temperature_samples():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(100, -1)
    params, random = SamplingParams(temperature=1e-5), torch.Generator().manual_seed(0)
    assert set(next_token(logits, torch.zeros(100, 0, dtype=torch.long), params, random).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("p", [0.125, 0.25, 0.5, 0.75])
def test_top_p_keeps_no_more_tokens_than_it_needs(p):
    """With eight equal tokens, whose probabilities and sums are exact."""
    kept = keep_top_p(torch.zeros(3, 8), p).isfinite().sum(-1)
    assert kept.tolist() == [8 * p] * 3
    assert TopPLogitsWarper(p)(None, torch.zeros(3, 8)).isfinite().sum(-1).tolist() == kept.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    nothing_before = torch.zeros(draws, 0, dtype=torch.long)
    drawn = next_token(logits.expand(draws, -1), nothing_before, SamplingParams(temperature=temperature), generator)
    observed = drawn.bincount(minlength=7)
    expected = (logits / temperature).softmax(-1) * draws
    assert observed[6] == 0
    chi_square = ((observed - expected)[:6] ** 2 / expected[:6]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: 999 of 1000 seeds pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_sampled_in_fp32(dtype):
    logits, input_ids = random_logits(b=4096).to(dtype), random_ids(b=4096)

    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3)
    drawn, expected = (
        next_token(x, input_ids, params, torch.Generator().manual_seed(1)) for x in (logits, logits.float())
    )
    assert torch.equal(drawn, expected)
