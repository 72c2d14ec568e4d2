"""Cross-entropy at the head of the model, which never holds the logits of a whole batch.

They are by far the largest thing in training: at GPT-2's vocabulary 200 KB a token, several times over. Here they are
made some rows at a time, turned into their own gradient where they lie, and forgotten.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.ops.linear import Linear

IGNORE_INDEX = -100  # a label that takes no part in the loss, as in transformers

CHUNK = {"cpu": 96 << 20, "cuda": 256 << 20}  # bytes of the logits that there are at a time
IN_CACHE = 4 << 20  # bytes of the logits that a CPU takes the softmax of at a time
ALIGNED = 128  # GPUs multiply fastest what is a multiple of it wide: there the vocabulary is filled up, in here alone


def chunked_linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: Tensor | None = None,
    linear: Linear = F.linear,
) -> Tensor:
    """Cross-entropy in nats of targets (n,) from hidden_states (n, c) and the weight of the head (v, c), a scalar.

    Its gradient is computed along with it, and can be asked for once. The products are in the format of autocast, all
    else is in fp32.

    Args:
        targets: Those of -100 are ignored.
        divisor: Of the sum, a scalar; by default the number of targets, which makes it their mean.
        linear: What multiplies matrices.
    """
    if divisor is None:
        divisor = (targets != IGNORE_INDEX).sum().clamp(min=1)
    scale = 1 / divisor.float()
    if torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden_states, weight, targets, scale, linear)
    return cross_entropies(hidden_states, lambda x: linear(x, weight, None), targets, len(weight)).sum() * scale


def cross_entropies(
    hidden_states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab_size: int
) -> Tensor:
    """Cross-entropy in nats of each target (n,), in fp32, and 0 where it is ignored. For use without a gradient.

    Args:
        head: From hidden states (m, c) to logits (m, v).
    """
    losses = torch.empty(targets.shape, device=targets.device)
    for rows in _chunks(hidden_states, 4 * vocab_size):
        logits = head(hidden_states[rows]).float()
        losses[rows] = F.cross_entropy(logits, targets[rows], ignore_index=IGNORE_INDEX, reduction="none")
    return losses


def _chunks(hidden_states: Tensor, bytes_a_row: int) -> Iterator[slice]:
    """Rows of about the same number, whose logits take no more than there is to be of them at a time."""
    n, most = len(hidden_states), CHUNK.get(hidden_states.device.type, CHUNK["cpu"])
    chunks = -(-n // max(1, most // bytes_a_row))
    return (slice(i * n // chunks, (i + 1) * n // chunks) for i in range(chunks))


class _LinearCrossEntropy(torch.autograd.Function):
    """See `chunked_linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, linear: Linear
    ) -> Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            if device == "cuda":
                head = F.pad(head, (0, 0, 0, -len(head) % ALIGNED))
            loss, of_hidden, of_head = _loss_and_gradients(
                hidden_states.to(dtype), head, targets, scale, linear, len(weight)
            )
        ctx.save_for_backward(of_hidden, of_head[: len(weight)])
        ctx.dtype = hidden_states.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        if not _is_one(of_loss):
            of_hidden, of_weight = of_hidden * of_loss, of_weight * of_loss
        return of_hidden.to(ctx.dtype), of_weight, None, None, None


def _is_one(number: Tensor) -> bool:
    """Whether it is known to be 1, without waiting for a GPU."""
    return number.device.type == "cpu" and not torch.compiler.is_compiling() and number.item() == 1


def _loss_and_gradients(
    hidden_states: Tensor, head: Tensor, targets: Tensor, scale: Tensor, linear: Linear, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by the hidden states (n, c) and the head (v, c), all in fp32.

    Rows of the head beyond the vocabulary get no gradient.
    """
    loss = torch.zeros((), device=head.device)
    of_hidden = torch.empty(hidden_states.shape, device=head.device)
    of_head: Tensor | None = None
    is_fp32 = head.dtype == torch.float32
    for rows in _chunks(hidden_states, len(head) * head.element_size()):
        x, target = hidden_states[rows], targets[rows, None]
        counts = (target != IGNORE_INDEX).float()
        target = torch.where(target == IGNORE_INDEX, 0, target)

        logits = linear(x, head, None)
        logits[:, vocab_size:] = -torch.inf
        of_target = logits.gather(1, target).float()
        normalizer = softmax_(logits)
        loss += ((normalizer - of_target) * counts).sum() * scale
        logits.scatter_(1, target, (torch.exp(of_target - normalizer) - 1).to(logits.dtype))

        of_logits = logits  # but for the rows that do not count, and for the scale
        of_hidden[rows] = linear(of_logits, head.t(), None) * (counts * scale)
        # In 16 bits the scale comes after the product, for it would underflow in fp16; there the sum over many rows
        # might overflow, and is made smaller by a power of two.
        smaller = 2.0 ** -(len(x).bit_length() // 2) if head.dtype == torch.float16 else 1.0
        part = linear(of_logits.t(), (x * (counts * (scale if is_fp32 else smaller)).to(x.dtype)).t(), None)
        if of_head is None:
            of_head = part if is_fp32 else part.float().mul_(scale / smaller)
        else:
            of_head = of_head.add_(part) if is_fp32 else of_head.addcmul_(part, scale / smaller)
    return loss, of_hidden, torch.zeros(head.shape, device=head.device) if of_head is None else of_head


def softmax_(logits: Tensor) -> Tensor:
    """Turn logits (m, v) into probabilities in place. Returns the logarithm of the sum of their exponentials (m, 1).

    Both are computed in fp32. On a CPU, few rows at a time, which stay in its cache from one pass to the next.
    """
    m, v = logits.shape
    in_cache = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, IN_CACHE // (4 * v)) if in_cache else m
    normalizer = torch.empty(m, 1, device=logits.device)
    for start in range(0, m, rows):
        part = logits[start : start + rows]
        exact = part.float() if in_cache else part  # a GPU converts as it reads
        probabilities = torch.softmax(exact, dim=-1, dtype=torch.float32)
        largest = exact.amax(-1, keepdim=True).float()  # whose probability is never too small for fp32
        normalizer[start : start + rows] = largest - probabilities.amax(-1, keepdim=True).log()
        part.copy_(probabilities)
    return normalizer
