import sys

import pytest
import torch

from gpt2.config import OPTIMIZERS, GPT2Config, TrainingConfig
from gpt2.model import GPT2Model, meta_model
from gpt2.training.optimizer import build_optimizer, stepping

CONFIG = GPT2Config(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=16)


def loss_of(model, token=0):
    return model(torch.full((1, 4), token), targets=torch.ones(1, 4, dtype=torch.long))[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_starts_without_dynamo(optimizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # makes its import raise an error
    model = GPT2Model(CONFIG)
    assert meta_model(CONFIG).num_parameters() == model.num_parameters()
    built = build_optimizer(model, TrainingConfig(optimizer=optimizer))
    with stepping(built):
        loss_of(model).backward()
        built.step()
    built.zero_grad()
    built.load_state_dict(built.state_dict())


def test_adamw_is_that_of_pytorch():
    ends = []
    for kind in (None, torch.optim.AdamW):
        torch.manual_seed(0)
        model = GPT2Model(CONFIG)
        optimizer = build_optimizer(model, TrainingConfig())
        if kind:  # the same groups, with all options
            optimizer = kind(optimizer.param_groups)
        for token in range(3):
            loss_of(model, token).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
