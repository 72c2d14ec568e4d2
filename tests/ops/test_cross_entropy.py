"""The chunked loss equals `F.cross_entropy`, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from gpt2.ops import cross_entropy as module
from gpt2.ops import linear as onednn
from gpt2.ops.cross_entropy import IGNORE_INDEX, chunked_linear_cross_entropy, cross_entropies, softmax_
from tests.helpers import noisy_model, random_ids, tiny_config

V, C = 61, 16


def problem(n: int = 50, ignored: int = 7, size: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden_states = (size * torch.randn(n, C, generator=generator)).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(V, (n,), generator=generator)
    targets[torch.randperm(n, generator=generator)[:ignored]] = -100  # the ignored index of transformers
    return hidden_states, weight, targets


def with_gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def plain(hidden_states, weight, targets):
    return F.cross_entropy(F.linear(hidden_states, weight).float(), targets, ignore_index=IGNORE_INDEX)


@pytest.fixture(params=[1, 7, 50, 1000], ids="{} rows a chunk".format)
def rows(request, monkeypatch):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", request.param * V * 4)
    return request.param


LINEARS = list(onednn.LINEARS.values())


@pytest.mark.parametrize("linear", LINEARS, ids=onednn.name_of)
def test_loss_and_gradient_equal_those_of_full_logits(rows, linear):
    hidden_states, weight, targets = problem()
    expected = with_gradients(plain(hidden_states, weight, targets), hidden_states, weight)
    actual = with_gradients(
        chunked_linear_cross_entropy(hidden_states, weight, targets, linear=linear), hidden_states, weight
    )
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_no_chunk_of_logits_is_larger_than_the_limit(rows):
    products = []

    def recording(x, weight, bias=None):
        products.append((len(x), len(weight)))
        return F.linear(x, weight, bias)

    hidden_states, weight, targets = problem()
    chunked_linear_cross_entropy(hidden_states, weight, targets, linear=recording)
    logits = [length for length, outputs in products if outputs == V]
    assert max(logits) <= rows
    assert sum(logits) == 50
    assert max(logits) - min(logits) <= 1


@pytest.mark.parametrize("n", [1, 127, 128, 1000, 16_384])
@pytest.mark.parametrize("limit", [1, 300, 2000])
def test_chunks_on_a_gpu_have_a_multiple_of_128_rows(n, limit, monkeypatch):
    monkeypatch.setitem(module.CHUNK_ROWS, "cpu", 128)
    rows = torch.empty(n, 1)
    chunks = [len(chunk) for chunk in rows.tensor_split(module.chunk_ends(rows, 2 * V, limit * 2 * V))]
    assert sum(chunks) == n
    assert not any(length % 128 for length in chunks[:-1])
    assert max(chunks) <= max(128, limit)
    assert max(chunks) - chunks[-1] < 256


def test_divisor_replaces_the_number_of_targets(rows):
    hidden_states, weight, targets = problem(ignored=7)
    mean = with_gradients(chunked_linear_cross_entropy(hidden_states, weight, targets), hidden_states, weight)
    share = chunked_linear_cross_entropy(hidden_states, weight, targets, torch.tensor(4 * 43))
    for one, other in zip(with_gradients(share, hidden_states, weight), mean, strict=True):
        torch.testing.assert_close(4 * one, other)


def test_a_scaled_loss_has_a_scaled_gradient():
    hidden_states, weight, targets = problem()
    once, thrice = (
        with_gradients(factor * chunked_linear_cross_entropy(hidden_states, weight, targets), hidden_states, weight)
        for factor in (1, 3)
    )
    for one, other in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * one, other)


@pytest.mark.parametrize("ignored", [0, 50])
def test_none_or_all_targets_ignored(ignored):
    hidden_states, weight, targets = problem(ignored=ignored)
    loss, of_hidden, of_weight = with_gradients(
        chunked_linear_cross_entropy(hidden_states, weight, targets), hidden_states, weight
    )
    if ignored:
        assert not loss and not of_hidden.any() and not of_weight.any()
    else:
        torch.testing.assert_close(loss, plain(hidden_states, weight, targets).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_close_to_fp32_as_the_plain_loss(rows, dtype):
    hidden_states, weight, targets = problem()
    exact = with_gradients(plain(hidden_states, weight, targets), hidden_states, weight)
    with torch.autocast("cpu", dtype):
        theirs, ours = (
            with_gradients(way(hidden_states, weight, targets), hidden_states, weight)
            for way in (plain, chunked_linear_cross_entropy)
        )
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - right).norm() < 1.2 * (other - right).norm() + 1e-4 * right.norm()


def test_gradients_too_small_for_fp16_survive_loss_scaling():
    """A gradient divided by 10^6 tokens would be zero in fp16."""
    hidden_states, weight, targets = problem()
    divisor = torch.tensor(10**6)
    exact = with_gradients(plain(hidden_states, weight, targets) * 43 / divisor, hidden_states, weight)
    with torch.autocast("cpu", torch.float16):
        share = chunked_linear_cross_entropy(hidden_states, weight, targets, divisor)
    scaled = torch.autograd.grad(share * 2**16, (hidden_states, weight))
    for one, right in zip(scaled, exact[1:], strict=True):
        assert (one / 2**16 - right).norm() < 5e-3 * right.norm()


def test_sums_over_many_tokens_do_not_overflow_fp16():
    """Ten thousand equal tokens, whose gradients add up in one row of the head."""
    n = 10_000
    hidden_states, weight = torch.full((n, C), 12.0), torch.zeros(V, C, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        loss = chunked_linear_cross_entropy(hidden_states, weight, targets)
    (of_weight,) = torch.autograd.grad(loss, weight)
    expected = torch.full((V, C), 12.0 / V)
    expected[0] -= 12.0
    torch.testing.assert_close(of_weight, expected, rtol=1e-2, atol=1e-4)


def test_other_negative_targets_are_refused():
    """Some programs ignore -1; here it is an error."""
    hidden_states, weight, targets = problem()
    targets[3] = -1
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_linear_cross_entropy(hidden_states, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_vocabulary_changes_nothing(dtype, monkeypatch):
    """In training and in evaluation."""
    model = noisy_model(tiny_config())
    input_ids, targets = random_ids(model.config, 3, 16), random_ids(model.config, 3, 16, seed=2)
    results, outputs = [], []

    def recording(x, weight, bias=None):
        outputs.append(len(weight))
        return F.linear(x, weight, bias)

    model.use_linear(recording)
    monkeypatch.setattr(module, "MAX_PADDING", 2)
    for multiple in (1, 128):
        monkeypatch.setitem(module.VOCABULARY_MULTIPLE, "cpu", multiple)
        outputs.clear()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss = model(input_ids, targets=targets, return_logits=False)
            of_each = model.token_losses(input_ids, targets)
            some = model.score_tokens(input_ids, torch.arange(5), targets[0, :5])
        assert outputs.count(128) == (3 if multiple == 128 else 0)
        results.append([*with_gradients(loss, *model.parameters()), of_each, *some])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("size", "rows"), [(50257, 50304), (50304, 50304), (65, 65), (2050, 2112), (1025, 1025)])
def test_only_a_large_head_is_padded(size, rows):
    assert len(module.padded_head(torch.zeros(size, 1))) == rows


@pytest.mark.parametrize("at_once", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_softmax_in_place(dtype, size, at_once, monkeypatch):
    logits = (size * torch.randn(10, V)).to(dtype)
    exact, whole = logits.double(), logits.clone()
    log_sums_of_whole = softmax_(whole)
    monkeypatch.setattr(module, "SOFTMAX_BYTES", at_once * V * 4)
    log_sums = softmax_(logits)
    torch.testing.assert_close(log_sums.double(), torch.logsumexp(exact, -1, keepdim=True), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits, torch.softmax(exact, -1).to(dtype), rtol=1e-2 if size > 1 else 1e-5, atol=1e-6)
    assert torch.equal(logits, whole) and torch.equal(log_sums, log_sums_of_whole)


def test_cross_entropies_of_each_target(rows):
    hidden_states, weight, targets = problem()
    losses = cross_entropies(hidden_states.detach(), lambda x: F.linear(x, weight.detach()), targets, V)
    expected = F.cross_entropy(F.linear(hidden_states, weight), targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    with torch.no_grad():
        torch.testing.assert_close(chunked_linear_cross_entropy(hidden_states, weight, targets), losses.sum() / 43)


@pytest.mark.parametrize(("gradient_checkpointing", "precision"), [(False, "fp32"), (True, "bf16")])
def test_a_training_step_is_one_graph_with_the_same_gradient(gradient_checkpointing, precision):
    """Neither einops nor the chunks break the graph."""
    model = noisy_model(tiny_config())
    model.gradient_checkpointing = gradient_checkpointing
    input_ids, targets = random_ids(model.config, 3, 16), random_ids(model.config, 3, 16, seed=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            _, loss = forward(input_ids, targets=targets, return_logits=False)
        results.append(with_gradients(loss, *model.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4 if precision == "fp32" else 5e-2, atol=1e-6)
    torch.compiler.reset()
