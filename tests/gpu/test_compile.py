"""Compiled training on a CUDA device: one compilation, without breaks, with the losses of uncompiled training.

On a CPU the compiler's backend is `aot_eager`, which needs no C++ compiler.
"""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from tests.test_train import InterruptAt, assert_same_state, make_trainer

SPLIT, RECOMPUTED = {"batch_size": 2, "accumulation_steps": 2}, {"gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def compiler(device, monkeypatch):
    if device.type == "cpu":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options))
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("precision", "options"),
    [("bf16", {}), ("bf16", SPLIT), ("bf16", RECOMPUTED), ("fp32", SPLIT | RECOMPUTED), ("fp16", SPLIT | RECOMPUTED)],
    ids=str,
)
def test_second_epoch_compiles_nothing(blocks, tmp_path, device, options, precision, caplog):
    """Each epoch has a smaller last batch or a step of fewer passes, and ends with an evaluation."""
    caplog.set_level(logging.WARNING)
    losses = []
    for is_compiled in (False, True):
        each = {"device": str(device), "precision": precision, "max_epochs": 2, "compile": is_compiled, **options}
        trainer = make_trainer(blocks, tmp_path / str(is_compiled), **{"batch_size": 3, **each})
        first = trainer.train_epoch() + trainer.validate()
        with torch.compiler.set_stance("fail_on_recompile"):
            losses.append((first, trainer.train_epoch() + trainer.validate()))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4 if precision == "fp32" else 5e-2)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert "Not compiled" not in caplog.text


def test_compiled_run_resumes_bit_for_bit(blocks, tmp_path, device):
    options = {"device": str(device), "compile": True, "max_steps": 6, "log_every": 1, "deterministic": True}
    make_trainer(blocks, tmp_path / "whole", 0.1, **options).train()
    make_trainer(blocks, tmp_path / "parts", 0.1, callbacks=[InterruptAt(3)], **options).train()
    rest = make_trainer(blocks, tmp_path / "parts", 0.1, **options)
    rest.load_checkpoint(str(tmp_path / "parts" / "last.pth"))
    assert rest.progress.step == 3
    rest.train()
    assert_same_state(tmp_path / "whole" / "last.pth", tmp_path / "parts" / "last.pth")
