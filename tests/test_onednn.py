"""What oneDNN multiplies is what `F.linear` does, with the same gradient; and it is taken where it is faster."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from gpt2.ops import linear as onednn

WAYS = [name for name in onednn.LINEARS if name != "PyTorch"]
needs_onednn = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1), (2, 3, 4)])
def test_product_and_gradient_are_those_of_linear(shape, bias, way):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 16, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    b = torch.randn(24, requires_grad=True) if bias else None
    inputs = [tensor for tensor in (x, weight, b) if tensor is not None]
    results = []
    for linear in (F.linear, onednn.LINEARS[way]):
        y = linear(x, weight, b)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_only_the_gradients_that_are_wanted_are_computed(way):
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    onednn.LINEARS[way](x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


@needs_onednn
@pytest.mark.parametrize("weight", [torch.randn(5, 4, dtype=torch.bfloat16), torch.randn(5, 4)])
def test_other_formats_go_the_usual_way(weight):
    linear = onednn.LinearBy(lambda *_: pytest.fail("not for 16 bits"))
    x = torch.randn(3, 4, dtype=weight.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@needs_onednn
def test_what_onednn_would_copy_goes_the_usual_way(monkeypatch):
    monkeypatch.setattr(onednn, "product", lambda *_: "oneDNN")
    x = torch.randn(4, 4)
    assert onednn.product_without_copy(x, x) == "oneDNN"
    torch.testing.assert_close(onednn.product_without_copy(x.t(), x), x.t() @ x.t())


@needs_onednn
@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([[1.0, 0.5], [1.0, 0.5]], "oneDNN"),
        ([[1.0, 0.9], [1.0, 1.2]], "oneDNN without copies"),
        ([[1.0, 0.99]], "PyTorch"),
        ([[1.0, 2.0]], "PyTorch"),
    ],
)
def test_the_fastest_way_is_taken_and_remembered(seconds, chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = iter(seconds)
    monkeypatch.setattr(onednn, "fastest_seconds", lambda ways: next(measured))
    onednn.faster_linear.cache_clear()
    assert onednn.faster_linear() == chosen
    onednn.faster_linear.cache_clear()
    monkeypatch.setattr(onednn, "fastest_seconds", lambda ways: pytest.fail("measured again"))
    assert onednn.faster_linear() == chosen
    onednn.faster_linear.cache_clear()


def test_ways_are_known_by_name_also_after_pickling():
    for name, way in onednn.LINEARS.items():
        assert onednn.name_of(pickle.loads(pickle.dumps(way))) == name
    assert onednn.name_of(lambda *_: None) == "other"


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_of_a_gradient_is_refused_and_not_wrong(way):
    x = torch.randn(3, 4, requires_grad=True)
    y = onednn.LINEARS[way](x, torch.randn(5, 4, requires_grad=True)).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_onednn_nothing_changes(monkeypatch):
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    onednn.faster_linear.cache_clear()
    assert onednn.faster_linear() == "PyTorch"
    onednn.faster_linear.cache_clear()
