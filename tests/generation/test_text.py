"""Text streams: stop strings, seeds, batches and speed figures."""

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
    """The expected result of `before_stop`: the shortest prefix that ends with a stop string, without that string."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("stops", [[], ["b"], ["ab"], ["aab"], ["aba", "bb"], ["abab", "ba"], ["aaa", "a"]], ids=str)
def test_a_text_ends_before_its_first_stop_string_for_any_pieces(stops):
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(list("ab"), size=random.integers(0, 12)))
        borders = sorted(random.integers(0, len(text) + 1, size=3).tolist())
        pieces = [text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)]
        assert "".join(before_stop(iter(pieces), stops)) == cut(text, stops)


def test_only_a_possible_prefix_of_a_stop_string_is_delayed():
    pieces = list(before_stop(iter(["one", " two\n", "\r three", "\n", "\n four"]), ["\n\n"]))
    assert pieces == ["one", " two", "\n\r three", "", ""]


def test_stop_strings_end_a_text_and_do_not_change_it(model):
    config = InferenceConfig(max_new_tokens=40, repetition_penalty=1.0, seed=2)
    whole = "".join(stream_text(model, BYTES, "ab", config, 2))
    stop = whole[10:12]
    config.stop = [stop]
    assert "".join(stream_text(model, BYTES, "ab", config, 2)) == whole[: whole.index(stop)]


def test_generation_can_continue_after_the_end_of_a_document(model):
    """With a model that always predicts the end."""
    model_that_ends = noisy_model(tiny_config(vocab_size=257))
    with torch.no_grad():
        model_that_ends.final_norm.weight.zero_()
        model_that_ends.final_norm.bias.copy_(model_that_ends.token_embedding.weight[256] * 100)
    config = InferenceConfig(max_new_tokens=3, do_sample=False, repetition_penalty=1.0)
    assert "".join(stream_text(model_that_ends, BYTES, "ab", config, 0)) == ""
    config.stop_at_end_of_text = False
    assert "".join(stream_text(model_that_ends, BYTES, "ab", config, 0)) == "<|endoftext|>" * 3


def test_an_empty_stop_string_is_refused(model):
    with pytest.raises(UserError, match=r"inference.stop: an empty text"):
        list(stream_text(model, BYTES, "ab", InferenceConfig(stop=["x", ""]), 0))


def test_min_p_of_one_is_greedy(model):
    greedy = InferenceConfig(max_new_tokens=20, do_sample=False)
    sampled = InferenceConfig(max_new_tokens=20, min_p=1.0, top_k=None, top_p=None)
    texts = ["".join(stream_text(model, BYTES, "ab", config, 5)) for config in (greedy, sampled)]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------------------------
# Batches

PROMPTS = ["ab", "c" * 12, "\N{SNOWMAN}", "d" * 40]  # the last one is longer than the context


def batch(model: GPT2Model, prompts: list[str], config: InferenceConfig, **options) -> TextBatch:
    seeds = [config.seed] * len(prompts)
    return TextBatch(model, BYTES, [BYTES.encode(prompt) for prompt in prompts], config, seeds, **options)


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_text_does_not_depend_on_its_batch(model, do_sample):
    config = InferenceConfig(max_new_tokens=30, do_sample=do_sample, seed=4)
    alone = ["".join(stream_text(model, BYTES, prompt, config, 4)) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    for some in (slice(None), slice(None, None, -1), slice(1, 3)):
        assert ["".join(text) for text in batch(model, PROMPTS[some], config).texts()] == alone[some]


def test_texts_can_be_read_in_any_order_and_lazily(model):
    config = InferenceConfig(max_new_tokens=30, seed=4, stop_at_end_of_text=False)
    expected = ["".join(text) for text in batch(model, PROMPTS, config).texts()]
    some = batch(model, PROMPTS, config)
    first, last = iter(some.texts()[0]), iter(some.texts()[-1])
    pieces = list(zip(first, last, strict=True))  # alternating pieces of both
    assert ["".join(text) for text in zip(*pieces, strict=True)] == [expected[0], expected[-1]]
    assert len(some.results) == 30
    lazy = batch(model, PROMPTS, config)
    next(iter(lazy.texts()[1]))
    assert len(lazy.results) == 1


def test_log_probabilities_are_those_of_the_model_without_filters(model):
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


def test_only_tokens_up_to_the_end_are_counted(model):
    config = InferenceConfig(max_new_tokens=40, seed=2, stop_at_end_of_text=False)
    whole = batch(model, ["ab"], config)
    list(whole.texts()[0])
    ids = [int(step[0][0]) for step in whole.results]
    stop = next(i for i in ids[5:] if i < 128)  # a token that is a character
    config.stop = [chr(stop)]
    speed = Speed()
    (text,) = batch(model, ["ab"], config, speed=speed).texts()
    list(text)
    assert text.tokens == speed.new_tokens == ids.index(stop) + 1


def test_speed_counts_prompt_and_new_tokens(model):
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
    assert beyond.prompt_tokens == 13, "the window drops the others"
    assert ", generated 14 at " in str(speed)


@pytest.mark.parametrize("stop", [[], ["\ufffd"]], ids=str)
def test_abandoned_texts_release_their_memory_at_once(model, stop):
    """Reference counting frees them, without the cyclic garbage collector."""
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
