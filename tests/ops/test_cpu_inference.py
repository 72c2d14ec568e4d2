"""Linear layers for CPU inference equal `F.linear`, exactly or nearly."""

import copy
import json
import time
from math import exp

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from gpt2.errors import UserError
from gpt2.evaluate import score
from gpt2.model import GPT2Model
from gpt2.ops import linear as onednn
from gpt2.ops.cpu_inference import (
    QUANTIZED,
    InferenceLinear,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    SlicedLinear,
    kind_for,
    pack_linears,
    quantize,
)
from tests.helpers import CORPUS, ROOT, finish, noisy_model, random_ids, tiny_config

close = {"atol": 1e-5, "rtol": 1e-5}
EXACT = [InferenceLinear, SlicedLinear, *([PackedLinear] if onednn.is_available() else [])]
shapes = pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (8, 1)], ids=str)


def test_rule_chooses_the_layout_that_was_measured_to_be_fastest(monkeypatch):
    monkeypatch.setattr(onednn, "is_available", lambda dtype: True)  # as on the machine of the figures
    rows = json.loads((ROOT / "experiments" / "generation" / "layouts.json").read_text())["results"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        seconds = row["seconds"][kind_for(getattr(torch, row["dtype"]), row["texts"]).__name__]
        assert seconds < row["seconds"]["InferenceLinear"]
        assert seconds < 1.1 * min(row["seconds"].values())


@pytest.mark.parametrize("outputs", [32, 50, 7])
@pytest.mark.parametrize("kind", EXACT)
@shapes
def test_each_layout_equals_the_plain_layer(kind, shape, outputs):
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, 24), torch.randn(*shape, 24)
    for offset in (torch.randn(outputs), None):
        assert_close(kind(weight, offset)(x), F.linear(x, weight, offset), **close)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", EXACT[1:])
def test_a_packed_model_has_the_same_logits_and_text(kind, use_bias):
    plain, changed = (noisy_model(tiny_config(use_bias=use_bias)).eval() for _ in range(2))
    assert pack_linears(changed, kind=kind) is kind
    assert not [layer for layer in changed.modules() if isinstance(layer, nn.Linear | nn.Dropout)]
    assert type(changed.head) is kind
    input_ids = random_ids(plain.config, 3, 9)
    with torch.no_grad():
        assert_close(changed(input_ids)[0], plain(input_ids)[0], **close)
        mask = torch.ones(3, 9)
        mask[1, :4] = 0
        real = changed(input_ids, attention_mask=mask)[0][mask.bool()]
        assert_close(real, plain(input_ids, attention_mask=mask)[0][mask.bool()], **close)
    texts = [finish(model.generate(input_ids, 20, do_sample=False))[1] for model in (plain, changed)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("texts", [1, 8])
def test_a_model_in_bf16_can_be_packed(texts):
    """On a CPU without products in bf16 it stays as it is."""
    plain, changed = (noisy_model(tiny_config(), std=0.05).bfloat16().eval() for _ in range(2))
    expected = PackedLinear if onednn.is_available(torch.bfloat16) else InferenceLinear
    assert pack_linears(changed, kind=kind_for(torch.bfloat16, texts)) is expected
    input_ids = random_ids(plain.config, 3, 9)
    with torch.no_grad():
        assert_close(changed(input_ids)[0], plain(input_ids)[0], atol=2e-2, rtol=2e-2)


def test_a_small_model_is_not_changed():
    model = noisy_model(tiny_config())
    assert pack_linears(model) is InferenceLinear
    assert model.head is None


@pytest.mark.parametrize(
    ("with_onednn", "dtype", "texts", "kind"),
    [
        ("fp32 bf16", torch.float32, 1, SlicedLinear),
        ("fp32 bf16", torch.float32, 2, PackedLinear),
        ("fp32 bf16", torch.bfloat16, 1, PackedLinear),
        ("fp32 bf16", torch.float16, 1, InferenceLinear),
        ("fp32", torch.float32, 2, PackedLinear),
        ("fp32", torch.bfloat16, 2, InferenceLinear),
        ("", torch.float32, 2, SlicedLinear),
        ("", torch.bfloat16, 2, InferenceLinear),
    ],
)
def test_layout_is_chosen_by_a_rule_and_never_by_time(monkeypatch, with_onednn, dtype, texts, kind):
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    monkeypatch.setattr(onednn, "is_available", lambda dtype: names.get(dtype) in with_onednn.split())
    monkeypatch.setattr(time, "perf_counter", None)
    assert kind_for(dtype, texts) is kind


# ---------------------------------------------------------------------------------------------------------------------
# int8 and int4


def test_private_int8_operations_are_where_they_were():
    """If this fails after an update of PyTorch, find the new names for `gpt2.ops.cpu_inference`, or int8 is gone."""
    operations = ("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    missing = [name for name in operations if not hasattr(torch.ops.quantized, name)]
    assert not missing, (
        f"PyTorch {torch.__version__} has moved torch.ops.quantized.{missing}, which int8 inference uses"
    )


def test_private_int4_operations_are_where_they_were():
    """If this fails after an update of PyTorch, find the new names for `gpt2.ops.cpu_inference`, or int4 is gone."""
    for name, arguments in {
        "_convert_weight_to_int4pack_for_cpu": "Tensor self, int innerKTiles",
        "_weight_int4pack_mm_for_cpu": "Tensor self, Tensor mat2, int qGroupSize, Tensor qScaleAndZeros",
    }.items():
        where = f"PyTorch {torch.__version__} has moved torch.ops.aten.{name}, which int4 inference uses"
        assert hasattr(torch.ops.aten, name), where
        assert f"({arguments}) -> Tensor" in str(getattr(torch.ops.aten, name).default._schema), where


@pytest.fixture(scope="module")
def learned() -> GPT2Model:
    """A trained model, whose weights and activations are not random."""
    model = GPT2Model(tiny_config(vocab_size=128, context_length=32, d_model=64, d_ff=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(CORPUS.encode()))
    for step in range(60):
        starts = torch.randint(len(text) - 32, (16,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([text[start : start + 32] for start in starts])
        optimizer.zero_grad()
        model(batch, labels=batch)[1].backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("quantization", "change"), [("int8", 0.01), ("int4", 0.02)])
def test_a_quantized_model_has_nearly_the_same_perplexity(learned, quantization, change):
    learned = copy.deepcopy(learned)
    text = torch.tensor(list(CORPUS.encode()[: 33 * 60])).view(60, 33)
    batches = [{"input_ids": text[:, :-1], "targets": text[:, 1:]}]
    before = exp(score(learned, batches, torch.device("cpu")).loss)
    assert before < 8, "the model should have learned something"
    assert quantize(learned, quantization) is QUANTIZED[quantization]
    after = exp(score(learned, batches, torch.device("cpu")).loss)
    assert after != before
    assert after == pytest.approx(before, rel=change)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The values that the 4-bit integers of a weight represent."""
    return Int4Linear(weight)(torch.eye(weight.size(1))).T


@pytest.mark.parametrize("inputs", [128, 200])  # one group; two groups, the second one padded
def test_an_int4_layer_is_the_plain_layer_of_weights_within_half_a_step(inputs):
    torch.manual_seed(0)
    weight, x, offset = torch.randn(50, inputs), torch.randn(3, 5, inputs).bfloat16().float(), torch.randn(50)
    weight[7] *= 1e4
    weight[8] = 0.0
    groups = F.pad(weight, (0, -inputs % 128)).unflatten(1, (-1, 128))
    step = (groups.amax(-1) - groups.amin(-1)).repeat_interleave(128, 1)[:, :inputs] / 15
    assert ((rounded(weight) - weight).abs() <= 0.56 * step + 1e-9).all()  # scales, offsets and results are in bf16
    layer = Int4Linear(weight, offset)
    expected = F.linear(x, rounded(weight), offset)
    assert (layer(x) - expected).norm(dim=(0, 1)).div(expected.norm(dim=(0, 1))).max() < 0.01
    assert torch.equal(layer(x)[1, 2], layer(x[1:2, 2:3])[0, 0])  # a token does not depend on the others


def test_an_int4_model_has_the_logits_of_its_rounded_weights(learned):
    plain, changed = (copy.deepcopy(learned) for _ in range(2))
    quantize(changed, "int4")
    input_ids = random_ids(plain.config, 3, 9)
    with torch.no_grad():
        for layer in plain.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(rounded(layer.weight))
        plain.head = InferenceLinear(rounded(plain.token_embedding.weight))
        logits, expected = changed(input_ids)[0], plain(input_ids)[0]
    assert (logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("has_vnni", [False, *[True] * bool(torch.cpu.get_capabilities().get("avx512_vnni"))])
@shapes
def test_an_int8_layer_is_near_the_plain_layer(shape, has_vnni, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": has_vnni})
    torch.manual_seed(0)
    weight, x, offset = (torch.randn(*size) for size in ((50, 24), (*shape, 24), (50,)))
    layer, expected = Int8Linear(weight, offset), F.linear(x, weight, offset)
    assert layer.largest == (127 if has_vnni else 63)
    # Each of 24 products is off by half a step of x and of the weight: 1/254 (1/126) of the largest value.
    bound = 24 * (x.abs().max() * weight.abs().max() / layer.largest + 1e-6)
    assert (layer(x) - expected).abs().max() < bound / 4


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_int8_products_do_not_overflow(sign):
    """On a CPU without VNNI, two products are added in 16 bits."""
    weight, x = torch.full((16, 128), float(sign)), torch.ones(3, 128)
    assert_close(Int8Linear(weight)(x), F.linear(x, weight), atol=0, rtol=1e-5)


@pytest.mark.parametrize("has_vnni", [False, True])
def test_range_of_int8_inputs(has_vnni, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": has_vnni})
    layer, given = Int8Linear(torch.randn(16, 24)), {}

    def product(x, scale, zero_point, packed):
        given.update(scale=scale, zero_point=zero_point)
        return torch.zeros(len(x), 16)

    monkeypatch.setattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32", product)
    layer(torch.randn(3, 24))
    lowest, highest = (given["zero_point"] + sign / given["scale"] for sign in (-1, 1))
    assert lowest == pytest.approx(1)
    assert highest == pytest.approx(255 if has_vnni else 127)
    assert has_vnni or 2 * 127 * highest < 2**15


def test_int8_tokens_are_independent():
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(50, 24)), torch.randn(3, 5, 24)
    x[0, 0] *= 1e4  # a common scale would round the others to zero
    x[1, 1] = 0.0
    together = layer(x)
    assert torch.equal(together[1, 1], torch.zeros(50))
    for row in range(3):
        for t in range(5):
            assert_close(together[row, t], layer(x[row : row + 1, t : t + 1])[0, 0], atol=1e-6, rtol=1e-6)


def test_int8_outputs_are_independent():
    torch.manual_seed(0)
    weight, x = torch.randn(50, 24), torch.randn(3, 24)
    expected = Int8Linear(weight)(x)
    weight[7] *= 1e4
    weight[8] = 0.0
    others = [i for i in range(50) if i not in (7, 8)]
    changed = Int8Linear(weight)(x)
    assert torch.equal(changed[:, others], expected[:, others])
    assert torch.equal(changed[:, 8], torch.zeros(3))


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_quantization_needs_a_cpu_and_its_operations(monkeypatch, quantization):
    with pytest.raises(UserError, match=f"inference.quantization: {quantization} needs device=cpu; on meta, take null"):
        quantize(noisy_model(tiny_config()).to("meta"), quantization)
    monkeypatch.setattr(QUANTIZED[quantization], "is_available", lambda: False)
    with pytest.raises(UserError, match=f"inference.quantization: this PyTorch has no {quantization} products"):
        quantize(noisy_model(tiny_config()), quantization)
