"""Packed layers are the plain ones, but for rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from gpt2.packed import PackedLinear, has_packing, pack
from tests.helpers import noisy_model, tiny_config

pytestmark = pytest.mark.skipif(not has_packing(), reason="this PyTorch has no packed layers")
close = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (8, 1)], ids=str)
def test_a_packed_layer_gives_what_the_plain_one_gives(shape, bias):
    torch.manual_seed(0)
    weight, x = torch.randn(50, 24), torch.randn(*shape, 24)
    offset = torch.randn(50) if bias else None
    with torch.no_grad():
        assert_close(PackedLinear(weight, offset)(x), F.linear(x, weight, offset), **close)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_packed_model_gives_the_same_logits_and_writes_the_same_text(use_bias):
    plain, packed = (noisy_model(tiny_config(use_bias=use_bias)).eval() for _ in range(2))
    assert pack(packed, only_if_faster=False)
    assert not [layer for layer in packed.modules() if isinstance(layer, nn.Linear)]
    input_ids = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(packed(input_ids)[0], plain(input_ids)[0], **close)
    texts = [torch.stack(list(model.generate(input_ids, 20, do_sample=False))) for model in (plain, packed)]
    assert torch.equal(*texts)


def test_a_small_model_and_one_in_half_precision_stay_as_they_are():
    model = noisy_model(tiny_config())
    assert not pack(model)
    assert not pack(model.to(torch.bfloat16), only_if_faster=False)
    assert model.head is None
