"""From tokens to text on the screen."""

import gc
import weakref

import numpy as np
import pytest
import torch

from gpt2.config import InferenceConfig
from gpt2.errors import UserError
from gpt2.generation.decode import window_start
from gpt2.generation.text import Speed, TextBatch, before_stop, stream_text
from gpt2.model import GPT2Model
from gpt2.tokenizer import GPT2Tokenizer
from tests.helpers import noisy_model, tiny_config

BYTES = GPT2Tokenizer.of_bytes()


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    return noisy_model(tiny_config(vocab_size=257))


def cut(text: str, stops: list[str]) -> str:
    """What `before_stop` should leave: each beginning of the text is tried, until one ends with a stop."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("stops", [[], ["b"], ["ab"], ["aab"], ["aba", "bb"], ["abab", "ba"], ["aaa", "a"]], ids=str)
def test_a_text_ends_before_what_it_stops_at_however_it_comes_in_pieces(stops):
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(list("ab"), size=random.integers(0, 12)))
        borders = sorted(random.integers(0, len(text) + 1, size=3).tolist())
        pieces = [text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)]
        assert "".join(before_stop(iter(pieces), stops)) == cut(text, stops)


def test_nothing_is_held_back_but_what_may_be_the_beginning_of_a_stop():
    pieces = list(before_stop(iter(["one", " two\n", "\r three", "\n", "\n four"]), ["\n\n"]))
    assert pieces == ["one", " two", "\n\r three", "", ""]


def test_stops_end_a_text_and_what_came_before_is_unchanged(model):
    config = InferenceConfig(max_new_tokens=40, repetition_penalty=1.0, seed=2)
    whole = "".join(stream_text(model, BYTES, "ab", config, 2))
    stop = whole[10:12]
    config.stop = [stop]
    assert "".join(stream_text(model, BYTES, "ab", config, 2)) == whole[: whole.index(stop)]


def test_the_end_of_a_document_may_be_passed(model):
    """A model that is made to want nothing but the end."""
    wants_to_end = noisy_model(tiny_config(vocab_size=257))
    with torch.no_grad():
        wants_to_end.final_norm.weight.zero_()
        wants_to_end.final_norm.bias.copy_(wants_to_end.token_embedding.weight[256] * 100)
    config = InferenceConfig(max_new_tokens=3, do_sample=False, repetition_penalty=1.0)
    assert "".join(stream_text(wants_to_end, BYTES, "ab", config, 0)) == ""
    config.stop_at_end_of_text = False
    assert "".join(stream_text(wants_to_end, BYTES, "ab", config, 0)) == "<|endoftext|>" * 3


def test_an_empty_stop_is_refused(model):
    with pytest.raises(UserError, match=r"inference.stop: an empty text"):
        list(stream_text(model, BYTES, "ab", InferenceConfig(stop=["x", ""]), 0))


def test_the_smallest_share_leaves_only_the_likeliest(model):
    greedy = InferenceConfig(max_new_tokens=20, do_sample=False)
    sampled = InferenceConfig(max_new_tokens=20, min_p=1.0, top_k=None, top_p=None)
    texts = ["".join(stream_text(model, BYTES, "ab", config, 5)) for config in (greedy, sampled)]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------------------------
# Side by side

PROMPTS = ["ab", "c" * 12, "\N{SNOWMAN}", "d" * 40]  # to beyond the context


def batch(model: GPT2Model, prompts: list[str], config: InferenceConfig, **options) -> TextBatch:
    seeds = [config.seed] * len(prompts)
    return TextBatch(model, BYTES, [BYTES.encode(prompt) for prompt in prompts], config, seeds, **options)


@pytest.mark.parametrize("do_sample", [True, False])
def test_what_a_text_says_does_not_depend_on_the_others(model, do_sample):
    config = InferenceConfig(max_new_tokens=30, do_sample=do_sample, seed=4)
    alone = ["".join(stream_text(model, BYTES, prompt, config, 4)) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    for some in (slice(None), slice(None, None, -1), slice(1, 3)):
        assert ["".join(text) for text in batch(model, PROMPTS[some], config).texts()] == alone[some]


def test_texts_may_be_read_in_any_order_and_no_further_than_wanted(model):
    config = InferenceConfig(max_new_tokens=30, seed=4, stop_at_end_of_text=False)
    expected = ["".join(text) for text in batch(model, PROMPTS, config).texts()]
    some = batch(model, PROMPTS, config)
    first, last = iter(some.texts()[0]), iter(some.texts()[-1])
    pieces = list(zip(first, last, strict=True))  # a piece of one, a piece of the other, ...
    assert ["".join(text) for text in zip(*pieces, strict=True)] == [expected[0], expected[-1]]
    assert len(some.results) == 30
    lazy = batch(model, PROMPTS, config)
    next(iter(lazy.texts()[1]))
    assert len(lazy.results) == 1


def test_log_probabilities_are_those_of_the_model_whatever_it_was_drawn_by(model):
    config = InferenceConfig(max_new_tokens=9, temperature=2.0, top_k=5, seed=4, stop_at_end_of_text=False)
    some = batch(model, PROMPTS[:3], config, with_log_probabilities=True)
    for prompt, text in zip(PROMPTS, some.texts()):  # noqa: B905 (all but the longest)
        list(text)
        ids = [int(step[0][text.row]) for step in some.results]
        prompt_ids = BYTES.encode(prompt)
        total = 0.0
        for n, token in enumerate(ids):
            before = (prompt_ids + ids[:n])[window_start(len(prompt_ids) + n, 16) :]
            logits = model.eval()(torch.tensor([before]))[0][0, -1]
            total += logits.log_softmax(-1)[token].item()
        assert text.tokens == 9
        assert text.log_probability == pytest.approx(total, abs=1e-4)


def test_only_tokens_up_to_the_end_count(model):
    config = InferenceConfig(max_new_tokens=40, seed=2, stop_at_end_of_text=False)
    whole = batch(model, ["ab"], config)
    list(whole.texts()[0])
    ids = [int(step[0][0]) for step in whole.results]
    stop = next(i for i in ids[5:] if i < 128)  # a character that is a token
    config.stop = [chr(stop)]
    speed = Speed()
    (text,) = batch(model, ["ab"], config, speed=speed).texts()
    list(text)
    assert text.tokens == speed.new_tokens == ids.index(stop) + 1


def test_the_speed_counts_what_was_read_and_written(model):
    speed = Speed()
    config = InferenceConfig(max_new_tokens=7, stop_at_end_of_text=False)
    for text in batch(model, ["abc", "defg"], config, speed=speed).texts():
        list(text)
    assert (speed.texts, speed.prompt_tokens, speed.new_tokens) == (2, 7, 14)
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    assert str(speed).startswith("read 7 tokens at ")
    beyond = Speed()
    list(batch(model, ["x" * 17], config, speed=beyond).texts()[0])
    assert beyond.prompt_tokens == 13, "what the window leaves of it"
    assert ", generated 14 at " in str(speed)


@pytest.mark.parametrize("stop", [[], ["\ufffd"]], ids=str)
def test_texts_that_are_left_give_their_memory_back_at_once(model, stop):
    """Without a wait for the collector of cycles, which would come at any time, and late."""
    gc.collect()
    gc.disable()
    try:
        some = batch(model, PROMPTS, InferenceConfig(max_new_tokens=30, stop=stop, seed=1))
        texts = some.texts()
        for text in texts:
            next(iter(text))
        steps = weakref.ref(some.steps)
        assert steps() is not None
        del some, texts, text
        assert steps() is None
    finally:
        gc.enable()
