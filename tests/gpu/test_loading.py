"""Batches for a CUDA device are loaded into pinned memory faster than it can train on them."""

import time
from contextlib import nullcontext

import pytest
import torch

from gpt2.config import GPT2Config, TrainingConfig
from gpt2.data_loader import get_dataloaders
from gpt2.model import GPT2Model
from gpt2.train import Trainer
from tests.gpu.conftest import no_wait
from tests.gpu.test_memory import blocks_of


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_is_never_the_bottleneck(tmp_path, device, num_workers):
    """Loading a batch takes less than a quarter of the time of its step, and no step makes the host wait."""
    is_gpu = device.type == "cuda"
    config = GPT2Config() if is_gpu else GPT2Config(8192, 256, 256, 4, 2, 1024)
    options = {"batch_size": 8, "num_workers": num_workers, "precision": "bf16", "compile": False}
    train = TrainingConfig(**options, device=str(device))
    blocks = blocks_of(tmp_path, config, 8 * 24)
    train_loader, val_loader, _ = get_dataloaders(blocks, blocks, blocks, train)
    trainer = Trainer(GPT2Model(config), train_loader, val_loader, train, str(tmp_path))
    trainer.model.train()

    batches = iter(train_loader)
    first = next(batches)
    assert all(tensor.is_pinned() == is_gpu for tensor in first.values())
    loading = training = 0.0
    for number in range(20 if is_gpu else 4):
        began = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        with no_wait(device) if number else nullcontext():  # the first step allocates memory
            trainer.train_step([batch])
        if is_gpu:
            torch.cuda.synchronize(device)
        if number:
            loading += loaded - began
            training += time.perf_counter() - loaded
    assert loading < training / 4
