"""Products by oneDNN equal `F.linear`, gradients included, and are used where they are faster."""

import logging
import pickle

import pytest
import torch
import torch.nn.functional as F

from gpt2.ops import linear as onednn

NAMES = [name for name in onednn.LINEARS if name != "PyTorch"]
needs_onednn = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")


def test_private_onednn_operations_are_where_they_were():
    """If this fails after an update of PyTorch, find the new names for `gpt2.ops.linear`."""
    operations = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    missing = [name for name in operations if not hasattr(torch.ops.mkldnn, name)]
    assert not missing, f"PyTorch {torch.__version__} has moved torch.ops.mkldnn.{missing}: fp32 on a CPU gets slower"


@needs_onednn
@pytest.mark.parametrize("supports", [False, True])
def test_bf16_needs_a_processor_with_its_instructions(supports, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supports, raising=False)
    available = [onednn.is_available(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert available == [True, supports, False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1), (2, 3, 4)])
def test_product_and_gradient_equal_those_of_linear(shape, bias, name):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 16, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    b = torch.randn(24, requires_grad=True) if bias else None
    inputs = [tensor for tensor in (x, weight, b) if tensor is not None]
    results = []
    for linear in (F.linear, onednn.LINEARS[name]):
        y = linear(x, weight, b)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(onednn.LINEARS[name](x, weight, b), results[0][0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_required_gradients_are_computed(name):
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    onednn.LINEARS[name](x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


@needs_onednn
@pytest.mark.parametrize("weight", [torch.randn(5, 4, dtype=torch.bfloat16), torch.randn(5, 4)])
def test_16_bit_products_are_left_to_pytorch(weight):
    linear = onednn.DifferentiableLinear(lambda *_: pytest.fail("not for 16 bits"))
    x = torch.randn(3, 4, dtype=weight.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@needs_onednn
def test_products_that_need_a_copy_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(onednn, "onednn_linear", lambda *_: "oneDNN")
    x = torch.randn(4, 4)
    assert onednn.onednn_linear_if_contiguous(x, x) == "oneDNN"
    torch.testing.assert_close(onednn.onednn_linear_if_contiguous(x.t(), x), x.t() @ x.t())


@needs_onednn
@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([4.0, 4.1, 4.19], "oneDNN"),
        ([4.0, 4.3, 4.19], "oneDNN without copies"),
        ([4.0, 4.3, 4.21], "PyTorch"),
    ],
)
def test_the_fastest_product_is_used_stored_and_logged_once(seconds, chosen, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onednn, "fastest_seconds", lambda *_: seconds)
    onednn.faster_linear.cache_clear()
    with caplog.at_level(logging.INFO, "gpt2"):
        assert onednn.faster_linear() == chosen
        onednn.faster_linear.cache_clear()
        monkeypatch.setattr(onednn, "fastest_seconds", lambda *_: pytest.fail("measured again"))
        assert onednn.faster_linear() == chosen
    (message,) = caplog.messages
    assert message.startswith(f"Products of fp32 matrices: {chosen}, measured once on this machine, see {tmp_path}")
    onednn.faster_linear.cache_clear()


@needs_onednn
@pytest.mark.parametrize("content", [b"", b"oneDNN without\n", b"\xff\xfe", b"PyTorch\nPyTorch\n", None])
def test_damaged_measurement_is_repeated(content, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onednn, "fastest_seconds", lambda *_: [1.0, 0.5, 0.9])
    onednn.faster_linear.cache_clear()
    assert onednn.faster_linear() == "oneDNN"
    (file,) = (path for path in tmp_path.glob("gpt2/linear-*") if not path.suffix)
    stored = file.read_bytes()
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    onednn.faster_linear.cache_clear()
    assert onednn.faster_linear() == "oneDNN"
    assert content is None or file.read_bytes() == stored
    onednn.faster_linear.cache_clear()


def test_names_survive_pickling():
    for name, linear in onednn.LINEARS.items():
        assert onednn.name_of(pickle.loads(pickle.dumps(linear))) == name
    assert onednn.name_of(lambda *_: None) == "other"


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name):
    x = torch.randn(3, 4, requires_grad=True)
    y = onednn.LINEARS[name](x, torch.randn(5, 4, requires_grad=True)).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_onednn_pytorch_multiplies(monkeypatch):
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    onednn.faster_linear.cache_clear()
    assert onednn.faster_linear() == "PyTorch"
    onednn.faster_linear.cache_clear()
