"""Writing token by token: keys and values of what was read are kept, so that the next token costs one token's work.

Texts of different lengths are written side by side, aligned at their ends and padded at their beginnings.

Axes: b batch, t time, h head, d head dimension, v vocabulary; T is all of the time, t its latest part.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from gpt2.model import GPT2Model

Choose = Callable[[Tensor, Tensor], Tensor]  # the next tokens (b,), from logits (b, v) and the text before (b, T)


def causal_mask(attention_mask: Tensor, t: int | None = None) -> Tensor:
    """Who may look at whom, (b, 1, t, T): the last t of T tokens, all of them by default, at those before them.

    Every token may look at itself, padding too: a softmax over nothing is NaN on some backends.

    Args:
        attention_mask: (b, T), 1 for a real token and 0 for padding.
    """
    total = attention_mask.size(-1)
    looked_at = torch.arange(total, device=attention_mask.device)
    looking = rearrange(looked_at if t is None else looked_at[total - t :], "t -> t 1")
    real = rearrange(attention_mask.bool(), "b T -> b 1 1 T")
    return (looked_at == looking) | (real & (looked_at < looking))


def window_start(length: int, context_length: int) -> int:
    """Where the part begins that a model sees of a text of `length` tokens: at 0 as long as all of it fits.

    After that it moves on by a quarter of the context at a time. Positions are counted within the window, so each
    move makes all cached keys and values useless: moving at every token would save nothing.
    """
    step = max(1, context_length // 4)
    return step * ceil(max(0, length - context_length) / step)


class BlockCache:
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

    def extend(self, kv: Tensor) -> Tensor:
        """Add keys and values (kv, b, h, t, d) of the next t tokens. Returns all by now, (kv, b, h, used, d)."""
        memory = self.memory(kv)
        start, self.used = self.used, self.used + kv.size(-2)
        memory[..., start : self.used, :] = kv
        return memory[..., : self.used, :]


class KVCache:
    """What all blocks have seen."""

    def __init__(self, num_layers: int, length: int):
        self.blocks = [BlockCache(length) for _ in range(num_layers)]

    @property
    def used(self) -> int:
        """How many tokens are in it."""
        return self.blocks[0].used

    def clear(self) -> None:
        """Forget them; the memory stays."""
        for block in self.blocks:
            block.used = 0


class FixedPlace:
    """A `BlockCache` as a recorded step sees it: the next token's column is a tensor, and all columns are looked at."""

    used = 0  # which only the device knows: whoever takes the step gives positions and mask

    def __init__(self, block: BlockCache, column: Tensor):
        self.block, self.column = block, column

    def extend(self, kv: Tensor) -> Tensor:
        """Put keys and values (kv, b, h, 1, d) in their column. Returns all of the memory, (kv, b, h, length, d)."""
        return self.block.memory(kv).index_copy_(3, self.column, kv)


class RecordedStep:
    """The step of one more token, every shape and address in it fixed, so that CUDA records it once and replays it.

    A token's work is some hundred small kernels, which take longer to launch one by one than to run. Where the token
    goes is therefore a tensor, and attention looks at the whole cache through a mask. Without CUDA nothing is
    recorded, the step is the same.
    """

    def __init__(self, model: "GPT2Model", b: int, length: int, compiled: bool):
        device = model.token_embedding.weight.device
        self.model, self.length = model, length
        self.cache = KVCache(model.config.num_layers, length)
        self.reader: object = None  # whose texts are in the cache
        self.token = torch.zeros(b, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(b, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.zeros(b, 1, 1, length, dtype=torch.bool, device=device)
        self.places = [FixedPlace(block, self.column) for block in self.cache.blocks]
        self.run = torch.compile(self._run, fullgraph=True, dynamic=False) if compiled else self._run
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def _run(self) -> Tensor:
        self.mask.index_fill_(3, self.column, True)
        logits = self.model.last_logits(self.token, self.mask, self.places, self.positions)
        self.column.add_(1)
        self.positions.add_(1)
        return logits

    def begin(self, used: int, padding: Tensor) -> None:
        """Go on after `used` columns of the cache, of which the first (b, 1) are padding."""
        columns = torch.arange(self.length, device=self.mask.device)
        self.mask.copy_(rearrange((columns >= padding) & (columns < used), "b T -> b 1 1 T"))
        self.positions.copy_(used - padding)
        self.column.fill_(used)

    def __call__(self, token: Tensor) -> Tensor:
        """The logits (b, v) after one more token (b,) of each text, to be read before the next call."""
        self.token.copy_(rearrange(token, "b -> b 1"))
        if token.device.type != "cuda":
            return self.run()
        if self.graph is None or self.logits is None:
            self.graph, self.logits = self._record()
        self.graph.replay()
        return self.logits

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        state = (self.column, self.positions, self.mask)
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and compilers set themselves up in the first runs
            for _ in range(3):
                self.run()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run()
        return graph, logits


class Recorder:
    """Keeps the latest recorded step of a model whose weights stay where they are.

    Args:
        compiled: Let torch.compile fuse the kernels first, which takes from seconds to a minute.
    """

    def __init__(self, model: "GPT2Model", compiled: bool = False):
        self.model, self.compiled = model, compiled
        self.kept: tuple[tuple[int, int], RecordedStep] | None = None

    def step(self, b: int, length: int) -> RecordedStep:
        """A step for b texts of `length` tokens at most, prompt included."""
        length = min(128 * ceil(length / 128), self.model.config.context_length)  # so that few lengths are recorded
        if self.kept is None or self.kept[0] != (b, length):
            self.kept = (b, length), RecordedStep(self.model, b, length, self.compiled)
        return self.kept[1]


class Decoder:
    """Some texts, what a model has read of them, and what it finds that comes next."""

    def __init__(
        self,
        model: "GPT2Model",
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        recorder: Recorder | None = None,
    ):
        """As `write`."""
        b, t = input_ids.shape
        self.model, self.use_cache = model, use_cache
        self.lengths = [t] * b
        if max_new_tokens < 0:
            raise ValueError(f"{max_new_tokens} new tokens are fewer than none")
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                shapes = f"{tuple(attention_mask.shape)}, of input_ids {tuple(input_ids.shape)}"
                raise ValueError(f"the attention_mask is of shape {shapes}; it needs a value for each token")
            self.lengths = attention_mask.bool().sum(1).tolist()
            input_ids = aligned_right(input_ids, attention_mask.bool())
        if t == 0 or min(self.lengths) == 0:
            raise ValueError("a text without a token has no next one")
        self.memory = input_ids.new_empty(b, t + max_new_tokens)
        self.memory[:, :t] = input_ids
        self.end = t
        self.starts: list[int] = []  # of the window in each text
        self.padding: Tensor | None = None  # (b, 1), columns of the window that are none of the text's
        length = min(max(self.lengths) + max_new_tokens, model.config.context_length)
        self.recorded = recorder.step(b, length) if recorder and use_cache else None
        self.cache = self.recorded.cache if self.recorded else KVCache(model.config.num_layers, length)

    @property
    def text(self) -> Tensor:
        """The texts so far (b, T), aligned right; what is missing at the left is filled with a token of the text."""
        return self.memory[:, : self.end]

    def append(self, token: Tensor) -> None:
        """Add a token (b,) to each text."""
        self.memory[:, self.end] = token
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def next_logits(self) -> Tensor:
        """The logits (b, v) of what comes after each text."""
        starts = [window_start(length, self.model.config.context_length) for length in self.lengths]
        is_read = starts == self.starts and self.use_cache and (not self.recorded or self.recorded.reader is self)
        if is_read:
            return self.recorded(self.text[:, -1]) if self.recorded else self._read()
        # Where a window has moved, each token that stays in it has another position now.
        self.starts = starts
        self.cache.clear()
        sizes = [length - start for length, start in zip(self.lengths, starts, strict=True)]
        padding = torch.tensor([[max(sizes) - size] for size in sizes], device=self.text.device)
        self.padding = padding if len(set(sizes)) > 1 else None
        logits = self._read()
        if self.recorded:
            self.recorded.reader = self
            self.recorded.begin(self.cache.used, padding)
        return logits

    def _read(self) -> Tensor:
        """The logits after what the cache does not hold yet of the windows."""
        columns = max(length - start for length, start in zip(self.lengths, self.starts, strict=True))
        unread = columns - self.cache.used
        if self.padding is None:
            return self.model.last_logits(self.text[:, -unread:], None, self.cache.blocks)
        places = torch.arange(columns, device=self.text.device)
        mask = causal_mask(places >= self.padding, unread)
        positions = (places - self.padding).clamp(min=0)[:, -unread:]
        return self.model.last_logits(self.text[:, -unread:], mask, self.cache.blocks, positions)


def aligned_right(input_ids: Tensor, real: Tensor) -> Tensor:
    """Move the padding of texts (b, t) to their left, and make it a token that each text has.

    A repetition penalty then sees nothing that is not in the text.
    """
    padding_first = real.int().argsort(dim=1, stable=True)
    input_ids = input_ids.gather(1, padding_first)
    return torch.where(real.gather(1, padding_first), input_ids, input_ids[:, -1:])


@torch.no_grad()
def write(
    model: "GPT2Model",
    input_ids: Tensor,
    max_new_tokens: int,
    choose: Choose,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    recorder: Recorder | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue texts token by token, without dropout.

    Once a text is longer than the model's context, the model sees a window of it, see `window_start`.

    Args:
        input_ids: The texts (b, t).
        choose: The next token of each text, from its logits and the text.
        attention_mask: (b, t), 1 for a real token and 0 for padding, on either side; no padding if None.
        use_cache: Keep keys and values; without, all that the model sees is read anew for each token.
        recorder: Write by a step that CUDA has recorded.

    Yields:
        The next token of each text (b,), and the logits (b, v) that it was chosen by, to be read before going on.

    Raises:
        ValueError: A text has no token, or the mask another shape.
    """
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(model, input_ids, max_new_tokens, attention_mask, use_cache, recorder)
        for _ in range(max_new_tokens):
            logits = decoder.next_logits()
            token = choose(logits, decoder.text)
            decoder.append(token)
            yield token, logits
    finally:
        model.train(was_training)
