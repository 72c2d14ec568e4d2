"""Training steps of other programs: that of `transformers`, and of any file that defines one.

A peer is `FILE.py:FUNCTION`, a function of three arguments that returns a step, or the name of a dictionary of such
functions, by the names of their lines in the table:

    def function(config: GPT2Config, state: dict[str, Tensor], train: TrainingConfig) -> Step

`config` and `train` are ours; `train.device` (`cpu`, `cuda:0`) and `train.precision` (`fp32`, `bf16`, `fp16`) are
resolved. `state` holds the weights in fp32 on the CPU, named as in `GPT2Model.state_dict()`.

`step(micro_batches)` makes one whole update of the weights, with everything that this takes in that program, and
returns the mean loss. `micro_batches` are `train.accumulation_steps` pairs (input_ids, targets), (b, t) each, on the
device; target t is the token after input t, and none is ignored.

Compilation, precision and clipping are the peer's own. Settings of the whole process, such as TF32, must be restored
at the end of a step. If a peer does not support a precision, it raises NotImplementedError and is left out. For an
example see `experiments/performance/nanogpt.py`.
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
    """`GPT2LMHeadModel` with these weights; `attention` is its implementation."""
    import transformers  # here, so that it does not count as memory of other contestants

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), config, state, None, card="")
        return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention)


def transformers_step(config: GPT2Config, state: State, train: TrainingConfig, compiled: bool = False) -> Step:
    """GPT2LMHeadModel in a plain loop as its documentation advises: autocast, fused AdamW, one clipped norm.

    The loss is computed from its logits over the targets that all contestants have: with `labels`, the last position
    of each block would have no target.
    """
    device = torch.device(train.device)
    model = in_transformers(config, state).to(device).train()
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        fused=device.type in ("cuda", "cpu"),
    )
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
            nn.utils.clip_grad_norm_(weights, train.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def load_peers(peer: str) -> dict[str, Peer]:
    """The functions that `FILE.py:FUNCTION` names, by the names of their lines."""
    file, _, name = peer.rpartition(":")
    defined = runpy.run_path(file)
    if name not in defined:
        raise UserError(f"peer: {file} has no function {name}")
    found = defined[name]
    return found if isinstance(found, dict) else {Path(file).stem: found}
