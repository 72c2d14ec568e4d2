"""Memory of a CUDA device: training takes as much as the formulas give, and the error of a full device has advice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.config import GPT2Config, TrainingConfig
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.model import GPT2Model
from gpt2.ops import attention
from gpt2.train import Trainer
from gpt2.training.cost import Work, memory_needed, memory_of
from gpt2.training.optimizer import optimizer_tensors
from tests import fault_injection
from tests.conftest import TINY, Workspace
from tests.helpers import NO_DROPOUT, PeakMemory


def blocks_of(folder: Path, config: GPT2Config, count: int) -> TokenDataset:
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=count * config.context_length + 1)
    tokens.astype(np.uint16).tofile(folder / "tokens.bin")
    return TokenDataset(folder / "tokens.bin", "uint16", config.context_length)


def peak_memory(trainer: Trainer, act: Callable[[], object]) -> int:
    """The peak memory of tensors while a function runs, in bytes."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
        act()
        return torch.cuda.max_memory_allocated(trainer.device)
    state = optimizer_tensors(trainer.optimizer, trainer.model)
    with PeakMemory([*trainer.model.parameters(), *state.values()]) as memory:
        act()
    return memory.peak


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"optimizer": "muon"}], ids=str)
def test_peak_is_that_of_the_formulas(tmp_path, device, options, precision, monkeypatch):
    """A step of two passes: in the second, gradients and activations exist at the same time, as the formulas assume."""
    is_gpu = device.type == "cuda"
    monkeypatch.setattr(attention, "MAX_WEIGHT_BYTES", 0)  # a CPU uses the fused kernel too
    config = GPT2Config() if is_gpu else GPT2Config(8192, 256, 256, 4, 4, 1024, **NO_DROPOUT)  # its masks are larger
    fields = {"batch_size": 8, "accumulation_steps": 2, "device": str(device), "precision": precision, **options}
    train = TrainingConfig(**fields, num_workers=0, compile=False)
    blocks = blocks_of(tmp_path, config, 16)
    train_loader, val_loader, _ = get_dataloaders(blocks, blocks, blocks, train)
    trainer = Trainer(GPT2Model(config), train_loader, val_loader, train, str(tmp_path))
    trainer.model.train()
    batches = [blocks.__getitems__(list(range(first, first + 8))) for first in (0, 8)]
    trainer.train_step(batches)  # allocates the optimizer's state
    measured = peak_memory(trainer, lambda: trainer.train_step(batches))
    needed = memory_needed(Work(trainer.model, train, config.context_length), trainer.plan)
    assert sum(needed.values()) == pytest.approx(measured, rel=0.1), needed


def test_full_device_is_one_line_with_advice(workspace: Workspace, device):
    """The memory of a GPU is limited; on a CPU the error is injected."""
    workspace.environment[fault_injection.VARIABLE] = "out_of_memory@1" if device.type == "cpu" else ""
    if device.type == "cuda":
        fraction = 0.5e9 / memory_of(device)
        workspace.environment["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{fraction:.6f}"
    large = ["model.d_model=256", "model.d_ff=1024", "model.num_layers=8", "train.batch_size=512"]
    done = workspace.run_anew("train.py", *TINY, *large, f"train.device={device}", expect=1)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: out of memory: CUDA out of memory. Tried to allocate ")
    assert "train.batch_size=256 train.accumulation_steps=2 makes the same steps in less memory" in line
