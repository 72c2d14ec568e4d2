"""Other programs' training steps: that of `transformers`, and of any file that says how.

A peer is `FILE.py:FUNCTION`, a function of three arguments:

    def function(config: GPT2Config, state: dict[str, Tensor], train: TrainingConfig) -> Step | tuple[Step, Parameters]

`config` and `train` are ours; `train.device` and `train.precision` name what is meant (`cpu`, `cuda:0`; `fp32`, `bf16`,
`fp16`). `state` holds the weights in fp32 on the CPU, as `GPT2Model.state_dict()` names them.

What it returns, `step(micro_batches)`, makes one whole update of the weights, with everything that belongs to it in
that program, and returns the mean loss. `micro_batches` are `train.accumulation_steps` pairs (input_ids, targets),
(b, t) each, on the device; target t is the token after input t, and none is to be ignored. With `parameters`, its
parameters by our names and in our layout, the gradient of its first step is compared with ours as well.

It compiles, casts and clips as it likes: whatever it is to be measured with is its own. A precision that it does not
have is refused by NotImplementedError. See `experiments/performance/nanogpt.py`.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.checkpoint.hugging_face import hf_name, write_folder
from gpt2.config import GPT2Config, TrainingConfig
from gpt2.errors import UserError
from gpt2.runtime.device import Precision

State = dict[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]  # (input_ids, targets) of each micro-batch
Step = Callable[[Pairs], Tensor]
Parameters = dict[str, nn.Parameter]  # by our names
Peer = Callable[[GPT2Config, State, TrainingConfig], "Step | tuple[Step, Parameters]"]


def transformers_step(
    config: GPT2Config, state: State, train: TrainingConfig, compiled: bool = False
) -> tuple[Step, Parameters]:
    """GPT2LMHeadModel in a plain loop as it is advised: autocast, fused AdamW, one clipped norm.

    Its own `labels` would leave the last position of each block without a target: the loss is taken from its logits
    over the targets that all contestants have.
    """
    from transformers import GPT2LMHeadModel  # here, for in nobody else's memory is it to be counted

    device = torch.device(train.device)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), config, state, None, card="")
        loaded: Any = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa")
    model = loaded.to(device).train()
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    is_fused = device.type in ("cuda", "cpu")
    betas = (train.beta1, train.beta2)
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=is_fused)
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

    theirs = dict(model.transformer.named_parameters())
    return step, {name: theirs[hf_name(name)] for name in state}


def peer_of_file(peer: str) -> Peer:
    """The function that `FILE.py:FUNCTION` names.

    Raises:
        UserError: The file cannot be run, or has no such function.
    """
    file, _, name = peer.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"peer: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    with told(peer):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"peer: {file} has no function {name}")
    return function


@contextmanager
def told(peer: str) -> Iterator[None]:
    """Tell in a line what a peer raises, and keep what it prints out of the table.

    Raises:
        NotImplementedError: The peer cannot do what is asked for.
        UserError: It raised anything else.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (NotImplementedError, UserError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"peer: {peer} raised {type(error).__name__}{f': {reason}' if reason else ''}") from error
