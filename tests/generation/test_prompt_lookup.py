"""Speculative decoding gives the same tokens in fewer passes, whatever the drafts are."""

from functools import partial

import pytest
import torch

from gpt2.config import InferenceConfig
from gpt2.generation.decode import CompiledDecoding, decode
from gpt2.generation.prompt_lookup import MAX_PASS_TOKENS, Drafts, PromptLookup, draft_length
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.generation.text import Speed, TextBatch
from gpt2.model import GPT2Model
from gpt2.tokenizer import GPT2Tokenizer
from tests.helpers import noisy_model, tiny_config

BYTES = GPT2Tokenizer.of_bytes()


def drafted(text: list[int], length: int) -> list[list[int]] | None:
    return PromptLookup([text], Drafts()).draft(length)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2, 3]),
        ([1, 2, 3, 7, 1, 2, 3, 8, 5, 6, 4, 1, 2, 3], [8, 5, 6, 4]),  # the latest occurrence
        ([1, 2, 3, 7, 5, 5, 3, 8, 5, 6, 1, 2, 3], [7, 5, 5, 3]),  # the longest ending
        ([4, 3, 8, 5, 6, 1, 3], [8, 5, 6, 1]),  # a single token, if no longer match occurred
        ([5, 5], [5, 5, 5, 5]),  # a draft may repeat itself
        ([1, 2, 1, 2], [1, 2, 1, 2]),
        ([1, 2, 3], None),
        ([1], None),
    ],
)
def test_the_draft_is_the_continuation_of_an_earlier_match(text, draft):
    assert drafted(text, 4) == (draft and [draft])


def test_texts_of_a_batch_are_drafted_together():
    lookup = PromptLookup([[1, 1], [2]], Drafts())
    assert lookup.draft(2) is None  # the second text has no match
    lookup.append(1, 2)
    assert lookup.draft(2) == [[1, 1], [2, 2]]


def test_a_draft_is_as_long_as_the_rows_of_a_pass_allow():
    assert [draft_length(texts) for texts in (1, 2, 3, 6, 100)] == [
        MAX_PASS_TOKENS - 1,
        MAX_PASS_TOKENS // 2 - 1,
        1,
        0,
        0,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Equal tokens


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    """A model trained on periodic texts, half of them with an end of text in each period, and on noise."""
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(vocab_size=257))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        period, t = torch.randint(2, 5, (16, 1)), torch.arange(17)
        text = torch.randint(48, 70, (16, 1)) + t % period
        has_end = torch.arange(16)[:, None] % 2 == 0
        text = torch.where(has_end & (t % period == period - 1), BYTES.eos_token_id, text)
        text = torch.where(torch.rand(text.shape) < 0.05, torch.randint(48, 70, text.shape), text)
        loss = model(text[:, :-1], targets=text[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def tokens_of(model: GPT2Model, prompts: list[list[int]], count: int, params: SamplingParams, **options):
    """(b, n)"""
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generators = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    sampler = partial(next_token, params=params, generators=generators)
    return torch.stack([token for token, _ in decode(model, rows, count, sampler, mask, **options)], dim=1)


PROMPTS = [
    [[50, 51, 52, 50, 51]],
    [[60]],
    [[70, 71] * 12],
    [[50, 51, 50], [60, 61, 62, 63, 60, 61]],
    [[44], [45] * 9, [46, 47]],
]
PARAMS = [
    SamplingParams(do_sample=False),
    SamplingParams(do_sample=False, repetition_penalty=1.2),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.1),
]


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "penalty", "sampled"])
@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: str([len(prompt) for prompt in prompts]))
def test_the_tokens_are_those_of_plain_decoding(model, prompts, params):
    """For prompts of one token to far beyond the context of 16, alone and in batches, for each number of tokens."""
    expected = tokens_of(model, prompts, 40, params)
    drafts = Drafts()
    assert torch.equal(tokens_of(model, prompts, 40, params, drafts=drafts), expected)
    assert 0 <= drafts.accepted <= drafts.drafted
    assert drafts.passes == 40 - drafts.accepted / len(prompts)
    for count in range(1, 12):
        assert torch.equal(tokens_of(model, prompts, count, params, drafts=Drafts()), expected[:, :count])


def test_a_model_without_repetition_gets_wrong_drafts_and_the_same_tokens():
    drafts, wrong = Drafts(), 0
    for seed in range(20):
        noisy = noisy_model(tiny_config(vocab_size=257), seed=seed, std=0.4).eval()
        prompt = [[1, 2, 3, 1, 2, 3]]
        plain, speculative = (tokens_of(noisy, prompt, 30, PARAMS[1], drafts=d) for d in (None, drafts))
        wrong += not torch.equal(plain, speculative)
    assert not wrong
    assert 0 < drafts.accepted < drafts.drafted


def test_a_repeating_text_takes_few_passes(model):
    drafts = Drafts()
    tokens_of(model, [[50, 51, 50, 51, 50, 51]], 10, PARAMS[0], drafts=drafts)
    assert drafts.passes <= 4  # the prompt, and two of six tokens each
    ignored = Drafts()
    tokens_of(model, [[50, 51, 50]] * (MAX_PASS_TOKENS // 2 + 1), 10, PARAMS[0], drafts=ignored)
    assert ignored == Drafts()  # with so many texts a pass has no room for drafts


@torch._dynamo.config.patch(recompile_limit=2)  # one token, and a whole draft
def test_the_compiled_step_gives_the_same_tokens(model):
    prompts, compiled, drafts = PROMPTS[3], CompiledDecoding(backend="eager"), Drafts()
    expected = tokens_of(model, prompts, 30, PARAMS[0])
    for _ in range(2):
        assert torch.equal(tokens_of(model, prompts, 30, PARAMS[0], compiled=compiled, drafts=drafts), expected)
    assert drafts.accepted


def test_two_texts_that_share_a_static_cache_do_not_affect_each_other(model):
    compiled = CompiledDecoding(backend="eager")
    sampler = partial(next_token, params=PARAMS[0])
    prompts = [torch.tensor([[50, 51, 50, 51]]), torch.tensor([[60, 61, 62, 60]])]
    expected = [torch.cat([token for token, _ in decode(model, prompt, 12, sampler)]) for prompt in prompts]
    streams = [decode(model, prompt, 12, sampler, compiled=compiled, drafts=Drafts()) for prompt in prompts]
    interleaved = zip(*zip(*streams, strict=True), strict=True)  # alternating steps of both
    for steps, tokens in zip(interleaved, expected, strict=True):
        assert torch.equal(torch.cat([token for token, _ in steps]), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Text: pieces, stops, log-probabilities


@pytest.mark.parametrize("count", [1, 7, 30])
@pytest.mark.parametrize("stop", [[], ["32"], ["\x00"]], ids=str)
def test_pieces_stops_and_probabilities_are_the_same(model, stop, count):
    """Also if a stop text, or the end of the text, is in the middle of an accepted draft."""
    config = InferenceConfig(max_new_tokens=count, do_sample=False, repetition_penalty=1.0, stop=stop)
    seen = []
    for drafts in (None, Drafts()):
        speed = Speed(drafts=drafts)
        prompts = [BYTES.encode(text) for text in ("23232", "<=><=>")]
        batch = TextBatch(model, BYTES, prompts, config, [1, 2], speed, with_log_probabilities=True)
        texts = batch.texts()
        pieces = [list(text) for text in texts]
        figures = [(text.tokens, pytest.approx(text.log_probability, abs=1e-4)) for text in texts]
        seen.append((pieces, figures, speed.new_tokens))
    assert seen[0] == seen[1]
    assert drafts.accepted or count == 1


def test_the_end_of_a_text_inside_an_accepted_draft(model):
    """Each token of a repeating text is used as the end-of-text token once."""
    config = InferenceConfig(max_new_tokens=30, do_sample=False, repetition_penalty=1.0)
    accepted = []

    def written(prompt: list[int], end: int | None, drafts: Drafts | None = None) -> list[int]:
        batch = TextBatch(model, BYTES, [prompt], config, [1], Speed(drafts=drafts))
        batch.ends = {end}
        for text in batch.texts():
            list(text)
        return [int(step[0][0]) for step in batch.results]

    prompt = [50, 51, 50, 51]
    tokens = written(prompt, end=None)
    for end in set(tokens[10:]):
        drafts, rest = Drafts(), tokens[10 : 11 + tokens[10:].index(end)]
        assert written(prompt + tokens[:10], end, drafts) == rest
        accepted.append(drafts.accepted)
    assert max(accepted) or len(accepted) == 1
