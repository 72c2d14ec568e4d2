"""TextGenerator: how a model is loaded, and several texts of one prompt."""

from pathlib import Path

import pytest
import torch

from gpt2.config import InferenceConfig
from gpt2.errors import UserError
from gpt2.inference import TextGenerator
from gpt2.runtime import device
from tests.helpers import write_tokenizer


@pytest.fixture
def trained(folder: Path) -> str:
    """A folder with a model with a context of 16 tokens, which are bytes."""
    write_tokenizer(folder)
    return str(folder)


def test_a_text_longer_than_the_context_is_reported_once(trained, caplog):
    generator = TextGenerator(trained, "cpu")
    with caplog.at_level("INFO"):
        generator.generate_text("a", InferenceConfig(max_new_tokens=15))
        assert "its context" not in caplog.text
        for _ in range(2):
            generator.generate_text("ab", InferenceConfig(max_new_tokens=15))
    assert caplog.text.count("Beyond its context of 16 tokens") == 1


def test_several_texts_of_one_seed_differ_and_are_reproducible(trained, capsys):
    config = InferenceConfig(max_new_tokens=20, num_return_sequences=2, seed=1)
    generator = TextGenerator(trained, "cpu")
    texts = []
    for _ in range(2):
        generator.generate_text("a", config)
        texts.append(capsys.readouterr().out.split("-" * 80 + "\n"))
    assert texts[0] == texts[1]
    assert texts[0][0].strip() != texts[0][1].strip()


def test_sequential_and_batched_texts_are_equal(trained, capsys):
    config = InferenceConfig(max_new_tokens=20, num_return_sequences=5, seed=1)
    printed = []
    for texts in (1, 2, 5, 9):
        TextGenerator(trained, "cpu", texts=texts).generate_text("a", config)
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert printed[0].count("-" * 80) == 4


@pytest.mark.parametrize("emulates", [False, True])
def test_emulated_bf16_is_noted(trained, emulates, caplog, monkeypatch):
    monkeypatch.setattr(device, "computes_in_bf16", lambda _: not emulates)
    with caplog.at_level("INFO"):
        TextGenerator(trained, device="cpu", precision="bf16")
    assert ("this device emulates it" in caplog.text) == emulates


def test_precision_quantization_and_special_tokens(trained):
    options = {"precision": "bf16", "allow_special_tokens": True}
    plain, other = (TextGenerator(trained, "cpu", **options) for options in ({}, options))
    assert (plain.model.token_embedding.weight.dtype, other.model.token_embedding.weight.dtype) == (
        torch.float32,
        torch.bfloat16,
    )
    end = plain.tokenizer.eos_token_id
    assert other.encode("a<|endoftext|>") == [*plain.encode("a"), end]
    assert end not in plain.encode("a<|endoftext|>")
    assert plain.encode("") == [end]
    config = InferenceConfig(max_new_tokens=12, stop_at_end_of_text=False, do_sample=False)
    for quantization in ("int8", "int4"):
        texts = []
        for speculate in (None, "prompt_lookup"):
            generator = TextGenerator(trained, "cpu", quantization=quantization, speculate=speculate)
            (line,) = generator.continuations(["ababab"], config)
            assert (line.prompt, line.tokens) == ("ababab", 12)
            texts.append(line.text)
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        (lambda path: TextGenerator(path, quantization="int3"), "quantization: 'int3' is none of int8, int4, null"),
        (lambda path: TextGenerator(path, precision="fp16"), "precision: 'fp16' is none of auto, fp32, bf16"),
        (lambda path: TextGenerator(path, precision="bf16", quantization="int8"), "contradicts"),
        (lambda path: next(TextGenerator(path).continuations(["a"], InferenceConfig(), 0)), "batch_size: 0 is not"),
        (lambda path: next(TextGenerator(path).continuations("ab", InferenceConfig())), "prompts: ab is not a list"),
        (lambda path: TextGenerator(path).generate_text("a", InferenceConfig(num_return_sequences=0)), "sequences: 0"),
        (
            lambda path: TextGenerator(path).generate_text("a", InferenceConfig(stop="ab")),
            "stop: 'ab' is not a list of texts",
        ),
    ],
)
def test_invalid_options_are_refused(trained, act, complaint):
    with pytest.raises(UserError, match=complaint):
        act(trained)
