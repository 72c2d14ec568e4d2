"""Unmodified nanoGPT as a peer of `python -m gpt2.main benchmark training`: its model, its optimizer, its loop.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    NANOGPT=../nanoGPT python -m gpt2.main benchmark training peer=experiments/performance/nanogpt.py:nanogpt

The step does what nanoGPT's `train.py` does. On a CPU it computes in fp32 without autocast and is not compiled, as
nanoGPT's README advises. On CUDA it uses autocast and TF32 and is compiled, as by default. `bias=True`, because the
weights are GPT-2's.

`peer=...:ways` also has the fastest nanoGPT on a CPU, not compiled and compiled. It uses autocast and the fused AdamW,
which nanoGPT's `train.py` uses only on CUDA.
"""

import importlib.util
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from gpt2.checkpoint.hugging_face import hf_name


def nanogpt(config, state, train):
    """The step of nanoGPT's `train.py`."""
    kind = torch.device(train.device).type
    if kind == "cpu" and train.precision != "fp32":
        raise NotImplementedError("on a CPU, nanoGPT's train.py computes in fp32 only")
    return tuned(config, state, train, compiled=kind == "cuda", fused=kind == "cuda")


def tuned(config, state, train, compiled, fused=True):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(os.environ["NANOGPT"]) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    kind = torch.device(train.device).type
    fields = {"block_size": config.context_length, "n_layer": config.num_layers, "n_head": config.num_heads}
    fields |= {"vocab_size": config.vocab_size, "n_embd": config.d_model, "dropout": config.dropout, "bias": True}
    model = theirs.GPT(theirs.GPTConfig(**fields))
    weights = {f"transformer.{hf_name(name)}": tensor for name, tensor in state.items()}
    model.load_state_dict(weights, strict=False)  # lm_head is wte
    model.to(train.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[train.precision]
    autocast = nullcontext() if train.precision == "fp32" and kind == "cpu" else torch.amp.autocast(kind, dtype=dtype)
    scaler = torch.amp.GradScaler(kind, enabled=train.precision == "fp16")
    betas = (train.beta1, train.beta2)
    # nanoGPT uses the fused AdamW if the device type is "cuda", and ignores it otherwise.
    optimizer = model.configure_optimizers(train.weight_decay, train.learning_rate, betas, "cuda" if fused else "cpu")
    forward = torch.compile(model) if compiled else model

    def step(micro_batches):
        torch.backends.cuda.matmul.allow_tf32 = True
        total = 0.0
        for input_ids, targets in micro_batches:
            with autocast:
                _, loss = forward(input_ids, targets)
                loss = loss / len(micro_batches)
            scaler.scale(loss).backward()
            total = total + loss.detach()
        if train.gradient_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch.backends.cuda.matmul.allow_tf32 = False
        return total

    return step


ways = {
    "nanoGPT": nanogpt,
    "nanoGPT, fused": partial(tuned, compiled=False),
    "nanoGPT, fused, compiled": partial(tuned, compiled=True),
}
