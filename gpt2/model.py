"""GPT-2 as OpenAI built it (Radford et al., 2019), its axes named in einops patterns.

Pre-LayerNorm blocks, learned positions, tanh GELU, a head tied to the token embedding. Nothing here knows of text,
files, devices or logging.

Axes: b batch, t time, c channel (d_model), h head, d head dimension, v vocabulary.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import repeat
from math import sqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2.config import GPT2Config, InferenceConfig
from gpt2.generation.decode import decode
from gpt2.generation.kv_cache import FixedPlace, LayerKVCache
from gpt2.generation.sampling import Randomness, next_token
from gpt2.ops import linear as onednn
from gpt2.ops.attention import attend, causal_mask
from gpt2.ops.cross_entropy import IGNORE_INDEX, chunked_linear_cross_entropy, cross_entropies
from gpt2.validation import validate

Forward = Callable[..., tuple[Tensor | None, Tensor | None]]  # as `GPT2Model.forward`


def shifted(labels: Tensor) -> Tensor:
    """Targets (b, t) from labels (b, t): what comes after each position, and nothing after the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


class Linear(nn.Linear):
    """A linear layer that may be told how to multiply matrices, see `GPT2Model.use_linear`."""

    linear: onednn.Linear = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.linear(x, self.weight, self.bias)


class MultiHeadAttention(nn.Module):
    """Causal self-attention. `dropout` falls on the attention weights."""

    def __init__(self, d_model: int, num_heads: int, dropout: float, use_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = Linear(d_model, 3 * d_model, bias=use_bias)
        self.out = Linear(d_model, d_model, bias=use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past: LayerKVCache | FixedPlace | None = None,
    ) -> Tensor:
        """(b, t, c) -> (b, t, c).

        Args:
            attention_mask: (b, t), 1 real and 0 padding, or what `causal_mask` makes of it.
            past: The tokens before these; these are added to it.
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = causal_mask(attention_mask)
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(self.qkv(hidden_states), self.num_heads, attention_mask, past, dropout))


class FeedForward(nn.Module):
    """Two linear layers around a GELU in the tanh form that OpenAI used."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, use_bias: bool):
        super().__init__()
        self.up = Linear(d_model, d_ff, bias=use_bias)
        self.down = Linear(d_ff, d_model, bias=use_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, c) -> (b, t, c)."""
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added after. `dropout` falls before both additions."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout: float,
        attention_dropout: float,
        layer_norm_epsilon: float,
        use_bias: bool,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)
        self.attention = MultiHeadAttention(d_model, num_heads, attention_dropout, use_bias)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)
        self.feed_forward = FeedForward(d_model, d_ff, dropout, use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past: LayerKVCache | FixedPlace | None = None,
    ) -> Tensor:
        """(b, t, c) -> (b, t, c). The rest as `MultiHeadAttention` takes it."""
        attended = self.attention(self.attention_norm(hidden_states), attention_mask, past)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class GPT2Model(nn.Module):
    """The whole language model: tokens in, logits of the next token out.

    Raises:
        ValueError: `config` describes no model, such as a `d_model` that its heads do not divide.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        if found := validate(config):
            raise ValueError("; ".join(found))
        self.config = config
        self.gradient_checkpointing = False
        self.linear: onednn.Linear = F.linear

        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                config.d_model,
                config.num_heads,
                config.d_ff,
                config.residual_dropout,
                config.attention_dropout,
                config.layer_norm_epsilon,
                config.use_bias,
            )
            for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.head: Callable[[Tensor], Tensor] | None = (
            None  # in place of the token embedding, which is it: see gpt2.ops.cpu_inference
        )
        self._initialize()

    def _initialize(self) -> None:
        """GPT-2's initialisation: normal weights, and narrower ones where a layer writes to the residual stream."""
        std = self.config.initializer_range
        residual_std = std / sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(module.weight, std=residual_std if writes_residual else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        divisor: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (b, t, v) for input_ids (b, t), and, with labels or targets, the mean cross-entropy in nats.

        Args:
            input_ids: Token ids (b, t), t at most `context_length`.
            labels: What `transformers` calls labels: (b, t), usually `input_ids` itself, shifted in here so that
                logit t is held against label t + 1. The last position then learns nothing.
            attention_mask: (b, t), 1 for a real token and 0 for padding, left or right.
            targets: Labels that are shifted already: target t is the token after input t. All t positions learn.
                A label or target of -100 is ignored.
            divisor: Of the sum of the cross-entropies, a scalar, in place of the number of targets.
            return_logits: If False, compute logits in chunks and discard them, see `gpt2.ops.cross_entropy`.

        Raises:
            ValueError: `input_ids` is empty or longer than `context_length`, or both `labels` and `targets` are given.
        """
        if labels is not None and targets is not None:
            raise ValueError("give labels (shifted here) or targets (shifted already), not both")
        hidden_states = self._hidden_states(input_ids, attention_mask)
        if labels is not None:
            targets = shifted(labels)
        if targets is not None:
            targets = rearrange(targets, "b t -> (b t)")
        if not return_logits:
            if targets is None:
                return None, None
            rows = rearrange(hidden_states, "b t c -> (b t) c")
            return None, chunked_linear_cross_entropy(rows, self.token_embedding.weight, targets, divisor, self.linear)

        logits = self._head(hidden_states)
        if targets is None:
            return logits, None
        rows = rearrange(logits, "b t v -> (b t) v").float()
        total = F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return logits, total / ((targets != IGNORE_INDEX).sum().clamp(min=1) if divisor is None else divisor)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of each target (b, t), in fp32; 0 where a target is ignored. Arguments as `forward`."""
        rows = rearrange(self._hidden_states(input_ids, attention_mask), "b t c -> (b t) c")
        losses = cross_entropies(rows, self._head, rearrange(targets, "b t -> (b t)"), self.config.vocab_size)
        return losses.view_as(targets)

    def use_linear(self, linear: onednn.Linear) -> None:
        """Multiply by weights with this function, which has the arguments and the result of `F.linear`."""
        self.linear = linear
        for module in self.modules():
            if isinstance(module, Linear):
                module.linear = linear

    def _hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Sequence[LayerKVCache | FixedPlace] = (),
        positions: Tensor | None = None,
    ) -> Tensor:
        """(b, t) -> (b, t, c): everything but the head."""
        t, start = input_ids.size(1), cache[0].used if cache else 0
        if not 1 <= t <= self.config.context_length - start:
            raise ValueError(
                f"{start + t} tokens are none or more than the context_length of {self.config.context_length}"
            )
        if attention_mask is None and start and t > 1:
            attention_mask = torch.ones(1, start + t, device=input_ids.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = causal_mask(attention_mask, t)
        if positions is None:
            positions = torch.arange(start, start + t, device=input_ids.device)

        hidden_states = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        for block, past in zip(self.blocks, cache or repeat(None), strict=False):
            if self.gradient_checkpointing and self.training:
                hidden_states = checkpoint(block, hidden_states, attention_mask, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, attention_mask, past)
        return self.final_norm(hidden_states)

    def _head(self, hidden_states: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(hidden_states)
        return self.linear(hidden_states, self.token_embedding.weight, None)

    def last_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Sequence[LayerKVCache | FixedPlace],
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (b, v) after input_ids (b, t), which come after what is in the cache of each block.

        Args:
            attention_mask: (b, T) over what is in the cache and these, 1 real and 0 padding, or what `causal_mask`
                makes of it, (b, 1, t, T).
            positions: Where each token stands in its text, (b, t); as many as come before it if None.
        """
        return self._head(self._hidden_states(input_ids, attention_mask, cache, positions)[:, -1])

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,
        eos_token_id: int | None = None,
        generator: Randomness = None,
        use_cache: bool = True,
        min_p: float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Generator[Tensor, None, Tensor]:
        """Continue input_ids (b, t) token by token, see `gpt2.decoding.decode`.

        Args:
            temperature: Divides the logits; 0 is greedy, as is `do_sample=False`.
            top_k, top_p, min_p, repetition_penalty, generator: See `gpt2.generation.sampling`.
            eos_token_id: A sequence that has produced it goes on with nothing else; generation ends when all have.

        Yields:
            The next token of each sequence, (b,).

        Returns:
            The whole sequences, prompt included, (b, t + n).

        Raises:
            ValueError: A value is out of its range, or a sequence has no token.
        """
        asked = InferenceConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, min_p=min_p
        )
        if found := validate(asked):
            raise ValueError("; ".join(found))
        choose = partial(
            next_token,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            do_sample=do_sample,
            generator=generator,
            min_p=min_p,
        )
        ended = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        for token, _ in decode(self, input_ids, max_new_tokens, choose, attention_mask, use_cache):
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended = ended | (token == eos_token_id)
            input_ids = torch.cat((input_ids, rearrange(token, "b -> b 1")), dim=1)
            yield token
            if eos_token_id is not None and ended.all():
                break
        return input_ids

    def num_parameters(self) -> int:
        """Number of weights, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, t: int) -> float:
        """Floating point operations a token of a block of t tokens costs to train on, forward and backward.

        Counted as in PaLM (Chowdhery et al., 2022, appendix B): 6 for each weight of a matrix product (the position
        table is none) and 12 * layers * d_model * t for attention, without the discount for causality.
        """
        multiplied = self.num_parameters() - self.position_embedding.weight.numel()
        return 6 * multiplied + 12 * self.config.num_layers * self.config.d_model * t
