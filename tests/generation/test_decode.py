"""Decoding gives the same text with and without a cache, alone and in a batch, dynamic and compiled."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from gpt2.generation.decode import CompiledDecoding, Decoder, align_right, decode, window_start
from gpt2.generation.kv_cache import KVCache
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.model import GPT2Model
from tests.helpers import finish, noisy_model, random_ids, tiny_config

close = {"atol": 1e-5, "rtol": 1e-5}
greedy = partial(next_token, params=SamplingParams(do_sample=False, repetition_penalty=1.3))


def test_beyond_the_context_a_window_moves_by_a_quarter():
    model = noisy_model(tiny_config(context_length=8), seed=5, std=0.4).eval()
    prompt = random_ids(model.config, 2, 11)  # longer than the context
    tokens, text = finish(model.generate(prompt, 14, do_sample=False))
    for length, token in enumerate(tokens, start=11):
        window = text[:, window_start(length, 8) : length]
        assert torch.equal(token, model(window)[0][:, -1].argmax(-1))


@pytest.mark.parametrize("context", [1, 2, 3, 7, 8, 1024])
def test_the_window_holds_at_least_three_quarters_of_the_context(context):
    starts = [window_start(length, context) for length in range(1, 5 * context)]
    assert starts[:context] == [0] * context
    assert starts == sorted(starts)
    sizes = [length - start for length, start in enumerate(starts, start=1)][context:]
    assert all(context - max(1, context // 4) < size <= context for size in sizes)
    moves = len(set(starts)) - 1
    assert moves <= 4 * 4 + 1 or context < 8


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("length", [1, 5, 16, 23])
def test_cached_text_equals_uncached_text(options, length):
    """For prompts of one token to far more than the context."""
    model = noisy_model(tiny_config(), seed=length)
    prompt = random_ids(model.config, 3, length)
    cached, recomputed = (finish(model.generate(prompt, 30, **options, use_cache=flag))[1] for flag in (True, False))
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize("given", [True, False], ids=["columns", "last column"])
@pytest.mark.parametrize("prompt", [16, 1, 5])
def test_hidden_states_from_a_cache_equal_those_of_one_pass(prompt, given):
    model = noisy_model(tiny_config()).eval()
    input_ids = random_ids(model.config, 3, 16)
    cache = KVCache(model.config.num_layers, b=3, length=16)
    prefill = [partial(layer.prefill, rows=[0, 1, 2]) for layer in cache.layers]
    parts = [model._hidden_states(input_ids[:, :prompt], past=prefill)]
    for t in range(prompt, 16):
        columns = torch.full((3,), t)
        where = columns if given else None
        append = [partial(layer.append, visible=t + 1, columns=where) for layer in cache.layers]
        parts.append(model._hidden_states(input_ids[:, t : t + 1], past=append, positions=columns[:, None]))
    assert_close(torch.cat(parts, dim=1), model._hidden_states(input_ids), **close)


def test_the_cache_makes_the_model_read_each_token_once():
    model = noisy_model(tiny_config())
    read = []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].size(1)))
    finish(model.generate(random_ids(model.config, 2, 5), 10))
    assert read == [5] + [1] * 9


def test_the_cache_has_the_number_format_of_autocast():
    model = noisy_model(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, _ = finish(model.generate(random_ids(model.config, 2, 5), 4, do_sample=False))
    assert len(tokens) == 4


def test_the_cache_of_a_bf16_model_is_in_fp32_on_a_cpu():
    """Attention to keys and values in bf16 is several times slower on a CPU."""
    model = noisy_model(tiny_config()).to(torch.bfloat16).eval()
    texts, real = padded(texts_of_lengths(model, 3, 9, 23), "left")
    decoder = Decoder(model, texts, 9, real)
    with torch.no_grad():
        for _ in range(9):
            logits = decoder.next_logits()
            decoder.append(logits.argmax(-1))
    assert (logits.dtype, decoder.cache.layers[0].memory.dtype) == (torch.bfloat16, torch.float32)
    for row, text in enumerate(decoder.text):
        n = decoder.lengths[row] - 1  # all but the last token
        window = text[-n - 1 : -1][window_start(n, 16) :]
        assert_close(logits[row], model(window[None])[0][0, -1], atol=0.1, rtol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def texts_of_lengths(model: GPT2Model, *lengths: int) -> list[torch.Tensor]:
    return [random_ids(model.config, 1, length, seed=length) for length in lengths]


def padded(texts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as one batch, and its attention mask. The padding is a token that a text could have."""
    longest = max(text.size(1) for text in texts)
    sides = [(0, longest - text.size(1)) if side == "right" else (longest - text.size(1), 0) for text in texts]
    rows = [F.pad(text, widths, value=7) for text, widths in zip(texts, sides, strict=True)]
    real = [F.pad(torch.ones_like(text), widths) for text, widths in zip(texts, sides, strict=True)]
    return torch.cat(rows), torch.cat(real)


def new_tokens(steps) -> torch.Tensor:
    """(b, n)"""
    return torch.stack([token for token, _ in steps], dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(1, 5, 3), (16, 2), (9, 23, 14, 1), (4, 4)], ids=str)
def test_a_text_in_a_batch_equals_the_text_alone(lengths, side, use_cache):
    """Also beyond the context, where each text's window moves at a different step."""
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, *lengths)
    input_ids, real = padded(texts, side)
    together = list(decode(model, input_ids, 30, greedy, real, use_cache))
    for row, text in enumerate(texts):
        alone = list(decode(model, text, 30, greedy))
        assert torch.equal(new_tokens(together)[row : row + 1], new_tokens(alone))
        for (_, logits), (_, expected) in zip(together, alone, strict=True):
            assert_close(logits[row : row + 1], expected, **close)


def test_generate_with_an_attention_mask():
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, 2, 6)
    input_ids, real = padded(texts, "left")
    tokens, whole = finish(model.generate(input_ids, 9, do_sample=False, attention_mask=real))
    assert torch.equal(whole, torch.cat((input_ids, torch.stack(tokens, dim=1)), dim=1))
    for row, text in enumerate(texts):
        assert torch.equal(whole[row, -9:], finish(model.generate(text, 9, do_sample=False))[1][0, -9:])


def test_a_sampled_text_with_its_own_generator_does_not_depend_on_its_batch():
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, 3, 11, 6)

    def drawn(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9)
        sampler = partial(next_token, params=params, generators=generators)
        input_ids, real = padded([texts[row] for row in rows], "left")
        return new_tokens(decode(model, input_ids, 30, sampler, real))

    all_of_them = drawn([0, 1, 2])
    assert torch.equal(drawn([2, 0]), all_of_them[[2, 0]])
    assert torch.equal(drawn([1]), all_of_them[[1]])


@pytest.mark.parametrize(
    ("input_ids", "mask", "complaint"),
    [
        ([[]], None, "at least one token"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "at least one token"),
        ([[1, 2]], [[1, 1, 1]], r"attention_mask has shape \(1, 3\), but input_ids \(1, 2\)"),
    ],
    ids=str,
)
def test_invalid_texts_are_refused(input_ids, mask, complaint):
    model = noisy_model(tiny_config())
    mask = mask if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=complaint):
        next(decode(model, torch.tensor(input_ids, dtype=torch.long), 1, greedy, mask))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is not"),
        ({"top_k": 0, "top_p": 2.0}, "top_k: 0 is not .*; top_p: 2.0 is not"),
        ({"min_p": 2.0}, "min_p: 2.0 is not"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not"),
        ({"max_new_tokens": -1}, "max_new_tokens: -1 is negative"),
    ],
)
def test_values_out_of_range_are_refused(options, complaint):
    model = noisy_model(tiny_config())
    with pytest.raises(ValueError, match=complaint):
        next(model.generate(torch.tensor([[1]]), **{"max_new_tokens": 1, **options}))


# ---------------------------------------------------------------------------------------------------------------------
# The static cache and the compiled step


@pytest.mark.parametrize(
    ("lengths", "backend"), [((5,), "eager"), ((3, 3), "eager"), ((9, 23, 1), "eager"), ((9, 3), "aot_eager")], ids=str
)
@torch._dynamo.config.patch(recompile_limit=1)  # one compilation serves all steps
def test_the_static_cache_gives_the_logits_of_the_dynamic_one(lengths, backend):
    model = noisy_model(tiny_config(), seed=3)
    input_ids, real = padded(texts_of_lengths(model, *lengths), "left")
    compiled = CompiledDecoding(backend=backend)
    expected = list(decode(model, input_ids, 30, greedy, real))
    for _ in range(2):  # the second text reuses the memory of the first
        for step, (tokens, logits) in zip(decode(model, input_ids, 30, greedy, real, compiled=compiled), expected):  # noqa: B905
            assert torch.equal(step[0], tokens)
            assert_close(step[1], logits, **close)


def test_a_static_cache_is_reused_for_texts_of_similar_shape():
    config = tiny_config(context_length=512)
    compiled = CompiledDecoding()
    cache = compiled.cache_for(config, 2, 100)
    assert cache.length == 128
    assert compiled.cache_for(config, 2, 128) is cache
    assert compiled.cache_for(config, 2, 129) is not cache
    assert compiled.cache_for(config, 1, 1000).length == 512


def test_two_texts_that_share_a_static_cache_do_not_affect_each_other():
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, 4, 6)
    compiled = CompiledDecoding(backend="eager")
    expected = [new_tokens(decode(model, text, 9, greedy)) for text in texts]
    streams = [decode(model, text, 9, greedy, compiled=compiled) for text in texts]
    interleaved = zip(*zip(*streams, strict=True), strict=True)  # alternating steps of both
    for steps, tokens in zip(interleaved, expected, strict=True):
        assert torch.equal(new_tokens(steps), tokens)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_shapes_compile_than_the_compiler_caches():
    model = noisy_model(tiny_config(num_layers=1))
    compiled = CompiledDecoding(backend="eager")
    for b in range(1, 5):
        assert len(list(decode(model, random_ids(model.config, b, 3), 2, greedy, compiled=compiled))) == 2


def test_a_compiled_step_changes_only_inputs_of_fixed_address():
    """The compiler makes no CUDA graph of a step that changes other inputs."""
    seen = []

    def compiler(graph, _inputs):
        about = torch._guards.TracingContext.get().fw_metadata
        changed = {number for number, info in enumerate(about.input_info) if info.mutates_data}
        seen.append((changed, set(about.static_input_indices)))
        return graph.forward

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, keep_inference_input_mutations=True)
    model = noisy_model(tiny_config())
    list(decode(model, random_ids(model.config, 2, 3), 5, greedy, compiled=CompiledDecoding(backend=backend)))
    ((changed, fixed),) = seen
    assert len(changed) == model.config.num_layers
    assert changed < fixed


@pytest.mark.slow
def test_the_compiled_step_generates_the_same_text():
    """With the options that are used on CUDA; a CPU ignores CUDA graphs. On CUDA: tests/gpu/test_decode.py."""
    model = noisy_model(tiny_config(), seed=3)
    input_ids, real = padded(texts_of_lengths(model, 9, 23, 1), "left")
    compiled = CompiledDecoding()
    for _ in range(2):
        expected, tokens = (
            new_tokens(decode(model, input_ids, 30, greedy, real, compiled=c)) for c in (None, compiled)
        )
        assert torch.equal(tokens, expected)


def test_align_right():
    input_ids = torch.tensor([[1, 2, 9, 9], [9, 3, 4, 5], [9, 6, 7, 9], [1, 2, 3, 4]])
    moved = align_right(input_ids, input_ids != 9)
    assert moved.tolist() == [[2, 2, 1, 2], [5, 3, 4, 5], [7, 7, 6, 7], [1, 2, 3, 4]]


def test_tokens_are_recomputed_only_when_a_window_moves():
    model = noisy_model(tiny_config(context_length=64))
    input_ids, real = padded(texts_of_lengths(model, *range(30, 62, 4)), "left")
    read = []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    list(decode(model, input_ids, 200, greedy, real))
    # A window of 49 tokens is read every 16 tokens, and each token once.
    assert sum(read[1:]) < 8 * 200 * (1 + 49 / 16) * 1.2


def test_interleaved_decoding_leaves_a_model_in_training_mode():
    model = noisy_model(tiny_config()).train()
    first, second = (decode(model, text, 5, greedy) for text in texts_of_lengths(model, 3, 4))
    next(first)
    list(second)
    assert model.training
    first.close()
    assert model.training
