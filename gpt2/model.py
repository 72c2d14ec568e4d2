"""GPT-2 (Radford et al., 2019) with its axes named in einops patterns.

Pre-LayerNorm blocks, learned positions, GELU, an output head tied to the token embedding. Logits, loss, gradients
and greedy text equal those of `GPT2LMHeadModel` in transformers.

Axes: b batch, t time, c channel (d_model), v vocabulary.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gpt2.config import GPT2Config, InferenceConfig
from gpt2.generation.decode import decode
from gpt2.generation.sampling import Generators, SamplingParams, next_token
from gpt2.ops.attention import PastKeyValues, attend, causal_mask
from gpt2.ops.cross_entropy import (
    IGNORE_INDEX,
    chunked_linear_cross_entropy,
    cross_entropies,
    padded_head,
    score_targets,
    shifted,
)
from gpt2.ops.linear import LinearFunction
from gpt2.validation import validate

Forward = Callable[..., tuple[Tensor | None, Tensor | None]]  # as `GPT2Model.forward`
Run = Callable[..., Tensor]  # calls its first argument, a block or the loss, with the others

APPROXIMATIONS = {"gelu_new": "tanh", "gelu": "none"}  # of GELU, by `GPT2Config.activation`


def call(part: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return part(*arguments)


class Linear(nn.Linear):
    """`nn.Linear` with an exchangeable product, see `GPT2Model.use_linear`."""

    linear: LinearFunction = staticmethod(F.linear)
    stacked = 1  # how many matrices of equal shape lie one above the other in `weight`

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.linear(x, self.weight, self.bias)


class MultiHeadAttention(nn.Module):
    """Causal self-attention. `dropout` acts on the attention weights."""

    scale: float | None = None  # see `attend`

    def __init__(self, d_model: int, num_heads: int, dropout: float, use_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = Linear(d_model, 3 * d_model, bias=use_bias)
        self.qkv.stacked = 3  # see `attend`
        self.out = Linear(d_model, d_model, bias=use_bias)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: PastKeyValues | None = None
    ) -> Tensor:
        """(b, t, c) -> (b, t, c).

        Args:
            attention_mask: (b, t), 1 for real tokens and 0 for padding; or boolean (b, 1, t, T), see `causal_mask`.
            past: A key-value cache, see `gpt2.generation.kv_cache`.
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = causal_mask(attention_mask)
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(self.qkv(hidden_states), self.num_heads, attention_mask, past, dropout, self.scale))


class FeedForward(nn.Module):
    """Two linear layers around a GELU: in the tanh approximation, as in OpenAI's GPT-2, or exact."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, use_bias: bool, activation: str = "gelu_new"):
        super().__init__()
        self.up = Linear(d_model, d_ff, bias=use_bias)
        self.down = Linear(d_ff, d_model, bias=use_bias)
        self.dropout = nn.Dropout(dropout)
        self.approximate = APPROXIMATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, c) -> (b, t, c)."""
        return self.dropout(self.down(F.gelu(self.up(x), approximate=self.approximate)))


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each with LayerNorm before and a residual connection. `dropout` acts on both."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout: float,
        attention_dropout: float,
        layer_norm_epsilon: float,
        use_bias: bool,
        activation: str = "gelu_new",
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)
        self.attention = MultiHeadAttention(d_model, num_heads, attention_dropout, use_bias)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)
        self.feed_forward = FeedForward(d_model, d_ff, dropout, use_bias, activation)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: PastKeyValues | None = None
    ) -> Tensor:
        """(b, t, c) -> (b, t, c). Arguments as of `MultiHeadAttention`."""
        attended = self.attention(self.attention_norm(hidden_states), attention_mask, past)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm times `scale`, which multiplies gain and bias: cheaper than multiplying the activations."""

    def __init__(self, d_model: int, epsilon: float, scale: float):
        super().__init__(d_model, epsilon)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., c) -> (..., c)."""
        return F.layer_norm(x, self.normalized_shape, self.weight * self.scale, self.bias * self.scale, self.eps)


class GPT2Model(nn.Module):
    """The language model: token ids in, logits of the next token out.

    With `parametrization="mup"` it has the maximal update parametrization for Adam of Yang et al. (2022, "Tensor
    Programs V", table 8): initial hidden matrices have a variance and a learning rate of base width / width (see
    `gpt2.training.optimizer`), attention's scores are divided by the head width instead of its root, and the logits are
    multiplied by base width / width. Embeddings, biases and gains have the initialization and rate of any width.

    Table 8 allows one matrix to be both token embedding and head: input and output weights have the same initialization
    and learning rate at any width. Only the output needs the multiplier: after some steps the hidden states correlate
    with the embedding, and a sum of correlated products grows in proportion to the width. The final norm applies the
    multiplier, so that it is on every path to the logits.

    Raises:
        ValueError: `config` is invalid, for example because num_heads does not divide d_model.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        if problems := validate(config):
            raise ValueError("; ".join(problems))
        self.config = config
        self.gradient_checkpointing = False
        self.linear: LinearFunction = F.linear
        self.chunk_bytes: int | None = None  # of logits, see `chunked_linear_cross_entropy`

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
                config.activation,
            )
            for _ in range(config.num_layers)
        )
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        if config.parametrization == "mup":
            self.final_norm = ScaledLayerNorm(config.d_model, config.layer_norm_epsilon, config.width_ratio)
            for module in self.modules():
                if isinstance(module, MultiHeadAttention):
                    module.scale = config.query_ratio / sqrt(config.d_model // config.num_heads)
        self.head: nn.Module | None = None  # None: the token embedding; see gpt2.ops.cpu_inference
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights; those of projections into the residual stream shrink by sqrt(2 * num_layers) (GPT-2, 2.3)."""
        std = self.config.initializer_range
        hidden_std = std * sqrt(self.config.width_ratio)
        residual_std = hidden_std / sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                is_residual = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(module.weight, std=residual_std if is_residual else hidden_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def use_linear(self, linear: LinearFunction) -> None:
        """Multiply by weights with this function, a drop-in replacement of `F.linear`."""
        self.linear = linear
        for module in self.modules():
            if isinstance(module, Linear):
                module.linear = linear

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        divisor: Tensor | None = None,
        return_logits: bool = True,
        run: Run | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (b, t, v), and with labels or targets the mean cross-entropy in nats, a scalar.

        Args:
            input_ids: Token ids (b, t), t at most `context_length`.
            labels: As in transformers: (b, t), usually `input_ids` itself. They are shifted here, so that logit t is
                compared with label t + 1, and the last position has no target.
            attention_mask: (b, t), 1 for real tokens and 0 for padding, on either side.
            targets: Labels that are already shifted: target t is the token after input t, so all positions learn.
                -100 is ignored, in labels and targets.
            divisor: Divides the sum of the cross-entropies, a scalar; the number of targets by default.
            return_logits: If False, logits are computed in chunks and discarded, see `gpt2.ops.cross_entropy`.
            run: Calls each block, and the loss without logits, see `gpt2.training.compile`; None: directly.

        Raises:
            ValueError: `input_ids` is empty or longer than `context_length`, or both labels and targets are given.
        """
        if labels is not None and targets is not None:
            raise ValueError("give labels (shifted by the model) or targets (already shifted), not both")
        if labels is not None:
            targets = shifted(labels)
        if targets is not None:
            targets = rearrange(targets, "b t -> (b t)")

        run = run or call
        hidden_states = self._hidden_states(input_ids, attention_mask, run=run)
        if not return_logits:
            if targets is None:
                return None, None
            rows, weight = rearrange(hidden_states, "b t c -> (b t) c"), self.token_embedding.weight
            return None, run(
                chunked_linear_cross_entropy, rows, weight, targets, divisor, self.linear, self.chunk_bytes
            )

        logits = self._head(hidden_states)
        if targets is None:
            return logits, None
        rows = rearrange(logits, "b t v -> (b t) v").float()
        total = F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return logits, total / ((targets != IGNORE_INDEX).sum().clamp(min=1) if divisor is None else divisor)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of each target, (b, t) in fp32, 0 where it is ignored. Arguments as of `forward`."""
        rows = rearrange(self._hidden_states(input_ids, attention_mask), "b t c -> (b t) c")
        losses = cross_entropies(rows, self._head_of_rows(), rearrange(targets, "b t -> (b t)"), self.config.vocab_size)
        return losses.view_as(targets)

    @torch.no_grad()
    def score_tokens(
        self,
        input_ids: Tensor,
        places: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats of some tokens, (n,) in fp32, and whether each is the likeliest one, (n,).

        Args:
            places: Of the token before each of them, in the flattened `input_ids`, (n,).
            targets: These tokens, (n,).
            attention_mask, positions: As of `last_logits`.
        """
        rows = rearrange(self._hidden_states(input_ids, attention_mask, positions=positions), "b t c -> (b t) c")
        return score_targets(rows[places], self._head_of_rows(), targets, self.config.vocab_size)

    def last_logits(
        self,
        input_ids: Tensor,
        past: Sequence[PastKeyValues] = (),
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        last: Tensor | None = None,
        each: bool = False,
    ) -> Tensor:
        """Logits (b, v) of the token after each text (b, t), for decoding.

        Args:
            past: The key-value cache of each block.
            attention_mask: Boolean (b, 1, t, T) over the T tokens that the cache returns.
            positions: Of each token, (b, t); 0 to t - 1 by default.
            last: Index of the last token of each text, (b,), where texts are padded on the right.
            each: Return logits after each token instead, (b, t, v).
        """
        hidden_states = self._hidden_states(input_ids, attention_mask, past, positions)
        if each:
            return self._head(hidden_states)
        if last is None:
            return self._head(hidden_states[:, -1])
        return self._head(hidden_states[torch.arange(len(last), device=last.device), last])

    def _hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past: Sequence[PastKeyValues] = (),
        positions: Tensor | None = None,
        run: Run = call,
    ) -> Tensor:
        """(b, t) -> (b, t, c): everything before the head."""
        t, context_length = input_ids.size(1), self.config.context_length
        if not 1 <= t <= context_length:
            raise ValueError(f"input_ids: {t} tokens are not between 1 and the context_length of {context_length}")
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = causal_mask(attention_mask)
        if positions is None:
            positions = torch.arange(t, device=input_ids.device)

        hidden_states = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        pasts: Sequence[PastKeyValues | None] = past or [None] * self.config.num_layers
        for block, block_past in zip(self.blocks, pasts, strict=True):
            if self.gradient_checkpointing and self.training:
                hidden_states = checkpoint(run, block, hidden_states, attention_mask, use_reentrant=False)
            else:
                hidden_states = run(block, hidden_states, attention_mask, block_past)
        return self.final_norm(hidden_states)

    def _head_of_rows(self) -> Callable[[Tensor], Tensor]:
        """The head for many rows at a time, which may be padded."""
        if self.head is not None:
            return self.head
        head = padded_head(self.token_embedding.weight)
        return lambda rows: self.linear(rows, head, None)

    def _head(self, hidden_states: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(hidden_states)
        return self.linear(hidden_states, self.token_embedding.weight, None)

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
        generator: Generators = None,
        use_cache: bool = True,
        min_p: float | None = None,
        attention_mask: Tensor | None = None,
    ) -> Generator[Tensor, None, Tensor]:
        """Continue texts (b, t) token by token, see `gpt2.generation.decode`.

        Args:
            temperature: Divides the logits; 0 is greedy, as is `do_sample=False`.
            top_k, top_p, min_p, repetition_penalty, generator: See `gpt2.generation.sampling`.
            eos_token_id: After this token a text is filled with it; generation ends when all texts have ended.
            use_cache: If False, recompute the keys and values of all tokens for each new one.
            attention_mask: (b, t), 1 for real tokens and 0 for padding, on either side.

        Yields:
            The next token of each text, (b,).

        Returns:
            The texts with their prompts, (b, t + n).

        Raises:
            ValueError: A value is out of its range, or a text has no token.
        """
        config = InferenceConfig(
            do_sample=do_sample,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        if problems := validate(config):
            raise ValueError("; ".join(problems))
        sampler = partial(next_token, params=SamplingParams.from_config(config), generators=generator)
        is_done = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        for tokens, _ in decode(self, input_ids, max_new_tokens, sampler, attention_mask, use_cache):
            if eos_token_id is not None:
                tokens = tokens.masked_fill(is_done, eos_token_id)
                is_done = is_done | (tokens == eos_token_id)
            input_ids = torch.cat((input_ids, rearrange(tokens, "b -> b 1")), dim=1)
            yield tokens
            if eos_token_id is not None and is_done.all():
                break
        return input_ids

    def matrices(self) -> dict[str, int]:
        """The names of the weight matrices of the blocks' linear layers, each with its `Linear.stacked`, 1 without."""
        modules = self.blocks.named_modules(prefix="blocks")
        return {
            f"{name}.weight": getattr(module, "stacked", 1) for name, module in modules if isinstance(module, nn.Linear)
        }

    def num_parameters(self) -> int:
        """Number of weights; the tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, t: int) -> float:
        """FLOPs of training on one token of a sequence of t tokens, forward and backward.

        As in PaLM (Chowdhery et al., 2022, appendix B): 6 for each weight in a matrix product (all but the position
        table), and 12 * num_layers * d_model * t for attention, without a discount for causality.
        """
        multiplied = self.num_parameters() - self.position_embedding.weight.numel()
        return 6 * multiplied + 12 * self.config.num_layers * self.config.d_model * t


class _SkipInitialization(TorchFunctionMode):
    """Calls of `torch.nn.init` do nothing: on the meta device they would import torch._dynamo, which takes a second."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def meta_model(config: GPT2Config) -> GPT2Model:
    """A model on the meta device: shapes only, no memory."""
    with torch.device("meta"), _SkipInitialization():
        return GPT2Model(config)
