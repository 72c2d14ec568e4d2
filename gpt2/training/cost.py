"""What a training costs on this machine: FLOPs and memory by formulas, time by some passes on random tokens."""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from math import ceil

import torch

from gpt2.config import GPT2Config, TrainingConfig
from gpt2.model import GPT2Model, meta_model
from gpt2.ops.cross_entropy import CHUNK_BYTES
from gpt2.ops.linear import LINEARS
from gpt2.runtime.device import container_limit, fastest_seconds
from gpt2.runtime.dist_env import division
from gpt2.training.compile import ComputePlan
from gpt2.training.nonfinite import clip_gradients, gradient_norms
from gpt2.training.optimizer import build_optimizer, stepping, use_precision

MIN_TOKENS = 256  # in a timed pass: with fewer, reading the weights takes longer than multiplying by them
ENOUGH_SECONDS = 1.0  # parts grow until a pass and an update take this long


@dataclass(frozen=True)
class Work:
    """A training as the ranks divide it: in a step, each makes `passes` passes of `rows` blocks of `length` tokens."""

    model: GPT2Model  # its device does not matter
    train: TrainingConfig
    length: int
    ranks: int = 1
    is_sharded: bool = False  # by FSDP

    @property
    def rows(self) -> int:
        return self.train.batch_size // division(self.train.accumulation_steps, self.ranks)[1]

    @property
    def passes(self) -> int:
        return self.train.accumulation_steps // division(self.train.accumulation_steps, self.ranks)[0]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, of all ranks together."""
        return self.train.batch_size * self.train.accumulation_steps * self.length

    @property
    def flops_per_step(self) -> float:
        """FLOPs of a step, of all ranks together."""
        return self.tokens_per_step * self.model.flops_per_token(self.length)


def memory_of(device: torch.device) -> int:
    """The bytes of memory that a device has, or that this container may use of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_limit("memory.max")
    return min(installed, int(limit)) if limit.isdecimal() else installed


def optimizer_bytes(model: GPT2Model, train: TrainingConfig) -> int:
    """The averages of an optimizer, also in a checkpoint: two; Muon has one of matrices, Adafactor hardly any."""
    matrices = sum(model.get_parameter(name).numel() for name in model.matrices())
    averages = 2 * model.num_parameters()
    return 4 * {"muon": averages - matrices, "adafactor": 0}.get(train.optimizer, averages)


def memory_needed(work: Work, plan: ComputePlan) -> dict[str, float]:
    """The bytes that a rank needs, by what they hold. docs/scale.md derives and checks the formulas."""
    model, train, tokens = work.model, work.train, work.rows * work.length
    weights, head = model.num_parameters(), model.token_embedding.weight.numel()
    state: float = 8 * weights + optimizer_bytes(model, train)  # weight, gradient and averages
    state += 4 * weights if train.optimizer == "schedule_free" else 0  # a copy of the weights during the step
    is_fp32, itemsize = plan.precision.name == "fp32", plan.precision.dtype.itemsize
    all_logits = tokens * model.config.vocab_size * itemsize
    limit = plan.chunk_bytes or CHUNK_BYTES.get(plan.device.type, CHUNK_BYTES["cpu"])
    chunk = all_logits / ceil(all_logits / limit)
    # A chunk and its softmax in fp32, and in 16 bits a copy of the chunk in fp32; the gradient of the head, and in fp32
    # the padded head; the final norm.
    logits = (2 if is_fp32 else 5) * chunk + (8 if is_fp32 else 4) * head
    logits += (12 if is_fp32 else 14) * tokens * model.config.d_model
    if work.is_sharded:  # the largest layer is gathered, and before the last pass there are whole gradients
        state = state / work.ranks + itemsize * head + (4 * weights if work.passes > 1 else 0)
    elif not is_fp32:
        state += 2 * weights  # autocast keeps a copy
    return {
        "weights, gradients and optimizer": state,
        "activations": _activations(model.config, tokens, is_fp32, logits if train.gradient_checkpointing else None),
        "logits": logits,
    }


def largest_batch_size(
    model: GPT2Model, train: TrainingConfig, length: int, plan: ComputePlan, available: float
) -> int:
    """The most blocks in a pass that fit into the available bytes, by formula; 0 if one does not fit."""

    def needed(rows: int) -> float:
        work = Work(model, replace(train, batch_size=rows, accumulation_steps=1), length)
        return sum(memory_needed(work, plan).values())

    return bisect_right(range(1, 2**40), available, key=needed)


def _activations(config: GPT2Config, tokens: int, is_fp32: bool, freed: float | None) -> float:
    """What the backward pass needs of the forward pass of a number of tokens.

    Args:
        freed: With gradient checkpointing, the memory that is free when a layer is recomputed; without it None.
    """
    width, d_ff = config.d_model, config.d_ff
    masks = 2 * width if config.dropout or config.residual_dropout else 0
    layer = tokens * ((33 * width + 8 * d_ff if is_fp32 else 21 * width + 4 * d_ff) + masks)
    if freed is None:
        return config.num_layers * layer
    gradients = 2 * (4 if is_fp32 else 2) * tokens * d_ff  # before and after GELU
    return config.num_layers * tokens * 4 * width + max(0, layer + gradients - freed)


@dataclass(frozen=True)
class Timing:
    """The seconds of a step, extrapolated from a part of the model and of a pass."""

    step: float
    layers: int
    rows: int
    tokens: int  # of each row


def time_step(work: Work, plan: ComputePlan) -> Timing | None:
    """Time passes of growing parts of a model, up to a whole pass or one that takes `ENOUGH_SECONDS`, and extrapolate.

    Parts that are expected to take less than that are skipped, except the first and the last. Not timed: the exchange
    between ranks, `torch.compile`, data, evaluations and checkpoints.

    Returns:
        None if the smallest part does not fit into memory.
    """
    available, timing = memory_of(plan.device) / 2, None  # the rest is for others
    parts = deque(takewhile(lambda part: sum(memory_needed(part, plan).values()) <= available, _parts(work)))
    while parts:
        part = parts.popleft()
        # A whole pass that is fast is repeated: on a busy machine the shortest of many is right.
        a_pass, update = _time_part(part, plan, min_seconds=0.0 if parts else ENOUGH_SECONDS / 2)
        seconds = partial(_extrapolated, part, a_pass, update)
        timing = Timing(seconds(work), part.model.config.num_layers, part.rows, part.length)
        if a_pass + update > ENOUGH_SECONDS:
            break
        while len(parts) > 1 and seconds(parts[0]) < ENOUGH_SECONDS:
            parts.popleft()
    return timing


def _extrapolated(part: Work, a_pass: float, update: float, whole: Work) -> float:
    """Seconds of a step, given those of a part. A pass grows with its FLOPs, an update with the weights."""
    passes = a_pass * whole.flops_per_step / whole.ranks / part.flops_per_step
    return passes + update * whole.model.num_parameters() / part.model.num_parameters()


def _parts(work: Work) -> Iterator[Work]:
    """Growing parts of a pass: the whole depth first, because the head is faster than the layers."""
    config, first = work.model.config, min(work.length, MIN_TOKENS)
    sizes = [(layers, 1, first) for layers in _doubled(1, config.num_layers)]
    sizes += [(config.num_layers, 1, tokens) for tokens in _doubled(first, work.length)[1:]]
    sizes += [(config.num_layers, rows, work.length) for rows in _doubled(1, work.rows)[1:]]
    for layers, rows, tokens in sizes:
        train = replace(work.train, batch_size=rows, accumulation_steps=1)
        yield Work(meta_model(replace(config, num_layers=layers)), train, tokens)


def _doubled(first: int, last: int) -> list[int]:
    return [first, *_doubled(min(2 * first, last), last)] if first < last else [last]


def _time_part(part: Work, plan: ComputePlan, min_seconds: float) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and of an update."""
    with plan.device:
        model = GPT2Model(part.model.config).train()
        ids = torch.randint(model.config.vocab_size, (part.rows, part.length + 1))
    model.use_linear(LINEARS[plan.linear])
    model.gradient_checkpointing = part.train.gradient_checkpointing
    optimizer = build_optimizer(model, part.train)
    use_precision(optimizer, plan.precision)

    def forward_backward() -> None:
        with plan.precision.autocast():
            _, loss = model(ids[:, :-1], targets=ids[:, 1:], return_logits=False)
        loss.backward()
        loss.item()  # waits for the device

    def update() -> None:
        norm = torch.linalg.vector_norm(gradient_norms(model))
        clip_gradients(model, norm, part.train.gradient_clip)
        with stepping(optimizer):
            optimizer.step()
        model.final_norm.weight[0].item()

    a_pass, an_update = fastest_seconds([forward_backward, update], repetitions=2, min_seconds=min_seconds)
    return a_pass, an_update
