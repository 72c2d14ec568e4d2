"""Schedule-free AdamW is that of its package, and between steps the weights are the averages."""

import pytest
import schedulefree
import torch

import tests.test_train as training
from gpt2 import validation
from gpt2.checkpoint import format as checkpoint
from gpt2.config import TrainingConfig
from gpt2.training.callbacks import Callback
from gpt2.training.optimizer import build_optimizer, learning_rate, stepping
from gpt2.validation import validate
from tests.test_train import make_trainer, weights
from tests.training.test_optimizer import tiny_model, update

CONFIG = TrainingConfig(
    optimizer="schedule_free", learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95, warmup_steps=3
)
blocks = training.blocks  # the fixture


def test_updates_are_those_of_the_package():
    """It has its own warm-up, and is switched only at the end. Gradients of keys' biases would be noise."""
    model, other = tiny_model(use_bias=False), tiny_model(use_bias=False)
    ours = build_optimizer(model, CONFIG)
    groups = [{**group, "params": []} for group in ours.param_groups]
    for parameter in other.parameters():
        groups[parameter.dim() < 2]["params"].append(parameter)
    theirs = schedulefree.AdamWScheduleFree(groups, warmup_steps=3)
    for group in theirs.param_groups:
        group["warmup_steps"] = 3
    theirs.train()
    for step in range(6):
        for group in ours.param_groups:
            group["lr"] = learning_rate(step, 6, CONFIG)
        update(model, ours, step)
        batch = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(step))
        other(batch, labels=batch)[1].backward()
        theirs.step()
        theirs.zero_grad()
    theirs.eval()
    for ours_, theirs_ in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-6)


def test_no_bit_changes_without_a_step():
    model = tiny_model()
    optimizer = build_optimizer(model, CONFIG)
    update(model, optimizer, 0)
    update(model, optimizer, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), stepping(optimizer):
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Watch(Callback):
    """Records the weights that are evaluated."""

    def on_validation_batch(self, trainer, batch, batches):
        self.evaluated = weights(trainer)


def test_averages_are_evaluated_and_saved(blocks, tmp_path):
    watch = Watch()
    trainer = make_trainer(blocks, tmp_path, callbacks=[watch], max_steps=4, optimizer="schedule_free", warmup_steps=0)
    mean = weights(trainer)
    for step in range(4):
        trainer.train_step([blocks.__getitems__([step])])
        for name, parameter in trainer.model.named_parameters():  # at a constant rate, the mean over steps
            mean[name] += (trainer.optimizer.state[parameter]["z"] - mean[name]) / (step + 1)
    trainer.train()
    tensors = checkpoint.read_tensors(tmp_path / "best_model.pth")
    for name, tensor in mean.items():
        torch.testing.assert_close(watch.evaluated[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(tensors[f"model/{name}"], watch.evaluated[name])


def test_missing_package_and_unsupported_settings(monkeypatch):
    assert validate(CONFIG, "train.") == []
    monkeypatch.setattr(validation, "find_spec", lambda name: None if name == "schedulefree" else name)
    problems = validate(TrainingConfig(optimizer="schedule_free", beta1=0), "train.")
    assert [problem.split(":")[0] for problem in problems] == ["train.optimizer", "train.beta1"]
    assert "pip install -e '.[schedule-free]'; adamw, muon, adafactor need nothing more" in problems[0]
