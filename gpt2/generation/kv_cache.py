"""Keys and values of the tokens that a model has read.

Axes: b batch, t time, h head, d head dimension.
"""

from torch import Tensor


class LayerKVCache:
    """The keys and values of the tokens that one block has seen, in memory that is taken once, for `length` tokens."""

    def __init__(self, length: int):
        self.length = length
        self.used = 0  # tokens that are in it
        self._memory: Tensor | None = None

    def memory(self, like: Tensor) -> Tensor:
        """Where keys and values lie, (kv, b, h, length, d), in the format and on the device of `like`."""
        if self._memory is None:
            _, b, h, _, d = like.shape
            self._memory = like.new_zeros(2, b, h, self.length, d)
        return self._memory

    def filled(self) -> Tensor:
        """What is in it, (kv, b, h, used, d)."""
        assert self._memory is not None
        return self._memory[..., : self.used, :]

    def extend(self, kv: Tensor) -> Tensor:
        """Add keys and values (kv, b, h, t, d) of the next t tokens. Returns all by now, (kv, b, h, used, d)."""
        memory = self.memory(kv)
        start, self.used = self.used, self.used + kv.size(-2)
        memory[..., start : self.used, :] = kv
        return memory[..., : self.used, :]


class KVCache:
    """What all blocks have seen."""

    def __init__(self, num_layers: int, length: int):
        self.blocks = [LayerKVCache(length) for _ in range(num_layers)]

    @property
    def used(self) -> int:
        """How many tokens are in it."""
        return self.blocks[0].used

    def clear(self) -> None:
        """Forget them; the memory stays."""
        for block in self.blocks:
            block.used = 0

    def count_one(self) -> None:
        """A token has come in that was put in its place by the device alone."""
        for block in self.blocks:
            block.used += 1

    def drop_first(self, columns: int) -> None:
        """Forget the first ones; what comes after moves to the beginning."""
        for block in self.blocks:
            if columns:
                kept = block.filled()[..., columns:, :].clone()
                block.used -= columns
                block.filled().copy_(kept)

    def replace_last(self, rows: list[int], other: "KVCache") -> None:
        """Put what another cache holds of some rows in the place of the last columns of these rows."""
        for block, new in zip(self.blocks, other.blocks, strict=True):
            block.filled()[:, rows, :, -new.used :] = new.filled()


class FixedPlace:
    """A `LayerKVCache` as a recorded step sees it: the next token's column is a tensor."""

    used = 0  # which only the device knows: whoever takes the step gives positions and mask

    def __init__(self, block: LayerKVCache, column: Tensor):
        self.block, self.column = block, column

    def extend(self, kv: Tensor) -> Tensor:
        """Put keys and values (kv, b, h, 1, d) in their column. Returns all of the memory, (kv, b, h, length, d)."""
        return self.block.memory(kv).index_copy_(3, self.column, kv)
