"""Injected faults act only at their steps and otherwise change nothing."""

from pathlib import Path

import pytest
import torch

import tests.test_train as training
from gpt2.tracking.tracker import Tracker, read_metrics
from tests.fault_injection import KINDS, VARIABLE
from tests.test_train import make_trainer

blocks = training.blocks  # the fixture


def hooks(trainer) -> int:
    """The number of hooks on a model, its modules and its parameters."""
    of_modules = [
        getattr(module, kind)
        for module in trainer.model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    of_parameters = [parameter._backward_hooks or {} for parameter in trainer.model.parameters()]
    return sum(map(len, of_modules + of_parameters))


@pytest.mark.parametrize("value", [None, ""])
def test_no_hooks_without_fault(blocks, tmp_path, monkeypatch, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    trainer = make_trainer(blocks, tmp_path)
    assert hooks(trainer) == 0
    monkeypatch.setenv(VARIABLE, "nan_loss@1,nan_gradient@1")
    assert hooks(make_trainer(blocks, tmp_path)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_inactive_fault_changes_nothing(blocks, tmp_path, monkeypatch, kind):
    trainers = []
    for value in ("", f"{kind}@3"):
        monkeypatch.setenv(VARIABLE, value)
        trainers.append(make_trainer(blocks, tmp_path, 0.1, max_steps=2))
        trainers[-1].train()
        trainers[-1].progress.step = 2  # the fault would be due in training, not in validation
        trainers[-1].validate()
    plain, other = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    "value",
    [
        *(
            "nan_loss",
            "nan_loss@",
            "nan_loss@x",
            "nan_loss@-1",
            "nan_loss@1-",
            "nan_loss@1-2-3",
            "@3",
            "3",
            "nan_loss 3",
        ),
        *("typo@3", "NAN_LOSS@3", "nan_loss@3;inf_loss@4", " nan_loss@3", "nan_loss@1.5", "nan_loss@3,typo@4"),
    ],
)
def test_invalid_value_is_refused(blocks, tmp_path, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=rf"^{VARIABLE}=.*not KIND@STEP or KIND@FIRST-LAST.*{', '.join(KINDS)}"):
        make_trainer(blocks, tmp_path)


@pytest.mark.parametrize("value", ["nan_loss@5-3", "nan_loss@0"])
def test_impossible_steps_are_refused(blocks, tmp_path, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=VARIABLE):
        make_trainer(blocks, tmp_path)


def steps_without(folder: Path, key: str) -> set[int]:
    return {r["step"] for r in read_metrics(folder / "metrics.jsonl") if key in r and r[key] is None}


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        ("nan_loss@1", {1}, {1}),
        ("inf_loss@3-5", {3, 4, 5}, {3, 4, 5}),
        ("inf_gradient@2", set(), {2}),
        ("nan_gradient@4-4,", set(), {4}),
        ("nan_loss@2,inf_gradient@5-6,inf_loss@7-7", {2, 7}, {2, 5, 6, 7}),
        ("nan_loss@7-99", {7, 8}, {7, 8}),
        ("nan_loss@99", set(), set()),
    ],
)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_fault_affects_only_its_steps(blocks, tmp_path, monkeypatch, value, loss, gradient, accumulation_steps):
    monkeypatch.setenv(VARIABLE, value)
    options = {"max_steps": 8, "eval_every": 1, "log_every": 1, "accumulation_steps": accumulation_steps}
    make_trainer(blocks, tmp_path, tracker=Tracker(tmp_path), on_nonfinite="skip", **options).train()
    assert steps_without(tmp_path, "train/loss") == loss
    assert steps_without(tmp_path, "train/grad_norm") == gradient
    assert steps_without(tmp_path, "val/loss") == set()


def test_weight_fault(blocks, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_weight@2")
    trainer = make_trainer(blocks, tmp_path, on_nonfinite="skip")
    for _ in range(2):
        assert trainer.model.final_norm.bias.isfinite().all()
        trainer.model.train()
        trainer.train_step([blocks.__getitems__([0, 1])])
    assert trainer.model.final_norm.bias.isnan().tolist() == [True] + [False] * 15
