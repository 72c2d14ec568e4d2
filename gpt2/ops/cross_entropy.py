"""Cross-entropy of the output head in chunks, so that the logits of a whole batch never exist.

Logits are by far the largest activations: 200 KB a token with GPT-2's vocabulary, times several copies. Here a chunk of
them is computed, turned into its own gradient in place, and freed. Gain (experiments/performance): with 16 sequences
of 256 tokens, a training step of a 16-million-weight model peaks at 1,240 MB in fp32 instead of nanoGPT's 4,175
(small_batch_16.json); with the logits of 4 sequences at once, a step in bf16 takes 8 % longer (levers_small.json).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2.ops.linear import LinearFunction

IGNORE_INDEX = -100  # a target that does not count, as in transformers

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}  # logits in memory at a time; a `ComputePlan` may set another size
CHUNK_ROWS = {"cuda": 128}  # a chunk has a multiple of these rows: aligned products are faster
VOCABULARY_MULTIPLE = {"cpu": 64, "cuda": 128}  # a large head is padded to it: aligned products are faster
MAX_PADDING = 1 / 32  # of the head; more costs more than it gains
SOFTMAX_BYTES = 6 << 20  # logits in fp32 for which a CPU computes a softmax at a time: they stay in its cache


def shifted(labels: Tensor) -> Tensor:
    """Targets (b, t) from labels (b, t): the token after each position, and IGNORE_INDEX after the last one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def chunked_linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: Tensor | None = None,
    linear: LinearFunction = F.linear,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Mean cross-entropy in nats, a scalar, of targets (n,) given hidden_states (n, c) and the head's weight (v, c).

    The gradient is computed in the forward pass, and can be used by one backward pass. Products run in the format of
    autocast, everything else in fp32.

    Args:
        targets: Token ids; `IGNORE_INDEX` is skipped.
        divisor: Divides the sum, a scalar; the number of targets by default.
        linear: The matrix product, see `gpt2.ops.linear`.
        chunk_bytes: Of the logits in memory at a time; None: `CHUNK_BYTES`.
    """
    if divisor is None:
        divisor = (targets != IGNORE_INDEX).sum().clamp(min=1)
    scale = 1 / divisor.float()
    if torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden_states, weight, targets, scale, linear, chunk_bytes)
    head = padded_head(weight)
    return cross_entropies(hidden_states, lambda x: linear(x, head, None), targets, len(weight)).sum() * scale


def padded_head(weight: Tensor) -> Tensor:
    """The head (v, c) in the format of autocast, with rows of zeros up to a multiple of `VOCABULARY_MULTIPLE`."""
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    missing = -len(weight) % VOCABULARY_MULTIPLE.get(device, 1)
    if not 0 < missing <= MAX_PADDING * len(weight):
        return weight.to(dtype)
    head = torch.empty(len(weight) + missing, weight.size(1), dtype=dtype, device=weight.device)
    head[: len(weight)] = weight  # one pass, where a conversion and `F.pad` would be two
    head[len(weight) :] = 0
    return head


def cross_entropies(
    hidden_states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab_size: int
) -> Tensor:
    """Cross-entropy in nats of each target (n,) in fp32, 0 where it is ignored. Has no gradient.

    Args:
        head: Maps hidden states (m, c) to logits (m, v), and more columns if it is padded.
    """
    chunks = _logits_in_chunks(hidden_states, head, targets, vocab_size)
    return torch.cat([_losses(logits, target) for logits, target in chunks])


def score_targets(
    hidden_states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """As `cross_entropies`, and whether each target is the likeliest token."""
    chunks = _logits_in_chunks(hidden_states, head, targets, vocab_size)
    parts = [(_losses(logits, target), logits.argmax(-1) == target) for logits, target in chunks]
    losses, is_likeliest = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(is_likeliest)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


def _logits_in_chunks(
    hidden_states: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocab_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in fp32 and targets of as many rows at a time as `CHUNK_BYTES` allows."""
    ends = chunk_ends(hidden_states, 4 * vocab_size)
    for x, target in zip(hidden_states.tensor_split(ends), targets.tensor_split(ends), strict=True):
        logits = head(x)
        logits[:, vocab_size:] = -torch.inf
        yield logits.float(), target


def chunk_ends(hidden_states: Tensor, row_bytes: int, chunk_bytes: int | None = None) -> list[int]:
    """Indices at which `tensor_split` divides rows into chunks, which have the same size but for the alignment."""
    n, device = len(hidden_states), hidden_states.device.type
    limit, multiple = chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]), CHUNK_ROWS.get(device, 1)
    groups = -(-n // multiple)
    chunks = -(-groups // max(1, limit // (row_bytes * multiple)))
    return [groups * chunk // chunks * multiple for chunk in range(1, chunks)]


class _LinearCrossEntropy(torch.autograd.Function):
    """See `chunked_linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        linear: LinearFunction,
        chunk_bytes: int | None,
    ) -> Tensor:
        head = padded_head(weight)
        with torch.autocast(hidden_states.device.type, enabled=False):
            loss, grad_hidden, grad_head = _loss_and_gradients(
                hidden_states.to(head.dtype), head, targets, scale, linear, len(weight), chunk_bytes
            )
        ctx.save_for_backward(grad_hidden, grad_head[: len(weight)])
        ctx.dtype = hidden_states.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if not _is_one(grad_loss):
            grad_hidden, grad_weight = grad_hidden * grad_loss, grad_weight * grad_loss
        return grad_hidden.to(ctx.dtype), grad_weight, None, None, None, None


def _is_one(number: Tensor) -> bool:
    """Whether a number is known to be 1 without a device sync."""
    return number.device.type == "cpu" and not torch.compiler.is_compiling() and number.item() == 1


def _loss_and_gradients(
    hidden_states: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: Tensor,
    linear: LinearFunction,
    vocab_size: int,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to the hidden states (n, c) and the head (v, c), all in fp32.

    Rows of the head beyond the vocabulary are padding and get no gradient.
    """
    loss = torch.zeros((), device=head.device)
    grad_hidden = torch.empty(hidden_states.shape, device=head.device)
    grad_head: Tensor | None = None
    is_fp32 = head.dtype == torch.float32
    ends = chunk_ends(hidden_states, len(head) * head.element_size(), chunk_bytes)
    parts = (tensor.tensor_split(ends) for tensor in (hidden_states, targets, grad_hidden))
    for x, target, grad_x in zip(*parts, strict=True):
        row, target = torch.arange(len(x), device=x.device)[:, None], target[:, None]
        counts = (target != IGNORE_INDEX).float()
        target = torch.where(target == IGNORE_INDEX, 0, target)

        logits = linear(x, head, None)
        logits[:, vocab_size:] = -torch.inf
        target_logits = logits.gather(1, target).float()
        log_sums = softmax_(logits)
        loss += ((log_sums - target_logits) * counts).sum() * scale
        # Not `scatter_`, which on a CPU converts all of `logits` to fp32 and back.
        logits[row, target] = (torch.exp(target_logits - log_sums) - 1).to(logits.dtype)

        grad_logits = logits  # not yet multiplied by `scale`, nor by 0 in the rows that do not count
        grad_x.copy_(linear(grad_logits, head.t(), None) * (counts * scale))
        # In 16 bits the scale is applied after the product, because it would underflow in fp16. The sum over many rows
        # could overflow in fp16, so its terms are divided by a power of two.
        smaller = 2.0 ** -(len(x).bit_length() // 2) if head.dtype == torch.float16 else 1.0
        part = linear(grad_logits.t(), (x * (counts * (scale if is_fp32 else smaller)).to(x.dtype)).t(), None)
        if grad_head is None:
            grad_head = part if is_fp32 else part.float().mul_(scale / smaller)
        else:
            grad_head = grad_head.add_(part) if is_fp32 else grad_head.addcmul_(part, scale / smaller)
        del logits, grad_logits, part  # frees them before the next chunk
    assert grad_head is not None
    return loss, grad_hidden, grad_head


def softmax_(logits: Tensor) -> Tensor:
    """Turn logits (m, v) into probabilities in place. Returns their log-sum-exp (m, 1) in fp32.

    On a CPU a few rows at a time: with all at once, a step of a 16-million-weight model in bf16 takes 3 % longer.
    """
    by_rows = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, SOFTMAX_BYTES // (4 * logits.size(1))) if by_rows else len(logits)
    return torch.cat([_softmax_of_rows_(part) for part in logits.split(rows)])


def _softmax_of_rows_(logits: Tensor) -> Tensor:
    """The log-sum is derived from the largest probability, which never underflows: cheaper than a second pass."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    largest = logits.amax(-1, keepdim=True).float()
    log_sums = largest - probabilities.amax(-1, keepdim=True).log()
    logits.copy_(probabilities)
    return log_sums
