"""From tokens to text on the screen."""

import numpy as np
import pytest
import torch

from gpt2.config import InferenceConfig, UserError
from gpt2.inference import Speed, before_stop, stream_text
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


def test_the_speed_counts_what_was_read_and_written(model):
    speed = Speed()
    config = InferenceConfig(max_new_tokens=7, stop_at_end_of_text=False)
    list(stream_text(model, BYTES, "abc", config, 1, speed))
    assert (speed.prompt_tokens, speed.new_tokens) == (3, 7)
    assert speed.prefill_seconds > 0
    assert str(speed).startswith("read 3 tokens at ")
