"""Training steps of other programs: of `transformers`, and of any file that defines one.

A peer is `FILE.py:FUNCTION`, a function of three arguments that returns a step. `FUNCTION` may also be a dictionary of
such functions, whose keys are the names in the table:

    def function(config: GPT2Config, state: dict[str, Tensor], train: TrainingConfig) -> Step

`config` and `train` are ours; `train.device` (`cpu`, `cuda:0`) and `train.precision` (`fp32`, `bf16`, `fp16`) are
resolved. `state` holds the weights in fp32 on the CPU, named as in `GPT2Model.state_dict()`.

`step(micro_batches)` updates the weights once and returns the mean loss. `micro_batches` is a list of
`train.accumulation_steps` pairs (input_ids, targets), both of shape (b, t) and on the device; target t is the token
after input t, and none is ignored.

The peer is responsible for compilation, autocast and clipping. It must restore settings of the process, such as TF32,
at the end of a step. A peer that does not support a precision raises NotImplementedError and is left out.
`experiments/performance/nanogpt.py` is an example.
"""

import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.checkpoint.hugging_face import write_folder
from gpt2.config import GPT2Config, TrainingConfig
from gpt2.errors import UserError
from gpt2.runtime.device import Precision

State = dict[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]  # (input_ids, targets) of each micro-batch
Step = Callable[[Pairs], Tensor]
Peer = Callable[[GPT2Config, State, TrainingConfig], Step]


def in_transformers(config: GPT2Config, state: State, attention: str = "sdpa") -> Any:
    """Return a `GPT2LMHeadModel` with these weights; `attention` is its `attn_implementation`."""
    import transformers  # here, because experiments/performance/memory.py measures each contestant without it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), config, state, None, card="")
        return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention)


def plain_adamw(model: nn.Module, train: TrainingConfig, **options: Any) -> torch.optim.AdamW:
    """Return PyTorch's AdamW with weight decay for matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (train.beta1, train.beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, **options)


def transformers_step(config: GPT2Config, state: State, train: TrainingConfig, compiled: bool = False) -> Step:
    """GPT2LMHeadModel in a plain loop, as its documentation advises: autocast, fused AdamW, clipping by norm.

    The loss is computed here from the logits and the targets of all contestants: with `labels`, the last position of
    each block would have no target.
    """
    device = torch.device(train.device)
    model = in_transformers(config, state).to(device).train()
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = plain_adamw(model, train, fused=device.type in ("cuda", "cpu"))
    precision = Precision(train.precision, device)
    scaler = precision.scaler()
    forward = torch.compile(model) if compiled else model

    def step(micro_batches: Pairs) -> Tensor:
        total = torch.zeros((), device=device)
        for input_ids, targets in micro_batches:
            with precision.autocast():
                logits = forward(input_ids=input_ids, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / len(micro_batches)
            scaler.scale(loss).backward()
            total += loss.detach()
        if train.gradient_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def load_peers(peer: str) -> dict[str, Peer]:
    """Return the functions that `FILE.py:FUNCTION` refers to, by their names in the table."""
    file, _, name = peer.rpartition(":")
    defined = runpy.run_path(file)
    if name not in defined:
        raise UserError(f"peer: {file} has no function {name}")
    found = defined[name]
    return found if isinstance(found, dict) else {Path(file).stem: found}
