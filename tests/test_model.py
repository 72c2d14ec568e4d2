"""The model is GPT-2: logits, loss, gradients and greedy text equal those of `transformers`."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from gpt2.config import GPT2Config
from gpt2.model import DecoderBlock, GPT2Model, MultiHeadAttention
from tests.helpers import (
    NO_DROPOUT,
    ROOT,
    finish,
    from_transformers,
    noisy_model,
    padding_mask,
    random_ids,
    tiny_config,
    transformers_twin,
)

SHAPES = [
    {},
    {"num_heads": 1, "num_layers": 1},
    {"d_model": 24, "num_heads": 3, "d_ff": 24, "num_layers": 3, "vocab_size": 7},
    {"d_model": 8, "num_heads": 8, "context_length": 33, "layer_norm_epsilon": 1e-2},
    {"activation": "gelu"},
]
close = {"atol": 1e-5, "rtol": 1e-5}


# ---------------------------------------------------------------------------------------------------------------------
# Equal to transformers


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_loss_and_every_gradient_equal_transformers(shape, padding):
    ours = noisy_model(tiny_config(**shape))
    theirs = transformers_twin(ours).train()
    b, t = 4, ours.config.context_length
    input_ids = random_ids(ours.config, b, t)
    mask = None if padding == "none" else padding_mask(padding, b, t)
    labels = input_ids.clone()
    if mask is not None:
        labels[mask == 0] = -100
    if padding == "left":
        # The prediction of the first real token, from padding, is undefined.
        labels[torch.arange(b), mask.argmax(dim=1)] = -100

    logits, loss = ours(input_ids, labels=labels, attention_mask=mask)
    expected = theirs(input_ids=input_ids, labels=labels, attention_mask=mask)
    real = torch.ones(b, t, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(logits[real], expected.logits[real], **close)
    assert_close(loss, expected.loss, **close)

    loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    expected_gradients = from_transformers(
        ((name, parameter.grad) for name, parameter in theirs.named_parameters()), ours
    )
    assert_close(gradients, expected_gradients, **close)


@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 2), (2, 16)])
def test_logits_equal_transformers_at_any_length(b, t):
    ours = noisy_model(tiny_config())
    input_ids = random_ids(ours.config, b, t)
    assert_close(ours(input_ids)[0], transformers_twin(ours)(input_ids).logits, **close)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
def test_greedy_text_equals_transformers(repetition_penalty):
    ours = noisy_model(tiny_config(), seed=5, std=0.4)  # large weights, so that greedy text does not repeat itself
    prompt = random_ids(ours.config, 3, 4)
    _, text = finish(ours.generate(prompt, 12, do_sample=False, repetition_penalty=repetition_penalty))
    expected = transformers_twin(ours).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=repetition_penalty,
    )
    assert text.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2_medium", 354_823_168), ("gpt2_large", 774_030_080), ("gpt2_xl", 1_557_611_200)],
)
def test_numbers_of_parameters_equal_those_of_openai(name, parameters):
    config = GPT2Config(**OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml"))
    with torch.device("meta"):
        assert GPT2Model(config).num_parameters() == parameters


# ---------------------------------------------------------------------------------------------------------------------
# Attention and padding


@pytest.mark.parametrize("with_mask", [False, True])
def test_logits_do_not_depend_on_later_tokens(with_mask):
    model = noisy_model(tiny_config()).eval()
    input_ids = random_ids(model.config, 1, 10)
    mask = torch.ones_like(input_ids) if with_mask else None
    before, _ = model(input_ids, attention_mask=mask)
    for t in range(1, 10):
        changed = input_ids.clone()
        changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
        after, _ = model(changed, attention_mask=mask)
        assert_close(after[:, :t], before[:, :t])
        assert not torch.isclose(after[:, t:], before[:, t:]).all(dim=-1).any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "module",
    [MultiHeadAttention(16, 4, 0.0, True), DecoderBlock(16, 4, 40, 0.0, 0.0, 1e-5, True)],
    ids=["MultiHeadAttention", "DecoderBlock"],
)
def test_masked_padding_has_no_effect(module, side):
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    mask = padding_mask(side, 5, 7)
    padded = module(x, mask)
    for row in range(5):
        real = mask[row].bool()
        assert_close(padded[row, real], module(x[row : row + 1, real])[0])


def test_a_row_of_padding_alone_gives_no_nan():
    model = noisy_model(tiny_config())
    input_ids = random_ids(model.config, 2, 5)
    mask = torch.tensor([[1] * 5, [0] * 5])
    _, loss = model(input_ids, labels=input_ids.masked_fill(mask == 0, -100), attention_mask=mask)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_targets_are_shifted_labels():
    model = noisy_model(tiny_config())
    text = random_ids(model.config, 2, 9)
    labels = text.clone()
    labels[0, 3] = -100
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), dim=1)
    assert_close(model(text, targets=targets)[1], model(text, labels=labels)[1], atol=0, rtol=0)


def test_loss_is_the_mean_over_targets_that_are_not_ignored():
    model = noisy_model(tiny_config())
    input_ids, targets = random_ids(model.config, 3, 8, seed=1), random_ids(model.config, 3, 8, seed=2)
    targets[0, :] = -100
    targets[1, 2:5] = -100
    logits, loss = model(input_ids, targets=targets)
    counts = targets != -100
    assert_close(loss, F.cross_entropy(logits[counts], targets[counts]))


@pytest.mark.parametrize("argument", ["labels", "targets"])
def test_a_batch_without_targets_has_zero_loss_and_gradient(argument):
    model = noisy_model(tiny_config())
    input_ids = random_ids(model.config, 2, 5)
    _, loss = model(input_ids, **{argument: torch.full_like(input_ids, -100)})
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_without_labels_there_is_no_loss():
    model = noisy_model(tiny_config())
    assert model(random_ids(model.config, 1, 3))[1] is None


def test_one_batch_can_be_memorized():
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(d_model=32))
    batch = random_ids(model.config, 4, 16)
    # The first tokens differ, so that each determines what follows.
    batch[:, 0] = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(batch, labels=batch)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(batch, labels=batch)[1].item() < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Construction


@pytest.mark.parametrize("num_layers", [2, 8])
def test_initial_weights_are_distributed_as_in_gpt2(num_layers):
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(vocab_size=500, context_length=128, d_model=128, d_ff=256, num_layers=num_layers))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            is_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            std = 0.02 / (2 * num_layers) ** 0.5 if is_residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * std, name


def test_untrained_model_guesses_uniformly():
    """Its loss is log(vocab_size)."""
    torch.manual_seed(0)
    model = GPT2Model(tiny_config(vocab_size=500))
    input_ids = random_ids(model.config, 8, 16)
    loss = model(input_ids, labels=input_ids)[1]
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.05)


def test_use_bias_false_removes_all_biases():
    linear = [module for module in GPT2Model(tiny_config(use_bias=False)).modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 8
    assert all(module.bias is None for module in linear)


@pytest.mark.parametrize("kind", NO_DROPOUT)
def test_each_dropout_acts_in_training_only(kind):
    model = noisy_model(tiny_config(**{kind: 0.5}))
    input_ids = random_ids(model.config, 2, 8)
    training = [model.train()(input_ids)[0] for _ in range(2)]
    evaluating = [model.eval()(input_ids)[0] for _ in range(2)]
    assert not torch.allclose(*training)
    assert torch.equal(*evaluating)


@pytest.mark.parametrize("silent", ["attention.out", "feed_forward.down"])
def test_residual_dropout_acts_on_both_branches(silent):
    torch.manual_seed(0)
    block = DecoderBlock(16, 4, 40, 0.5, 0.0, 1e-5, True)
    x = torch.randn(2, 8, 16)
    for parameter in block.get_submodule(silent).parameters():
        nn.init.zeros_(parameter)  # this branch adds nothing: any change comes from the other
    assert not torch.allclose(block(x), block(x))


def test_gradient_checkpointing_recomputes_and_gives_the_same_numbers():
    model = noisy_model(tiny_config(dropout=0.1, attention_dropout=0.1, residual_dropout=0.1))
    input_ids = random_ids(model.config, 2, 8)
    mask = padding_mask("right", 2, 8)
    passes = []
    model.blocks[0].attention.register_forward_hook(lambda *_: passes.append(1))

    def loss_and_gradients(checkpointing: bool):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(3)  # recomputation must sample the same dropout
        loss = model(input_ids, labels=input_ids, attention_mask=mask)[1]
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    plain = loss_and_gradients(False)
    assert len(passes) == 1
    assert_close(loss_and_gradients(True), plain, atol=0, rtol=0)
    assert len(passes) == 3


def test_flops_per_token_equal_those_counted_by_pytorch():
    config = tiny_config(vocab_size=512, context_length=64, d_model=64, d_ff=256)
    model = GPT2Model(config)
    input_ids = random_ids(config, 2, 64)
    # PyTorch counts the math kernel of attention, but not the fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids, labels=input_ids)[1].backward()
    assert model.flops_per_token(64) * input_ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "fields",
    [{"d_model": 15}, {"num_heads": 0}, {"vocab_size": 0}, {"dropout": 1.0}, {"layer_norm_epsilon": 0.0}],
    ids=str,
)
def test_an_invalid_config_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        GPT2Model(tiny_config(**fields))


def test_more_tokens_than_context_are_refused():
    model = GPT2Model(tiny_config(context_length=16))
    with pytest.raises(ValueError, match=r"17 tokens are not between 1 and the context_length of 16"):
        model(random_ids(model.config, 1, 17))


def test_labels_and_targets_together_are_refused():
    model = GPT2Model(tiny_config())
    input_ids = random_ids(model.config, 1, 3)
    with pytest.raises(ValueError, match=r"labels .* targets"):
        model(input_ids, labels=input_ids, targets=input_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def test_generate_yields_tokens_and_returns_the_text():
    model = noisy_model(tiny_config())
    prompt = random_ids(model.config, 3, 2)
    generator = model.generate(prompt, 5, top_k=9, top_p=0.9, repetition_penalty=1.2, temperature=0.7)
    assert inspect.isgenerator(generator)
    tokens, text = finish(generator)
    assert [token.shape for token in tokens] == [(3,)] * 5
    assert torch.equal(text, torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1))


def test_zero_new_tokens_return_the_prompt():
    model = noisy_model(tiny_config())
    prompt = random_ids(model.config, 2, 4)
    tokens, text = finish(model.generate(prompt, 0))
    assert not tokens
    assert torch.equal(text, prompt)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_greedy_options_give_equal_text(options):
    model = noisy_model(tiny_config())
    prompt = random_ids(model.config, 3, 4)
    assert torch.equal(
        finish(model.generate(prompt, 8, **options))[1], finish(model.generate(prompt, 8, do_sample=False))[1]
    )


def test_seeded_generation_is_reproducible_and_independent_of_the_global_generator():
    model = noisy_model(tiny_config())
    prompt = random_ids(model.config, 2, 4)

    def text(seed: int) -> list[list[int]]:
        return finish(model.generate(prompt, 10, generator=torch.Generator().manual_seed(seed)))[1].tolist()

    state = torch.get_rng_state()
    first = text(5)
    torch.manual_seed(99)
    assert text(5) == first != text(6)
    torch.set_rng_state(state)
    text(5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("abandon", [True, False])
def test_generate_disables_dropout_and_restores_the_mode(training, abandon):
    model = noisy_model(tiny_config(dropout=0.5)).train(training)
    prompt = random_ids(model.config, 1, 4)
    grad_modes = []
    model.final_norm.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    modes = []
    model.final_norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    generator = model.generate(prompt, 5, do_sample=False)
    next(generator)
    assert modes == [False]
    assert model.training is training, "between two tokens, the caller may train"
    assert grad_modes == [False]
    assert torch.is_grad_enabled(), "between two tokens, the caller may train"
    if abandon:
        generator.close()
    else:
        assert torch.equal(finish(generator)[1], finish(model.generate(prompt, 5, do_sample=False))[1])
    assert model.training is training
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize(("row", "position", "lengths"), [(0, 4, [5, 8]), (1, 2, [9, 3]), (0, 1, [2, 12])])
def test_a_text_is_filled_with_eos_after_its_end(row, position, lengths):
    model = noisy_model(tiny_config(), seed=5, std=0.4)
    prompt = random_ids(model.config, 2, 3)
    endless = finish(model.generate(prompt, 12, do_sample=False))[1][:, 3:].tolist()
    eos = endless[row][position]
    expected = [text[: text.index(eos) + 1] if eos in text else text for text in endless]
    assert [len(text) for text in expected] == lengths, "the texts should end at different places"

    tokens, text = finish(model.generate(prompt, 12, do_sample=False, eos_token_id=eos))
    longest = max(lengths)
    assert text[:, 3:].tolist() == [text + [eos] * (longest - len(text)) for text in expected]
    assert len(tokens) == longest
