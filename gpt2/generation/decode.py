"""Writing token by token: keys and values of what was read are kept, so that the next token costs one token's work.

Texts of different lengths are written side by side, aligned at their ends and padded at their beginnings.

Axes: b batch, t time, h head, d head dimension, v vocabulary; T is all of the time, t its latest part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from gpt2.generation.kv_cache import FixedPlace, KVCache
from gpt2.ops.attention import causal_mask

if TYPE_CHECKING:
    from gpt2.model import GPT2Model

TokenSampler = Callable[[Tensor, Tensor], Tensor]  # the next tokens (b,), from logits (b, v) and the text before (b, T)


def window_start(length: int, context_length: int) -> int:
    """Where the part begins that a model sees of a text of `length` tokens: at 0 as long as all of it fits.

    After that it moves on by a quarter of the context at a time. Positions are counted within the window, so each
    move makes all cached keys and values useless: moving at every token would save nothing.
    """
    step = max(1, context_length // 4)
    return step * ceil(max(0, length - context_length) / step)


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

    def begin(self, used: int, paddings: list[int]) -> None:
        """Go on after `used` columns of the cache, the first of which are padding, so many in each row."""
        padding = torch.tensor(paddings, device=self.mask.device).unsqueeze(1)
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
            if self.kept and self.compiled:
                torch.compiler.reset()  # it refuses to compile one function for ever more shapes
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
        """As `decode`."""
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
        self.memory = input_ids
        self.end = t
        self.starts: list[int] = []  # of the window in each text
        self.paddings: list[int] = []  # columns at the beginning of the cache that are none of each text's
        length = min(max(self.lengths) + max_new_tokens, model.config.context_length)
        self.recorded = recorder.step(b, length) if recorder and use_cache else None
        self.cache = self.recorded.cache if self.recorded else KVCache(model.config.num_layers, length)

    @property
    def text(self) -> Tensor:
        """The texts so far (b, T), aligned right; what is missing at the left is filled with a token of the text."""
        return self.memory[:, : self.end]

    def append(self, token: Tensor) -> None:
        """Add a token (b,) to each text."""
        if self.end == self.memory.size(1):
            self.memory = torch.cat((self.memory, torch.empty_like(self.memory)), dim=1)
        self.memory[:, self.end] = token
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def next_logits(self) -> Tensor:
        """The logits (b, v) of what comes after each text."""
        starts = [window_start(length, self.model.config.context_length) for length in self.lengths]
        is_cached = bool(self.starts) and self.use_cache and (not self.recorded or self.recorded.reader is self)
        moved = [row for row, start in enumerate(starts) if not is_cached or start != self.starts[row]]
        self.starts = starts
        if not moved:
            if self.recorded:
                self.cache.count_one()
                return self.recorded(self.text[:, -1])
            return self._read(self.text[:, -1:], self.cache, self.paddings)
        if len(moved) == len(starts):
            logits, self.paddings = self._read_windows(moved, self.cache)
        else:
            logits = self._move_windows(moved)
        if self.recorded:
            self.recorded.reader = self
            self.recorded.begin(self.cache.used, self.paddings)
        return logits

    def _read_windows(self, rows: list[int], cache: KVCache) -> tuple[Tensor, list[int]]:
        """Read all that the model is to see of some texts. Their logits (rows, v), and their padding in the cache."""
        cache.clear()
        sizes = [self.lengths[row] - self.starts[row] for row in rows]
        columns = max(sizes)
        paddings = [columns - size for size in sizes]
        return self._read(self.text[rows, -columns:], cache, paddings), paddings

    def _move_windows(self, moved: list[int]) -> Tensor:
        """Read anew those texts whose window has moved, for each token in it has another position now.

        Of the others a token is read, as in any step. All stay aligned at their ends.
        """
        sizes = [length - start for length, start in zip(self.lengths, self.starts, strict=True)]
        columns = max(sizes)
        self.paddings = [columns - size for size in sizes]
        self.cache.drop_first(self.cache.used - (columns - 1))
        logits = self._read(self.text[:, -1:], self.cache, self.paddings)  # of those that have moved, not theirs
        anew = KVCache(len(self.cache.blocks), max(sizes[row] for row in moved))
        logits[moved], _ = self._read_windows(moved, anew)
        self.cache.replace_last(moved, anew)
        return logits

    def _read(self, input_ids: Tensor, cache: KVCache, paddings: list[int]) -> Tensor:
        """The logits (b, v) after input_ids (b, t), which come after what is in the cache."""
        if not any(paddings):
            return self.model.last_logits(input_ids, None, cache.blocks)
        t = input_ids.size(1)
        columns = torch.arange(cache.used + t, device=input_ids.device)
        positions = columns - torch.tensor(paddings, device=input_ids.device).unsqueeze(1)
        return self.model.last_logits(
            input_ids, causal_mask(positions >= 0, t), cache.blocks, positions[:, -t:].clamp(min=0)
        )


def aligned_right(input_ids: Tensor, real: Tensor) -> Tensor:
    """Move the padding of texts (b, t) to their left, and make it a token that each text has.

    A repetition penalty then sees nothing that is not in the text.
    """
    padding_first = real.int().argsort(dim=1, stable=True)
    input_ids = input_ids.gather(1, padding_first)
    return torch.where(real.gather(1, padding_first), input_ids, input_ids[:, -1:])


@torch.no_grad()
def decode(
    model: "GPT2Model",
    input_ids: Tensor,
    max_new_tokens: int,
    choose: TokenSampler,
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
    decoder = Decoder(model, input_ids, max_new_tokens, attention_mask, use_cache, recorder)
    for _ in range(max_new_tokens):
        with evaluating(model):  # and not while the caller has the word, who may train, or never come back
            logits = decoder.next_logits()
        token = choose(logits, decoder.text)
        decoder.append(token)
        yield token, logits


@contextmanager
def evaluating(model: "GPT2Model") -> Iterator[None]:
    """Without dropout, if it has any."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
