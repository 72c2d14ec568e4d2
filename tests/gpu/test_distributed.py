"""DDP and FSDP under NCCL: one rank in this process, two where there are two devices. On a CPU the backend is gloo."""

import pytest
import torch

from gpt2 import train
from gpt2.config import DistributedConfig, GPT2Config, TrainingConfig
from gpt2.data_loader import get_dataloaders
from gpt2.distributed import process_group
from gpt2.distributed.parallel import STRATEGIES
from gpt2.distributed.process_group import init_distributed
from gpt2.model import GPT2Model
from gpt2.runtime.dist_env import dist_env
from gpt2.train import Trainer
from tests.conftest import Workspace
from tests.distributed.test_torchrun import DRY, SAME, free_port, numbers, run_ranks
from tests.helpers import NO_DROPOUT
from tests.test_train import LENGTH, VOCABULARY, make_trainer, weights


@pytest.fixture
def rank(device, monkeypatch):
    """The only rank of a process group, as torchrun starts it."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    for cached in (dist_env, process_group._store):
        cached.cache_clear()
    with init_distributed(60.0, device.type) as group:
        yield group
    monkeypatch.undo()
    for cached in (dist_env, process_group._store):
        cached.cache_clear()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_strategy_trains_as_a_single_process(blocks, tmp_path, rank, device, strategy, precision, monkeypatch):
    """A single rank usually has no strategy. Here it has hooks, buckets and shards, but nothing to exchange."""
    expected = make_trainer(blocks, tmp_path, device=str(device), max_steps=6, precision=precision)
    expected.train()

    monkeypatch.setattr(train, "build_strategy", lambda name, *arguments: STRATEGIES[name](*arguments))
    options = {"batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2, "max_steps": 6, "precision": precision}
    config = TrainingConfig(**options, num_workers=0, device=device.type, compile=False)

    def new_trainer() -> Trainer:
        torch.manual_seed(config.seed)
        model = GPT2Model(GPT2Config(VOCABULARY, LENGTH, 16, 2, 1, 32, **NO_DROPOUT))
        train_loader, val_loader, _ = get_dataloaders(blocks, blocks, blocks, config)
        places = {"checkpoint_dir": str(tmp_path / strategy), "group": rank}
        return Trainer(model, train_loader, val_loader, config, **places, distributed=DistributedConfig(strategy))

    trainer = new_trainer()
    assert type(trainer.parallel) is STRATEGIES[strategy]
    trainer.train()
    tolerance = 1e-5 if precision == "fp32" else 0.05
    assert trainer.progress.val_loss == pytest.approx(expected.progress.val_loss, abs=tolerance)
    whole = trainer.parallel.full_tensors(trainer.model.state_dict())
    if precision == "fp32":
        for name, tensor in weights(expected).items():
            torch.testing.assert_close(whole[name].cpu(), tensor.cpu(), rtol=0, atol=1e-4)

    again = new_trainer()
    again.load_checkpoint(str(tmp_path / strategy / "last.pth"))
    assert again.progress.step == 6
    loaded = again.parallel.full_tensors(again.model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(workspace: Workspace, device, strategy):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    same = [*SAME, *DRY, f"train.device={device.type}"]
    workspace.run("train.py", *same, "hydra.run.dir=one")
    run_ranks(workspace, 2, *same, "hydra.run.dir=two", f"distributed.strategy={strategy}")
    one, two = (numbers(workspace.folder / name) for name in ("one", "two"))
    for key in ("train/loss", "val/loss"):
        losses, others = ([record[key] for record in records if key in record] for records in (one, two))
        assert others == pytest.approx(losses, abs=1e-4)
