"""The decoding loop: one token at a time over a key-value cache, with a sliding window beyond the model's context.

Texts of different lengths are decoded side by side, and each gets the logits that it gets alone.

Axes: b batch, t time, v vocabulary, T columns of the cache.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from gpt2.config import GPT2Config
from gpt2.generation.kv_cache import KVCache
from gpt2.generation.prompt_lookup import Drafts, PromptLookup, draft_length
from gpt2.ops.attention import PastKeyValues

TokenSampler = Callable[[Tensor, Tensor], Tensor]  # (logits (b, v), text so far (b, t)) -> next tokens (b,)


class LanguageModel(Protocol):
    """What decoding needs of a model. `GPT2Model` implements it."""

    config: GPT2Config
    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def parameters(self) -> Iterator[Tensor]: ...

    @property
    def last_logits(self) -> Callable[..., Tensor]: ...  # see `GPT2Model.last_logits`


def window_start(length: int, context_length: int) -> int:
    """Index of the first token that the model reads of a text of `length` tokens; 0 as long as all of it fits.

    Beyond the context, the window moves by a quarter of the context at a time. Positions count from the start of the
    window, so each move invalidates the cache: moving at every token would make the cache useless.
    """
    stride = max(1, context_length // 4)
    return stride * ceil(max(0, length - context_length) / stride)


def decode_step(
    model: LanguageModel, cache: KVCache, tokens: Tensor, columns: Tensor, visible: int, is_last: bool = False
) -> Tensor:
    """Logits (b, t, v) after each of the next tokens (b, t) of each text, which are stored in the cache.

    Args:
        columns: Of the cache, where the first of these tokens is stored, (b,).
        visible: Number of columns that attention reads; each token attends to those up to its own.
        is_last: Whether the tokens of all texts are stored in the last visible columns.
    """
    t = tokens.size(1)
    positions = rearrange(columns, "b -> b 1") + torch.arange(t, device=columns.device)
    mask = None
    if not is_last or t > 1:  # a single token in the last visible column attends to all of them
        mask = torch.arange(visible, device=columns.device) <= rearrange(positions, "b t -> b 1 t 1")
    past = [partial(layer.append, visible=visible, columns=None if is_last else columns) for layer in cache.layers]
    return model.last_logits(tokens, past, mask, positions, each=True)


class CompiledDecoding:
    """`decode_step` at fixed shapes, compiled into one CUDA graph: a static cache and `mode="reduce-overhead"`.

    The kernels of one step take longer to launch than to run; a CUDA graph launches them together. This is the way of
    gpt-fast (pytorch-labs). It has been tested on a CPU only, with the compiler's CPU backends.
    """

    def __init__(self, **options: Any):
        """`options`: of `torch.compile`, in place of `mode="reduce-overhead"`."""
        self.options = options or {"mode": "reduce-overhead"}
        self.cache: KVCache | None = None
        self.step = decode_step

    def cache_for(self, config: GPT2Config, b: int, length: int) -> KVCache:
        """The cache for b texts of at most `length` tokens: the previous one if its shape fits.

        Lengths are rounded up to multiples of 128, so that few shapes are compiled.
        """
        length = min(128 * ceil(length / 128), config.context_length)
        if self.cache is None or (self.cache.b, self.cache.length) != (b, length):
            torch.compiler.reset()  # the compiler refuses a function that it has compiled for too many shapes
            self.cache = KVCache(config.num_layers, b, length)
            self.step = torch.compile(decode_step, fullgraph=True, dynamic=False, **self.options)
        return self.cache

    def __call__(self, model: LanguageModel, tokens: Tensor, columns: Tensor) -> Tensor:
        """Logits (b, t, v), which the next call overwrites."""
        assert self.cache is not None
        torch.compiler.cudagraph_mark_step_begin()
        return self.step(model, self.cache, tokens, columns, self.cache.length)


class Decoder:
    """Texts that are being decoded, with their cache."""

    def __init__(
        self,
        model: LanguageModel,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        compiled: CompiledDecoding | None = None,
        drafts: Drafts | None = None,
    ):
        """See `decode`."""
        b, t = input_ids.shape
        lengths = [t] * b
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: {max_new_tokens} is negative")
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                shapes = f"{tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}"
                raise ValueError(f"attention_mask has shape {shapes}: they must be equal")
            lengths = attention_mask.bool().sum(1).tolist()
            input_ids = align_right(input_ids, attention_mask.bool())
        if t == 0 or min(lengths) == 0:
            raise ValueError("each text needs at least one token")
        self.model, self.text, self.lengths = model, input_ids, lengths
        self.tokens = input_ids[:, -1]  # the latest one of each text
        self.starts = [-1] * b  # start of each text's window; -1: not read yet
        self.columns = torch.zeros(b, dtype=torch.long, device=input_ids.device)  # that of each text's latest token
        self.compiled = compiled if use_cache else None
        self.remaining = max_new_tokens
        self.lookup: PromptLookup | None = None
        if drafts and use_cache and draft_length(b):
            texts = [row[t - n :].tolist() for row, n in zip(input_ids, lengths, strict=True)]
            self.lookup = PromptLookup(texts, drafts)
        self.ahead: list[tuple[Tensor, Tensor]] = []  # tokens (b,) of the draft, and the logits (b, v) after them
        self.identity = object()  # `self` would be a cycle of references, which keeps the cache in memory
        self.cache: KVCache | None = None
        length = min(max(lengths) + max_new_tokens, model.config.context_length)
        if self.compiled:
            self.cache = self.compiled.cache_for(model.config, b, length)
        elif use_cache:
            self.cache = KVCache(model.config.num_layers, b, length)

    def append(self, tokens: Tensor) -> None:
        """Add a token (b,) to each text."""
        self.tokens = tokens
        self.text = torch.cat((self.text, rearrange(tokens, "b -> b 1")), dim=1)
        self.lengths = [length + 1 for length in self.lengths]
        self.remaining -= 1
        if self.lookup:
            for row, token in enumerate(tokens.tolist()):
                self.lookup.append(row, token)

    def next_logits(self) -> Tensor:
        """Logits (b, v) of the token after each text; known already while the texts follow the latest draft."""
        if self.lookup and self.ahead:
            drafted, logits = self.ahead.pop(0)
            if torch.equal(drafted, self.tokens):
                self.columns = self.columns + 1
                self.lookup.drafts.accepted += len(drafted)
                return logits
            self.ahead = []
        return self._computed_logits()

    def _computed_logits(self) -> Tensor:
        """Take a step; texts whose window has moved are read again from the start of their window."""
        starts = [window_start(length, self.model.config.context_length) for length in self.lengths]
        is_valid = self.cache is not None and self.cache.owner is self.identity
        stale = [row for row, start in enumerate(starts) if not is_valid or start != self.starts[row]]
        self.starts = starts
        sizes = [length - start for length, start in zip(self.lengths, starts, strict=True)]
        self.columns = torch.tensor(sizes, device=self.text.device) - 1 if stale else self.columns + 1
        if self.lookup:
            self.lookup.drafts.passes += 1
        if len(stale) == len(starts):
            return self._read_windows(stale, sizes)
        logits = self._step(sizes, None if stale else self._draft(max(sizes)))
        if stale:  # their rows of the step are meaningless
            logits[stale] = self._read_windows(stale, sizes)
        return logits

    def _draft(self, size: int) -> Tensor | None:
        """A draft of the next tokens of each text, (b, k), within the context and the requested number of tokens.

        A compiled step takes the full length or none, because each number of tokens needs a compilation.
        """
        if not self.lookup:
            return None
        full = draft_length(len(self.lengths))
        length = min(full, self.model.config.context_length - size, self.remaining - 1)
        if length < (full if self.compiled else 1):
            return None
        draft = self.lookup.draft(length)
        return None if draft is None else torch.tensor(draft, device=self.text.device)

    def _step(self, sizes: list[int], draft: Tensor | None) -> Tensor:
        assert self.cache is not None
        tokens, visible = rearrange(self.tokens, "b -> b 1"), max(sizes)
        if draft is not None:
            tokens, visible = torch.cat((tokens, draft), dim=1), visible + draft.size(1)
        if self.compiled:
            logits = self.compiled(self.model, tokens, self.columns)
        else:
            logits = decode_step(self.model, self.cache, tokens, self.columns, visible, min(sizes) == max(sizes))
        if self.lookup and draft is not None:
            logits = logits.clone() if self.compiled else logits  # other texts may step before these are used
            self.lookup.drafts.drafted += draft.numel()
            self.ahead = list(zip(draft.unbind(1), logits[:, 1:].unbind(1), strict=True))
        return logits[:, 0]

    def _read_windows(self, rows: list[int], sizes: list[int]) -> Tensor:
        """Read the windows of some texts in one pass, padded on the right, where causal attention ignores padding."""
        past: list[PastKeyValues] = []
        if self.cache is not None:
            self.cache.owner = self.identity
            past = [partial(layer.prefill, rows=rows) for layer in self.cache.layers]
        last = self.columns[rows]
        end = self.text.size(1) - 1
        columns = torch.arange(max(sizes[row] for row in rows), device=self.text.device)
        index = (end - rearrange(last, "b -> b 1") + columns).clamp(max=end)
        return self.model.last_logits(self.text[rows].gather(1, index), past, last=last)


def align_right(input_ids: Tensor, is_real: Tensor) -> Tensor:
    """Move the padding of texts (b, t) to the left, and replace it by a token of the text.

    Padding that repeats a token of the text does not affect a repetition penalty.
    """
    padding_first = is_real.int().argsort(dim=1, stable=True)
    input_ids = input_ids.gather(1, padding_first)
    return torch.where(is_real.gather(1, padding_first), input_ids, input_ids[:, -1:])


@torch.no_grad()
def decode(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    sampler: TokenSampler,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    compiled: CompiledDecoding | None = None,
    drafts: Drafts | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue texts token by token, without dropout.

    Args:
        input_ids: The texts (b, t).
        sampler: Chooses the next token of each text.
        attention_mask: (b, t), 1 for a real token and 0 for padding, on either side. None is no padding.
        use_cache: If False, the whole window is read again for each token.
        compiled: Take the steps with a compiled function over its static cache.
        drafts: Decode speculatively, see `gpt2.generation.prompt_lookup`, and count here. Needs the cache.

    Yields:
        The next token of each text (b,), and the logits (b, v) it was chosen from, valid until the next step.

    Raises:
        ValueError: A text has no token, or the mask has another shape than the texts.
    """
    decoder = Decoder(model, input_ids, max_new_tokens, attention_mask, use_cache, compiled, drafts)
    for _ in range(max_new_tokens):
        was_training = model.training  # dropout is off only during the step: between two tokens, the caller may train
        if was_training:
            model.train(False)
        try:
            logits = decoder.next_logits()
        finally:
            if was_training:
                model.train()
        tokens = sampler(logits, decoder.text)
        decoder.append(tokens)
        yield tokens, logits
