"""Both implementations of attention have the same results and gradients."""

import pytest
import torch

from gpt2.ops import attention
from gpt2.ops.attention import attend, causal_mask
from tests.helpers import padding_mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_mask_allows_each_token_itself_and_the_real_ones_before(side):
    real = padding_mask(side, 4, 5)
    mask = causal_mask(real)
    for row in range(4):
        for i in range(5):
            expected = [j for j in range(5) if j == i or (j < i and real[row, j])]
            assert mask[row, 0, i].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_attention_equals_the_fused_kernel(dtype, monkeypatch):
    torch.manual_seed(0)
    qkv = torch.randn(3, 12, 3 * 16).to(dtype).requires_grad_()
    upstream = torch.randn(3, 12, 16).to(dtype)
    calls, results = [], []
    explicit = attention._explicit_attention
    monkeypatch.setattr(attention, "_explicit_attention", lambda *inputs: calls.append(1) or explicit(*inputs))
    for limit in (attention.MAX_WEIGHT_BYTES, 0):
        monkeypatch.setattr(attention, "MAX_WEIGHT_BYTES", limit)
        mixed = attend(qkv, num_heads=4)
        results.append([mixed, *torch.autograd.grad(mixed, qkv, upstream)])
    assert len(calls) == 1
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 2e-2}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_long_texts_and_inference_use_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention, "_explicit_attention", lambda *_: pytest.fail("explicit attention was used"))
    attend(torch.randn(1, attention.MAX_FP32_TOKENS + 1, 3 * 4, requires_grad=True), num_heads=1)
    attend(torch.randn(2, 8, 3 * 4), num_heads=1)
    attend(torch.randn(2, 8, 3 * 4, requires_grad=True), 1, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize(("dtype", "t"), [(torch.float32, 128), (torch.bfloat16, 130)])
def test_explicit_attention_is_for_weights_that_fit(dtype, t, monkeypatch):
    q = torch.zeros(3, 5, t, 2, dtype=dtype, requires_grad=True)
    size = 3 * 5 * t * t * q.element_size()
    for limit, expected in ((size, True), (size - 1, False)):
        monkeypatch.setattr(attention, "MAX_WEIGHT_BYTES", limit)
        assert attention._explicit_is_faster(q) == expected


def test_dropout_acts_on_the_attention_weights():
    torch.manual_seed(0)
    value = torch.ones(1, 64, 4)
    qkv = torch.cat([torch.zeros(1, 64, 8), value], dim=2).requires_grad_()
    mixed = attend(qkv, num_heads=1, dropout=0.5)
    assert 0.9 < mixed[0, 32:].mean() < 1.1  # the remaining weights are scaled up
    assert mixed[0, 32:].std() > 0.05
