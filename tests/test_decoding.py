"""Writing with what was read kept in mind: the same text as without, alone and side by side."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gpt2.generation.decode import Recorder, aligned_right, decode, window_start
from gpt2.generation.kv_cache import KVCache
from gpt2.generation.sampling import next_token
from gpt2.model import GPT2Model
from gpt2.ops.attention import causal_mask
from tests.helpers import finish, noisy_model, padding_mask, random_ids, tiny_config

close = {"atol": 1e-5, "rtol": 1e-5}
greedy = partial(next_token, do_sample=False, repetition_penalty=1.3)


def test_beyond_its_context_the_model_sees_a_window_that_moves_by_a_quarter():
    model = noisy_model(tiny_config(context_length=8), seed=5, std=0.4).eval()
    prompt = random_ids(model.config, 2, 11)  # longer than the context from the start
    tokens, text = finish(model.generate(prompt, 14, do_sample=False))
    for length, token in enumerate(tokens, start=11):
        window = text[:, window_start(length, 8) : length]
        assert torch.equal(token, model(window)[0][:, -1].argmax(-1))


@pytest.mark.parametrize("context", [1, 2, 3, 7, 8, 1024])
def test_the_window_holds_all_that_fits_and_then_at_least_three_quarters(context):
    starts = [window_start(length, context) for length in range(1, 5 * context)]
    assert starts[:context] == [0] * context
    assert starts == sorted(starts)
    sizes = [length - start for length, start in enumerate(starts, start=1)][context:]
    assert all(context - max(1, context // 4) < size <= context for size in sizes)
    moves = len(set(starts)) - 1
    assert moves <= 4 * 4 + 1 or context < 8


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.3}], ids=str)
@pytest.mark.parametrize("length", [1, 5, 16, 23])
def test_with_and_without_a_cache_the_text_is_the_same(options, length):
    """From an empty page, to the edge of the context, and far beyond it."""
    model = noisy_model(tiny_config(), seed=length)
    prompt = random_ids(model.config, 3, length)
    cached, recomputed = (finish(model.generate(prompt, 30, **options, use_cache=flag))[1] for flag in (True, False))
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 9], [1, 15]], ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_text_in_pieces_through_a_cache_is_the_text_in_one(pieces, side):
    model = noisy_model(tiny_config()).eval()
    input_ids = random_ids(model.config, 3, 16)
    mask = None if side is None else padding_mask(side, 3, 16)
    whole = model._hidden_states(input_ids, mask)
    cache, parts = KVCache(model.config.num_layers, 16), []
    for piece in input_ids.split(pieces, dim=1):
        until = cache.used + piece.size(1)
        parts.append(model._hidden_states(piece, None if mask is None else mask[:, :until], cache.blocks))
    assert_close(torch.cat(parts, dim=1), whole, **close)


def test_with_a_cache_the_model_reads_each_token_once():
    model = noisy_model(tiny_config())
    read = []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].size(1)))
    finish(model.generate(random_ids(model.config, 2, 5), 10))
    assert read == [5] + [1] * 9


def test_a_cache_takes_keys_in_the_format_that_the_model_computes_in():
    model = noisy_model(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, _ = finish(model.generate(random_ids(model.config, 2, 5), 4, do_sample=False))
    assert len(tokens) == 4


@pytest.mark.parametrize("t", [None, 1, 3, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_lets_each_token_see_itself_and_the_real_ones_before(side, t):
    real = padding_mask(side, 4, 5)
    mask = causal_mask(real, t)
    for row in range(4):
        for i, looking in enumerate(range(5 - (t or 5), 5)):
            seen = [place for place in range(5) if place == looking or (place < looking and real[row, place])]
            assert mask[row, 0, i].nonzero()[:, 0].tolist() == seen


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def texts_of_lengths(model: GPT2Model, *lengths: int) -> list[torch.Tensor]:
    return [random_ids(model.config, 1, length, seed=length) for length in lengths]


def padded(texts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts in one batch, and where they are real; the padding is a token that a text could have."""
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
def test_a_text_among_others_is_the_text_alone(lengths, side, use_cache):
    """Of all lengths, up to where each text has outgrown the context at a time of its own."""
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, *lengths)
    input_ids, real = padded(texts, side)
    init_distributed = list(decode(model, input_ids, 30, greedy, real, use_cache))
    for row, text in enumerate(texts):
        alone = list(decode(model, text, 30, greedy))
        assert torch.equal(new_tokens(init_distributed)[row : row + 1], new_tokens(alone))
        for (_, logits), (_, expected) in zip(init_distributed, alone, strict=True):
            assert_close(logits[row : row + 1], expected, **close)


def test_generate_takes_the_mask_too():
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, 2, 6)
    input_ids, real = padded(texts, "left")
    tokens, whole = finish(model.generate(input_ids, 9, do_sample=False, attention_mask=real))
    assert torch.equal(whole, torch.cat((input_ids, torch.stack(tokens, dim=1)), dim=1))
    for row, text in enumerate(texts):
        assert torch.equal(whole[row, -9:], finish(model.generate(text, 9, do_sample=False))[1][0, -9:])


def test_with_randomness_of_its_own_a_drawn_text_does_not_depend_on_the_others():
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, 3, 11, 6)

    def drawn(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        choose = partial(next_token, temperature=1.3, top_k=20, top_p=0.9, generator=generators)
        input_ids, real = padded([texts[row] for row in rows], "left")
        return new_tokens(decode(model, input_ids, 30, choose, real))

    all_of_them = drawn([0, 1, 2])
    assert torch.equal(drawn([2, 0]), all_of_them[[2, 0]])
    assert torch.equal(drawn([1]), all_of_them[[1]])


@pytest.mark.parametrize(
    ("input_ids", "mask", "complaint"),
    [
        ([[]], None, "a text without a token"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "a text without a token"),
        ([[1, 2]], [[1, 1, 1]], r"attention_mask is of shape \(1, 3\), of input_ids \(1, 2\)"),
    ],
    ids=str,
)
def test_texts_that_make_no_sense_are_refused(input_ids, mask, complaint):
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
        ({"max_new_tokens": -1}, "-1 new tokens"),
    ],
)
def test_values_out_of_range_are_refused(options, complaint):
    model = noisy_model(tiny_config())
    with pytest.raises(ValueError, match=complaint):
        next(model.generate(torch.tensor([[1]]), **{"max_new_tokens": 1, **options}))


# ---------------------------------------------------------------------------------------------------------------------
# The step that CUDA records: without CUDA, the same step


@pytest.mark.parametrize("lengths", [(5,), (3, 3), (9, 23, 1)], ids=str)
def test_a_step_with_fixed_shapes_writes_the_same(lengths):
    model = noisy_model(tiny_config(), seed=3)
    input_ids, real = padded(texts_of_lengths(model, *lengths), "left")
    recorder = Recorder(model)
    for _ in range(2):  # the second on the memory of the first
        plain, recorded = (new_tokens(decode(model, input_ids, 30, greedy, real, recorder=r)) for r in (None, recorder))
        assert torch.equal(plain, recorded)


def test_a_step_is_kept_for_texts_of_like_shape():
    recorder = Recorder(noisy_model(tiny_config(context_length=512)))
    step = recorder.step(2, 100)
    assert step.length == 128
    assert recorder.step(2, 128) is step
    assert recorder.step(2, 129) is not step
    assert recorder.step(1, 1000).length == 512


def test_two_texts_that_share_a_step_do_not_disturb_each_other():
    model = noisy_model(tiny_config(), seed=3)
    texts = texts_of_lengths(model, 4, 6)
    recorder = Recorder(model)
    expected = [new_tokens(decode(model, text, 9, greedy)) for text in texts]
    streams = [decode(model, text, 9, greedy, recorder=recorder) for text in texts]
    mixed = zip(*zip(*streams, strict=True), strict=True)  # a step of one, a step of the other, ...
    for steps, tokens in zip(mixed, expected, strict=True):
        assert torch.equal(new_tokens(steps), tokens)


@pytest.mark.slow
def test_the_step_compiles_into_one_graph():
    model = noisy_model(tiny_config(), seed=3)
    input_ids, real = padded(texts_of_lengths(model, 9, 3), "left")
    compiled = new_tokens(decode(model, input_ids, 30, greedy, real, recorder=Recorder(model, compiled=True)))
    assert torch.equal(compiled, new_tokens(decode(model, input_ids, 30, greedy, real)))


@pytest.mark.slow
def test_more_shapes_compile_than_the_compiler_keeps(monkeypatch):
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 3)  # 8, of which each takes seconds
    model = noisy_model(tiny_config(num_layers=1))
    recorder = Recorder(model, compiled=True)
    for b in range(1, 6):
        assert len(list(decode(model, random_ids(model.config, b, 3), 2, greedy, recorder=recorder))) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_step_on_cuda_writes_the_same(compiled):
    model = noisy_model(tiny_config(), seed=3).cuda()
    input_ids, real = (tensor.cuda() for tensor in padded(texts_of_lengths(model, 9, 23, 1), "left"))
    recorder = Recorder(model, compiled)
    for _ in range(2):
        plain, recorded = (new_tokens(decode(model, input_ids, 30, greedy, real, recorder=r)) for r in (None, recorder))
        assert torch.equal(plain, recorded)


def test_padding_is_moved_to_the_left_and_becomes_a_token_of_the_text():
    input_ids = torch.tensor([[1, 2, 9, 9], [9, 3, 4, 5], [9, 6, 7, 9], [1, 2, 3, 4]])
    moved = aligned_right(input_ids, input_ids != 9)
    assert moved.tolist() == [[2, 2, 1, 2], [5, 3, 4, 5], [7, 7, 6, 7], [1, 2, 3, 4]]


def test_of_texts_beyond_the_context_only_those_are_read_anew_whose_window_moves():
    model = noisy_model(tiny_config(context_length=64))
    input_ids, real = padded(texts_of_lengths(model, *range(30, 62, 4)), "left")
    read = []
    model.token_embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    list(decode(model, input_ids, 200, greedy, real))
    # A window of 49 is read every 16 tokens, and each token once.
    assert sum(read[1:]) < 8 * 200 * (1 + 49 / 16) * 1.2


def test_two_writers_on_a_model_in_training_leave_it_so():
    model = noisy_model(tiny_config()).train()
    first, second = (decode(model, text, 5, greedy) for text in texts_of_lengths(model, 3, 4))
    next(first)
    list(second)
    assert model.training
    first.close()
    assert model.training
