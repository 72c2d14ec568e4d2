"""Causal self-attention: PyTorch's fused kernel, or explicit matrices where those train faster on a CPU.

The gain of the explicit matrices depends on the processor. In the latest record (experiments/performance,
levers_small.json) it is within the noise of a training step of a 16-million-weight model.

Axes: b batch, t time, h head, d head dimension, T all tokens that are attended to.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Stores keys and values (kv, b, h, t, d) of new tokens. Returns those to attend to, (kv, b, h, T, d).
PastKeyValues = Callable[[Tensor], Tensor]

MAX_WEIGHT_BYTES = 32 << 20  # of the attention weights that one layer saves for its backward pass
MAX_FP32_TOKENS = 128  # in fp32 the fused kernel wins on longer texts


def causal_mask(attention_mask: Tensor) -> Tensor:
    """Expand a padding mask (b, t), 1 for real tokens, to a boolean mask (b, 1, t, t), True where attention is allowed.

    Padding attends to itself, since a softmax over no tokens is NaN on some backends.
    """
    t = attention_mask.size(-1)
    causal = torch.ones(t, t, dtype=torch.bool, device=attention_mask.device).tril()
    is_self = torch.eye(t, dtype=torch.bool, device=attention_mask.device)
    return causal & rearrange(attention_mask.bool(), "b t -> b 1 1 t") | is_self


def attend(
    qkv: Tensor,
    num_heads: int,
    attention_mask: Tensor | None = None,
    past: PastKeyValues | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Multi-head causal attention, (b, t, 3 * c) -> (b, t, c).

    Args:
        qkv: Queries, keys and values side by side, each (b, t, c).
        attention_mask: Boolean (b, 1, t, T), see `causal_mask`. None is causal attention without padding.
        past: A key-value cache, see `PastKeyValues`. Attention is computed in its number format.
        dropout: Probability of dropping an attention weight.
        scale: Of the scores; 1 / sqrt(d) by default.
    """
    q, kv = rearrange(qkv, "b t (qkv h d) -> qkv b h t d", qkv=3, h=num_heads).split((1, 2))
    k, v = kv if past is None else past(kv)
    if past is None and attention_mask is None and _explicit_is_faster(q[0]):
        return rearrange(_explicit_attention(q[0], k, v, dropout, scale), "b h t d -> b t (h d)")
    is_causal = attention_mask is None and qkv.size(1) > 1  # a single token attends to everything before it
    mixed = F.scaled_dot_product_attention(q[0].to(k.dtype), k, v, attention_mask, dropout, is_causal, scale=scale)
    return rearrange(mixed, "b h t d -> b t (h d)").to(qkv.dtype)


def _explicit_is_faster(q: Tensor) -> bool:
    """Whether to train with all attention weights (b, h, t, t) in memory: on a CPU, in 16 bits or on short texts.

    The fused kernel recomputes the weights in the backward pass.
    """
    b, h, t, _ = q.shape
    fits = b * h * t * t * q.element_size() <= MAX_WEIGHT_BYTES
    return q.device.type == "cpu" and q.requires_grad and fits and (q.element_size() == 2 or t <= MAX_FP32_TOKENS)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v of (b, h, t, d). In 16 bits the scores are rounded before the softmax."""
    b, t, d = q.size(0), q.size(2), q.size(3)
    q, k, v = (rearrange(x, "b h t d -> (b h) t d") for x in (q, k, v))
    future = torch.full((t, t), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future, q, rearrange(k, "n t d -> n d t"), alpha=scale or d**-0.5)
    mixed = F.dropout(torch.softmax(scores, dim=-1), dropout) @ v
    return rearrange(mixed, "(b h) t d -> b h t d", b=b)
