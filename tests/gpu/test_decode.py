"""Decoding on a CUDA device: a CUDA graph generates the same texts, and no step waits for the device."""

from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from gpt2.config import InferenceConfig
from gpt2.generation.decode import CompiledDecoding, decode
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.inference import TextGenerator
from tests.generation.test_decode import new_tokens, padded, texts_of_lengths
from tests.gpu.conftest import no_wait
from tests.helpers import noisy_model, tiny_config, write_tokenizer

greedy = partial(next_token, params=SamplingParams(do_sample=False, repetition_penalty=1.3))
FILTERED = SamplingParams(temperature=0.8, repetition_penalty=1.2, top_k=20, top_p=0.9, min_p=0.01)


@pytest.fixture
def compiled(device) -> CompiledDecoding:
    """Compiled decoding with the options of the product; on a CPU without compiled kernels."""
    counters.clear()
    return CompiledDecoding(**({} if device.type == "cuda" else {"backend": "aot_eager"}))


@pytest.mark.parametrize(
    ("lengths", "dtype"), [((5,), torch.float32), ((9, 23, 1), torch.float32), ((9, 23, 1), torch.bfloat16)], ids=str
)
def test_compiled_step_gives_the_same_text_and_logits(device, compiled, lengths, dtype):
    """Alone and in batches, with windows that move beyond the context, and again in the memory of the first text."""
    model = noisy_model(tiny_config(), seed=3).to(device, dtype).eval()
    input_ids, real = (tensor.to(device) for tensor in padded(texts_of_lengths(model, *lengths), "left"))
    chosen = new_tokens(decode(model, input_ids, 40, greedy, real))
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}

    def forced(number: list[int], logits: torch.Tensor, _text: torch.Tensor) -> torch.Tensor:
        number[0] += 1
        return chosen[:, number[0] - 1].contiguous()

    def logits_of(compiled: CompiledDecoding | None) -> list[torch.Tensor]:
        """The logits of a fixed text, because rounding may decide between two generated tokens."""
        steps = decode(model, input_ids, 40, partial(forced, [0]), real, compiled=compiled)
        return [logits.clone() for _, logits in steps]

    expected = logits_of(None)
    for _ in range(2):
        for one, other in zip(logits_of(compiled), expected, strict=True):
            assert_close(one, other, **near)
    if dtype == torch.float32:
        assert torch.equal(new_tokens(decode(model, input_ids, 40, greedy, real, compiled=compiled)), chosen)
    assert not counters["inductor"]["cudagraph_skips"]  # for example because the step changes an input


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lengths", [(4,), (3, 6)], ids=str)
def test_no_step_waits_for_the_device(device, compiled, lengths, is_compiled):
    """Between two moves of the window, with all filters and a generator for each text."""
    model = noisy_model(tiny_config(context_length=64)).to(device).eval()
    input_ids, real = (tensor.to(device) for tensor in padded(texts_of_lengths(model, *lengths), "left"))
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(len(lengths))]
    sampler = partial(next_token, params=FILTERED, generators=generators)
    for is_watched in (False, True):  # the first run compiles
        steps = decode(model, input_ids, 30, sampler, real, compiled=compiled if is_compiled else None)
        next(steps)  # reads the prompts
        with no_wait(device) if is_watched else nullcontext():
            assert len(list(islice(steps, 29))) == 29


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_generator_writes_the_same_texts_compiled(folder: Path, device, precision):
    """Several prompts in a batch, beyond the context, by greedy decoding and by sampling with a seed."""
    write_tokenizer(folder)
    config = InferenceConfig(max_new_tokens=30, num_return_sequences=2, seed=1, stop_at_end_of_text=False)
    both = [
        TextGenerator(str(folder), str(device), precision=precision, texts=6, compile=flag) for flag in (False, True)
    ]
    assert (both[1].compiled is not None) == (device.type == "cuda")
    prompts = ["a", "def f", "x" * 20]
    plain, compiled = ([line.text for line in generator.continuations(prompts, config)] for generator in both)
    assert len(plain) == len(compiled) == 6
    assert plain == compiled or precision != "fp32"  # rounding may decide between two tokens
