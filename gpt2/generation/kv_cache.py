"""Key-value cache: the keys and values of the tokens that a model has already read.

Every text starts at column 0 of its row, so that the column of a token is its position, and texts of different
lengths need no padding on the left.

Axes: b batch, t time, h head, d head dimension, T columns that are attended to.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn


def format_of(kv: Tensor) -> torch.dtype:
    """The number format in which keys and values are kept: on a CPU fp32 instead of bf16, unless autocast is on.

    Attention of a single token takes 2.5 to 6.3 times as long in bf16 (experiments/generation, attention.json).
    """
    is_slow = kv.device.type == "cpu" and kv.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    return torch.float32 if is_slow else kv.dtype


class LayerKVCache(nn.Module):
    """Keys and values of one block, allocated once for `length` tokens of each of b texts.

    The memory is a buffer, because `torch.compile` assumes that the address of a buffer is fixed, as CUDA graphs need.

    Attributes:
        memory: (kv, b, h, length, d), on the device of what is stored first, in the format of `format_of`.
    """

    memory: Tensor | None

    def __init__(self, b: int, length: int):
        super().__init__()
        self.b, self.length = b, length
        self.register_buffer("memory", None)

    def prefill(self, kv: Tensor, rows: list[int]) -> Tensor:
        """Store the first t tokens of some texts, (kv, rows, h, t, d), which attend to each other alone."""
        if self.memory is None:
            _, _, h, _, d = kv.shape
            self.memory = kv.new_zeros(2, self.b, h, self.length, d, dtype=format_of(kv))
        self.memory[:, rows, :, : kv.size(3)] = kv.to(self.memory.dtype)
        return kv

    def append(self, kv: Tensor, visible: int, columns: Tensor | None = None) -> Tensor:
        """Store the next tokens of each text, (kv, b, h, t, d).

        Args:
            visible: Number of columns that are attended to.
            columns: Where the first of the tokens is stored, (b,); by default the tokens are stored in the last visible
                columns, which is much faster.

        Returns:
            The visible columns, (kv, b, h, T, d).
        """
        memory, t = self.memory, kv.size(3)
        assert memory is not None, "prefill first"
        if columns is None:
            memory[:, :, :, visible - t : visible] = kv
        else:
            rows = torch.arange(self.b, device=columns.device)
            places = columns + rearrange(torch.arange(t, device=columns.device), "t -> t 1")
            memory[:, rows, :, places] = rearrange(kv, "kv b h t d -> t b kv h d").to(memory.dtype)
        return memory[:, :, :, :visible]


class KVCache(nn.Module):
    """The caches of all blocks, for b texts of at most `length` tokens."""

    layers: Sequence[LayerKVCache]

    def __init__(self, num_layers: int, b: int, length: int):
        super().__init__()
        self.b, self.length = b, length
        self.layers = nn.ModuleList(LayerKVCache(b, length) for _ in range(num_layers))  # type: ignore[assignment]
        self.owner: object = None  # identifies the texts that it holds
