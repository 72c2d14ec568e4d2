"""Linear layers for text generation on a CPU, where reading the weights takes nearly all the time of a token.

The floor is the bytes of the weights over the memory bandwidth. On two cores of an EPYC, GPT-2 124M in fp32 generates
one text at 71 % of the floor's speed, `transformers` at 28 %: 2.5 times as many tokens per second, in int8 4.3 times
(experiments/generation, cpu.json).

Which layout is fastest depends on the processor and on the number of texts, so it is measured when a model is loaded.

This is the only module that uses PyTorch's private int8 operations (`torch.ops.quantized`, `_is_vnni_supported`), which
its compiler emits. Checked with PyTorch 2.13; tests/ops/test_cpu_inference.py fails when they move.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gpt2.errors import UserError
from gpt2.ops import linear as onednn
from gpt2.runtime.device import fastest_seconds

MAX_TIME = 0.9  # of the plain layer's: a layout is used if it takes less, since it costs a second copy of the head
MIN_HEAD_BYTES = 8 << 20  # smaller weights stay in the processor's cache, where no layout gains anything
SAMPLE_BYTES = 48 << 20  # of the weight that is measured: more than a cache holds


class LanguageModel(Protocol):
    """What is changed of a model."""

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
    one token with large values would cost the others their precision (Dettmers et al., 2022).
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
        # Without VNNI, pairs of products are added in 16 bits, which 8-bit values would overflow.
        self.largest = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.largest, 128, self.packed
        )
        return torch.addcmul(self.offset, y, scale)  # a token of zeros: 0 / 0 is quantized to a number, times 0


def pack_linears(
    model: LanguageModel, texts: int = 1, kinds: Sequence[type[InferenceLinear]] | None = None
) -> type[InferenceLinear]:
    """Replace the linear layers of a model by the fastest kind for `texts` texts at a time. Makes training impossible.

    Logits are equal but for rounding.

    Args:
        kinds: The candidates; by default all that are available.

    Returns:
        The chosen kind. `InferenceLinear` means that nothing was changed: on a GPU, for small weights, or if no layout
        is clearly faster.
    """
    weight = model.token_embedding.weight
    if kinds is None:
        is_useful = weight.device.type == "cpu" and weight.nbytes >= MIN_HEAD_BYTES
        kinds = [InferenceLinear, *(available_kinds(weight.dtype) if is_useful else [])]
    kind = fastest_kind(kinds, weight, texts)
    if kind is not InferenceLinear:
        replace_linears(model, kind)
    return kind


def quantize(model: LanguageModel) -> type[InferenceLinear]:
    """Replace the linear layers of a model on a CPU by `Int8Linear`. Makes training impossible.

    Raises:
        UserError: See `refuse_int8`.
    """
    refuse_int8(model.token_embedding.weight.device)
    replace_linears(model, Int8Linear)
    return Int8Linear


def replace_linears(model: LanguageModel, kind: type[InferenceLinear]) -> None:
    """Replace one layer after the other, so that only one of them and the head exist twice at a time.

    Dropout does nothing in inference, but calling it 25 times a token takes time.
    """
    model.head = kind(model.token_embedding.weight)
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, kind(layer.weight, layer.bias))
            elif isinstance(layer, nn.Dropout):
                setattr(module, name, nn.Identity())


def available_kinds(dtype: torch.dtype) -> list[type[InferenceLinear]]:
    """The layouts that this PyTorch has for weights of a number format."""
    kinds: list[type[InferenceLinear]] = [SlicedLinear] if dtype == torch.float32 else []
    if onednn.is_available() and dtype in (torch.float32, torch.bfloat16):
        kinds.append(PackedLinear)
    return kinds


def refuse_int8(device: torch.device, key: str = "inference.quantization") -> None:
    """Raise UserError if there are no int8 products for this device. `key` is the option that requests them."""
    if device.type != "cpu":
        raise UserError(f"{key}: int8 needs device=cpu; on {device.type}, take null")
    is_available = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or not is_available:
        raise UserError(f"{key}: this PyTorch has no int8 products for this CPU, take null")


@torch.no_grad()
def fastest_kind(
    kinds: Sequence[type[InferenceLinear]], weight: Tensor, texts: int, repetitions: int = 3
) -> type[InferenceLinear]:
    """The kind whose product is fastest; the first unless another one is clearly faster."""
    if len(kinds) == 1:
        return kinds[0]
    sample = weight[: SAMPLE_BYTES // weight[0].nbytes]
    x = torch.zeros(texts, 1, weight.size(1), dtype=weight.dtype)
    layers = [kind(sample) for kind in kinds]
    seconds = fastest_seconds([partial(layer, x) for layer in layers], repetitions)
    best = min(range(len(kinds)), key=seconds.__getitem__)
    return kinds[best] if seconds[best] < MAX_TIME * seconds[0] else kinds[0]
