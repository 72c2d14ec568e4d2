"""Linear layers for text generation on a CPU, where reading the weights takes nearly all the time of a token.

The floor is the bytes of the weights over the memory bandwidth. On two cores of an EPYC, GPT-2 124M in fp32 generates
one text at 80 % of the floor's speed, `transformers` at 47 %: 1.7 times as many tokens per second, in int8 3.6 and in
int4 4.5 times (experiments/generation, cpu.json).

Which layout is fastest depends on the number format and on the number of texts, see `kind_for`.

This is the only module that uses PyTorch's private int8 and int4 operations (`torch.ops.quantized`,
`torch.ops.aten._weight_int4pack_mm_for_cpu`), which its compiler emits. Checked with PyTorch 2.13;
tests/ops/test_cpu_inference.py fails when they move.
"""

import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gpt2.errors import UserError
from gpt2.ops import linear as onednn

MIN_HEAD_BYTES = 8 << 20  # smaller weights stay in the processor's cache, where no layout gains anything


class LanguageModel(Protocol):
    """The parts of a model that are replaced."""

    token_embedding: nn.Embedding
    head: nn.Module | None  # takes the place of the product with the token embedding

    def modules(self) -> Iterator[nn.Module]: ...


class InferenceLinear(nn.Module):
    """`nn.Linear` without gradients, made from its weight (out, in) and bias (out,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class SlicedLinear(InferenceLinear):
    """The weight in slices of 32 outputs, multiplied as one batched product. The fastest layout for a single text.

    The sums of a slice stay in registers while the slice streams by, and the cores share the slices.
    """

    WIDTH = 32  # outputs: two vectors of 16 fp32 numbers

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.outputs = len(weight)
        missing = -self.outputs % self.WIDTH
        padded = F.pad(weight, (0, 0, 0, missing))
        super().__init__(rearrange(padded, "(slice width) c -> slice c width", width=self.WIDTH).contiguous())
        offset = F.pad(weight.new_zeros(self.outputs) if bias is None else bias.detach(), (0, missing))
        self.offset = rearrange(offset, "(slice width) -> slice 1 width", width=self.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, x.size(-1))
        y = torch.baddbmm(self.offset, rows.expand(len(self.weight), -1, -1), self.weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)[..., : self.outputs]


class PackedLinear(InferenceLinear):
    """The weight in oneDNN's blocked layout. The fastest for several texts."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(onednn.prepack(weight), bias)

    def forward(self, x: Tensor) -> Tensor:
        return onednn.onednn_linear(x, self.weight, self.bias)


class Int8Linear(InferenceLinear):
    """The weight in 8-bit integers with a scale for each output; inputs are quantized with a scale for each token.

    PyTorch's own dynamic quantization has one scale for all tokens: a text would depend on the others of its batch, and
    one token with large values would make the others imprecise (Dettmers et al., 2022).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        nn.Module.__init__(self)
        weight = weight.detach()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # PyTorch announces the removal of quantized tensors
            warnings.simplefilter("ignore", UserWarning)
            integers = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(integers, None)
        self.offset = torch.zeros(()) if bias is None else bias.detach()
        # Inputs are the unsigned integers from 1 to 2 * largest + 1, weights those from -127 to 127. Without AVX-512's
        # VNNI, two products are added in 16 bits: 2 * 127 * 127 is below 2^15, 2 * 255 * 127 is not.
        self.largest = 127 if torch.cpu.get_capabilities().get("avx512_vnni") else 63

    @staticmethod
    def is_available() -> bool:
        operation = "linear_with_input_q_dq_qweight_dq_output_fp32"
        return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(torch.ops.quantized, operation)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.largest, self.largest + 1, self.packed
        )
        return torch.addcmul(self.offset, y, scale)  # a token of zeros: 0 / 0 is quantized to a number, times 0


class Int4Linear(InferenceLinear):
    """The weight in 4-bit integers with a scale and an offset for each group of 128 inputs of an output.

    With AVX-512 the fastest for one text: it reads half the bytes of int8. For several rows int8 is faster: here
    numbers are multiplied in fp32, so many rows take about as long as with `F.linear`. Inputs and outputs are rounded
    to bf16, because the operation is over ten times slower in fp32.
    """

    GROUP, OUTPUTS = 128, 16  # the operation needs multiples of these, so weights are padded with zeros

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        nn.Module.__init__(self)
        self.outputs, inputs = weight.shape
        self.missing = -inputs % self.GROUP
        padded = F.pad(weight.detach().float(), (0, self.missing, 0, -self.outputs % self.OUTPUTS))
        groups = rearrange(padded, "out (group c) -> group out c", c=self.GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step = ((high - low) / 15).clamp(min=1e-12)
        # An integer stands for (integer - 8) * scale + offset.
        self.scales = torch.cat([step, low + 8 * step], -1).bfloat16()
        step, middle = self.scales.float().split(1, -1)
        integers = (groups - middle).div_(step).add_(8).round_().clamp_(0, 15).int()
        rows = rearrange(integers, "group out c -> out (group c)").contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows, 2)
        self.offset = weight.new_zeros(self.outputs) if bias is None else bias.detach()

    @staticmethod
    def is_available() -> bool:
        return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).bfloat16()
        if self.missing:
            rows = F.pad(rows, (0, self.missing))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.GROUP, self.scales)
        return (y[:, : self.outputs] + self.offset).view(*x.shape[:-1], self.outputs)


QUANTIZED: dict[str, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


def pack_linears(
    model: LanguageModel, texts: int = 1, kind: type[InferenceLinear] | None = None
) -> type[InferenceLinear]:
    """Replace the linear layers of a model by the fastest kind for `texts` texts at a time. Makes training impossible.

    Logits are equal but for rounding.

    Args:
        kind: Another kind instead.

    Returns:
        The kind. `InferenceLinear` means that nothing was changed: on a GPU, for small weights, or if there is no
        faster layout.
    """
    weight = model.token_embedding.weight
    if kind is None:
        is_useful = weight.device.type == "cpu" and weight.nbytes >= MIN_HEAD_BYTES
        kind = kind_for(weight.dtype, texts) if is_useful else InferenceLinear
    if kind is not InferenceLinear:
        replace_linears(model, kind)
    return kind


def kind_for(dtype: torch.dtype, texts: int) -> type[InferenceLinear]:
    """The fastest layout for weights of a number format and a number of texts.

    A fixed rule, because measurements on a busy machine could choose different layouts, and so different last bits, for
    the same command. On an AMD EPYC, at widths of 384, 768 and 1600, one text takes 0.59 to 0.89 of `F.linear`'s time
    with `SlicedLinear` in fp32; 2 to 32 texts take 0.33 to 0.59 of it with `PackedLinear`, in bf16 1 to 32 texts 0.41
    to 0.83. The layouts that are not chosen are slower in 40 of 42 cases, and 2 and 6 % faster in the other two
    (experiments/generation, layouts.json).
    """
    has_packed = onednn.is_available(dtype)
    if dtype == torch.float32 and (texts == 1 or not has_packed):
        return SlicedLinear
    return PackedLinear if has_packed else InferenceLinear


def quantize(model: LanguageModel, quantization: str = "int8") -> type[InferenceLinear]:
    """Replace the linear layers of a model on a CPU by those of `QUANTIZED`. Makes training impossible.

    Raises:
        UserError: See `refuse_quantization`.
    """
    refuse_quantization(quantization, model.token_embedding.weight.device)
    replace_linears(model, QUANTIZED[quantization])
    return QUANTIZED[quantization]


def replace_linears(model: LanguageModel, kind: type[InferenceLinear]) -> None:
    """Replace one layer after the other, so that there are two copies of only one layer and of the head at a time.

    Dropout is removed: it does nothing in inference, but its 25 calls for each token take time.
    """
    model.head = kind(model.token_embedding.weight)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, kind(layer.weight, layer.bias))
            elif isinstance(layer, nn.Dropout):
                setattr(module, name, nn.Identity())


def refuse_quantization(quantization: str, device: torch.device, key: str = "inference.quantization") -> None:
    """Raise UserError if this device cannot compute these products. `key` is the option that requests them."""
    if device.type != "cpu":
        raise UserError(f"{key}: {quantization} needs device=cpu; on {device.type}, take null")
    if not QUANTIZED[quantization].is_available():
        raise UserError(f"{key}: this PyTorch has no {quantization} products for this CPU, take null")
