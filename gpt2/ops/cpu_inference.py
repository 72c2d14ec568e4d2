"""Linear layers laid out for writing on a CPU, where each token reads every weight once and little else takes time.

The floor of a token is thus the bytes of the weights over the bandwidth of the memory. PyTorch's own product of a
matrix with a vector reads at a third of it. Which layout is the fastest depends on the processor and on how many texts
are written at a time, and is measured. Whatever cannot be had here leaves the layers as they are.

The operations on 8-bit integers are those that PyTorch's compiler uses, and not public: they are named in this file
alone, and those on oneDNN's layout in `gpt2.ops.linear`.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gpt2.errors import UserError
from gpt2.generation.kv_cache import FixedPlace, LayerKVCache
from gpt2.model import DecoderBlock, GPT2Model
from gpt2.ops import linear as onednn
from gpt2.ops.attention import attend
from gpt2.runtime.device import fastest_seconds

WORTHWHILE = 0.9  # of the plain time: less than this, or it is not worth the memory of a second copy of the head
SMALL = 8 << 20  # bytes of a head: below, the weights stay in the processor's cache, and there is nothing to gain
SAMPLE = 48 << 20  # bytes that are enough to measure by: more than a cache holds


class Linear:
    """`F.linear` with a weight (out, in), as it is. Without gradients, on a CPU; below are other layouts."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """The tanh GELU of it."""
        return F.gelu(self(x), approximate="tanh")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` plus it."""
        return residual + self(x)


class SlicedLinear(Linear):
    """A weight cut into slices of so few outputs that their sums stay in registers while the slice streams by.

    All of it is one batched product, whose slices the cores share. The fastest for a single text: it reads at the full
    bandwidth of the memory.
    """

    WIDTH = 32  # outputs of a slice: two vectors of 16

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.outputs = len(weight)
        missing = -self.outputs % self.WIDTH
        slices = F.pad(weight.detach(), (0, 0, 0, missing))
        self.slices = rearrange(slices, "(slice width) c -> slice c width", width=self.WIDTH).contiguous()
        bias = slices.new_zeros(self.outputs) if bias is None else bias.detach()
        self.start = rearrange(F.pad(bias, (0, missing)), "(slice width) -> slice 1 width", width=self.WIDTH)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, x.size(-1))
        y = torch.baddbmm(self.start, rows.expand(len(self.slices), -1, -1), self.slices)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)[..., : self.outputs]


class PackedLinear(Linear):
    """A weight in oneDNN's layout: the fastest for several texts."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.packed = onednn.pack(weight)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return onednn.product(x, self.packed, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        return onednn.product_gelu(x, self.packed, self.bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return onednn.product_add(x, residual, self.packed, self.bias)


class Int8Linear(Linear):
    """A weight in 8-bit integers, with a scale for each of its rows, times inputs in 8 bits, with one for each token.

    A scale for all tokens together, as PyTorch's own dynamic quantization has it, would make a text depend on the
    others of its batch, and let one token with large values cost all others their precision (Dettmers et al., 2022).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        weight = weight.detach()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():  # that quantized tensors will go, for which the pin of torch waits
            warnings.simplefilter("ignore", UserWarning)
            integers = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(integers, None)
        self.offset = torch.zeros(()) if bias is None else bias.detach()
        # Without VNNI, pairs of products are added in 16 bits, which full 8-bit values would overflow.
        self.largest = 127 if torch.cpu._is_vnni_supported() else 63

    def __call__(self, x: Tensor) -> Tensor:
        return self._plus(self.offset, x)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._plus(residual + self.offset, x)

    def _plus(self, other: Tensor, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True)
        of_one = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.largest, 128, self.packed
        )
        return torch.addcmul(other, of_one, scale)  # nothing but zeros, divided by zero, is multiplied by zero here


class PackedBlock(nn.Module):
    """A `DecoderBlock` of packed layers: the same, without dropout, in as few operations as there are."""

    def __init__(self, block: DecoderBlock, kind: type[Linear]):
        super().__init__()

        def packed(layer: nn.Linear) -> Linear:
            return kind(layer.weight, layer.bias)

        def norm(layer: nn.LayerNorm) -> tuple[Any, ...]:
            return layer.normalized_shape, layer.weight.detach(), layer.bias.detach(), layer.eps

        attention, feed_forward = block.attention, block.feed_forward
        self.num_heads = attention.num_heads
        self.attention_norm, self.feed_forward_norm = norm(block.attention_norm), norm(block.feed_forward_norm)
        self.qkv, self.out = packed(attention.qkv), packed(attention.out)
        self.up, self.down = packed(feed_forward.up), packed(feed_forward.down)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, past: LayerKVCache | FixedPlace | None = None
    ) -> Tensor:
        """As `DecoderBlock`, with a mask of `causal_mask`'s making."""
        attended = attend(self.qkv(torch.layer_norm(x, *self.attention_norm)), self.num_heads, attention_mask, past)
        x = self.out.add(attended, x)
        return self.down.add(self.up.gelu(torch.layer_norm(x, *self.feed_forward_norm)), x)


def pack(model: GPT2Model, texts: int = 1, kinds: Sequence[type[Linear]] | None = None) -> type[Linear]:
    """Lay out the weights of a model for writing so many texts at a time. It can then only be evaluated.

    The logits are the same but for rounding.

    Args:
        kinds: The layouts to choose from; all that there are here, by default.

    Returns:
        The layout, which is `Linear` itself where nothing was done: on another device, with small weights, or when
        nothing is faster.
    """
    weight = model.token_embedding.weight
    if kinds is None:
        if weight.device.type != "cpu" or weight.nbytes < SMALL:
            return Linear
        kinds = [Linear, *layouts(weight.dtype)]
    kind = fastest(kinds, weight, texts)
    if kind is not Linear:
        replace_layers(model, kind)
    return kind


def quantize(model: GPT2Model) -> type[Linear]:
    """Turn all linear layers of a model on a CPU into 8-bit integers. It can then only be evaluated.

    Raises:
        UserError: See `refuse_int8`.
    """
    refuse_int8(model.token_embedding.weight.device)
    replace_layers(model, Int8Linear)
    return Int8Linear


def replace_layers(model: GPT2Model, kind: type[Linear]) -> None:
    """Block after block, so that there are never two copies of more than one block, and of the head's embedding."""
    model.head = kind(model.token_embedding.weight)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, DecoderBlock)
        model.blocks[i] = PackedBlock(block, kind)


def layouts(dtype: torch.dtype) -> list[type[Linear]]:
    """Those that there are here for weights of that format."""
    packs = onednn.is_available()
    if dtype == torch.float32:
        return [SlicedLinear, *([PackedLinear] if packs else [])]
    return [PackedLinear] if packs and dtype == torch.bfloat16 else []


def refuse_int8(device: torch.device, key: str = "inference.quantization") -> None:
    """Raise UserError where there are no products of 8-bit integers. `key` is what asked for them."""
    if device.type != "cpu":
        raise UserError(f"{key}: int8 is for a CPU; device=cpu, or null on {device.type}, would do")
    is_there = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or not is_there:
        raise UserError(f"{key}: PyTorch has no products of 8-bit integers for this CPU, take null")


@torch.no_grad()
def fastest(kinds: Sequence[type[Linear]], weight: Tensor, texts: int, repetitions: int = 3) -> type[Linear]:
    """The layout whose product is the fastest here; the first unless it is worth it."""
    if len(kinds) == 1:
        return kinds[0]
    sample = weight[: SAMPLE // weight[0].nbytes]
    x = torch.zeros(texts, 1, weight.size(1), dtype=weight.dtype)
    layers = [kind(sample) for kind in kinds]
    seconds = fastest_seconds([partial(layer, x) for layer in layers], repetitions)
    best = min(range(len(kinds)), key=seconds.__getitem__)
    return kinds[best] if seconds[best] < WORTHWHILE * seconds[0] else kinds[0]
