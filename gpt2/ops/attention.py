"""Causal self-attention.

Axes: b batch, t time, h head, d head dimension, T all of the time.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MOST_ATTENTION = 32 << 20  # bytes of the attention weights that a layer keeps for its gradient
SHORT = 128  # tokens


class PastKeyValues(Protocol):
    """Keys and values of earlier tokens, see `gpt2.generation.kv_cache`."""

    def extend(self, kv: Tensor) -> Tensor:
        """Append keys and values (kv, b, h, t, d). Returns all of them, (kv, b, h, T, d)."""


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


def attend(
    qkv: Tensor,
    num_heads: int,
    attention_mask: Tensor | None = None,
    past: PastKeyValues | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of all heads: queries, keys and values (b, t, 3 * c), side by side, to (b, t, c).

    Args:
        attention_mask: (b, 1, t, T), see `causal_mask`.
        past: The tokens before these; these are added to it.
    """
    q, kv = rearrange(qkv, "b t (qkv h d) -> qkv b h t d", qkv=3, h=num_heads).split((1, 2))
    k, v = kv if past is None else past.extend(kv)
    if past is None and attention_mask is None and _is_small(q[0]):
        return rearrange(_attend_in_matrices(q[0], k, v, dropout), "b h t d -> b t (h d)")
    mixed = F.scaled_dot_product_attention(
        q[0],
        k,
        v,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None and qkv.size(1) > 1,  # a single token is the last: it sees all there are
    )
    return rearrange(mixed, "b h t d -> b t (h d)")


def _is_small(q: Tensor) -> bool:
    """Whether attention to be trained on a CPU is faster with all weights in memory, (b, h, t, t), than by PyTorch.

    PyTorch's own never has them there, which saves memory and no time here: in 16 bits forward and backward take two to
    four times as long, in fp32 more for short texts only (experiments/performance).
    """
    b, h, t, _ = q.shape
    fits = b * h * t * t * q.element_size() <= MOST_ATTENTION
    return q.device.type == "cpu" and q.requires_grad and fits and (q.element_size() == 2 or t <= SHORT)


def _attend_in_matrices(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention of (b, h, t, d). Scores in 16 bits are rounded before the softmax, which PyTorch's are not."""
    b, t, d = q.size(0), q.size(2), q.size(3)
    q, k, v = (rearrange(x, "b h t d -> (b h) t d") for x in (q, k, v))
    not_yet = torch.full((t, t), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    weights = torch.softmax(torch.baddbmm(not_yet, q, rearrange(k, "n t d -> n d t"), alpha=d**-0.5), dim=-1)
    return rearrange(F.dropout(weights, dropout) @ v, "(b h) t d -> b h t d", b=b)
