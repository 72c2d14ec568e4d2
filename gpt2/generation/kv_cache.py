"""Key-value cache: the keys and values of the tokens that a model has already read.

Every text starts at column 0 of its row, so that the column of a token is its position, and texts of different
lengths need no padding on the left.

Axes: b batch, t time, h head, d head dimension, T columns that are attended to.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class LayerKVCache(nn.Module):
    """Keys and values of one block, allocated once for `length` tokens of each of b texts.

    The memory is a buffer, because `torch.compile` takes the address of a buffer to be fixed, which CUDA graphs need.

    Attributes:
        memory: (kv, b, h, length, d), in the format and on the device of what is stored first.
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
            self.memory = kv.new_zeros(2, self.b, h, self.length, d)
        self.memory[:, rows, :, : kv.size(3)] = kv
        return kv

    def append(self, kv: Tensor, columns: Tensor, visible: int) -> Tensor:
        """Store a token of each text, (kv, b, h, 1, d), at its column (1, b, 1, 1, 1).

        Returns:
            The first `visible` columns, (kv, b, h, T, d).
        """
        memory = self.memory
        assert memory is not None, "prefill first"
        memory.scatter_(3, columns.expand_as(kv), kv)
        return memory[:, :, :, :visible]


class KVCache(nn.Module):
    """The caches of all blocks, for b texts of at most `length` tokens."""

    layers: Sequence[LayerKVCache]

    def __init__(self, num_layers: int, b: int, length: int):
        super().__init__()
        self.b, self.length = b, length
        self.layers = nn.ModuleList(LayerKVCache(b, length) for _ in range(num_layers))  # type: ignore[assignment]
        self.owner: object = None  # identifies the texts that it holds
