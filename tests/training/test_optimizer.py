"""Weight decay, learning rate schedules, and the state of optimizers."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch

from gpt2.config import OPTIMIZERS, TrainingConfig
from gpt2.model import GPT2Model
from gpt2.training.muon import Muon
from gpt2.training.optimizer import (
    BUILDERS,
    build_optimizer,
    effective_rate,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    stepping,
)
from tests.helpers import tiny_config


def tiny_model(**fields) -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(tiny_config(**fields))


def update(model: GPT2Model, optimizer: torch.optim.Optimizer, seed: int) -> None:
    batch = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    with stepping(optimizer):
        model(batch, labels=batch)[1].backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_only_matrices_decay(use_bias, kind):
    model = tiny_model(use_bias=use_bias)
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3, optimizer=kind))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_vector = name.endswith(".bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.3), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_parameter_is_in_one_group(kind):
    model = tiny_model()
    optimizer = build_optimizer(model, TrainingConfig(optimizer=kind))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_excluded():
    model = tiny_model()
    model.token_embedding.weight.requires_grad_(False)
    grouped = {id(p) for group in build_optimizer(model, TrainingConfig()).param_groups for p in group["params"]}
    assert grouped == {id(p) for name, p in model.named_parameters() if name != "token_embedding.weight"}


def test_settings_reach_adamw():
    config = TrainingConfig(learning_rate=1e-2, beta1=0.7, beta2=0.8, epsilon=1e-3)
    for group in build_optimizer(tiny_model(), config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.7, 0.8), 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def test_muon_updates_block_matrices_and_adamw_the_rest():
    model = tiny_model()
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon", learning_rate=1e-2, muon_momentum=0.9))
    update(model, optimizer, 0)
    for name, parameter in model.named_parameters():
        memory = set(optimizer.state[parameter])
        if name.startswith("blocks.") and parameter.dim() == 2:
            assert memory == {"momentum_buffer"}, name
        else:
            assert memory == {"step", "exp_avg", "exp_avg_sq"}, name
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_parts_update_as_separate_optimizers():
    """Compare with separate optimizers that get the same gradients."""
    config = TrainingConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
    model = tiny_model()
    parts = [copy.deepcopy(model) for _ in range(2)]
    update(model, build_optimizer(model, config), 0)
    update(parts[0], build_optimizer(parts[0], replace(config, optimizer="adamw")), 0)
    groups = []
    for name, count in model.matrices().items():
        matrix = parts[1].get_parameter(name)
        groups.append({"params": [matrix], "shape": sorted((matrix.size(0) // count, matrix.size(1)))})
    update(parts[1], Muon(groups, lr=1e-2, weight_decay=0.1), 0)
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("blocks.") and parameter.dim() == 2
        torch.testing.assert_close(parameter, parts[is_matrix].get_parameter(name), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_copy_updates_identically(kind):
    model = tiny_model()
    optimizer = build_optimizer(model, TrainingConfig(optimizer=kind, learning_rate=1e-2))
    update(model, optimizer, 0)
    other, copied = copy.deepcopy((model, optimizer))
    update(model, optimizer, 1)
    update(other, copied, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_muon_without_matrices_is_adamw():
    model = tiny_model()
    model.blocks.requires_grad_(False)
    assert isinstance(build_optimizer(model, TrainingConfig(optimizer="muon")), torch.optim.AdamW)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_learning_rate_of_every_group_can_be_set(kind):
    model = tiny_model()
    optimizer = build_optimizer(model, TrainingConfig(optimizer=kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    update(model, optimizer, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Adafactor


def test_adafactor_is_that_of_pytorch():
    config = TrainingConfig(optimizer="adafactor", learning_rate=0.1, weight_decay=0.3)
    model, other = tiny_model(), tiny_model()
    vectors, matrices = ([p for p in other.parameters() if (p.dim() > 1) is is_matrix] for is_matrix in (False, True))
    theirs = torch.optim.Adafactor([{"params": vectors}, {"params": matrices, "weight_decay": 0.3}], lr=0.1)
    ours = build_optimizer(model, config)
    for seed in range(3):
        update(model, ours, seed)
        update(other, theirs, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_low_rate_of_adafactor_gives_a_warning(caplog):
    build_optimizer(tiny_model(), TrainingConfig(optimizer="adafactor"))
    assert "train.learning_rate=0.0003 is low: Adafactor's rate is relative" in caplog.text


def test_effective_rate_of_adafactor_is_the_bound_of_pytorch():
    config = TrainingConfig(optimizer="adafactor", learning_rate=1.0, warmup_steps=3, weight_decay=0.0)
    models = tiny_model(), tiny_model()
    optimizers = [build_optimizer(model, config) for model in models]
    for step in range(6):
        for model, optimizer, rate in zip(models, optimizers, (learning_rate, effective_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, 6, config)
            update(model, optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    rates = [effective_rate(step, 6, config) for step in range(6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 3**-0.5, 4**-0.5, 5**-0.5, learning_rate(5, 6, config)])
    assert effective_rate(3, 6, replace(config, optimizer="adamw")) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Ignored settings


@pytest.mark.parametrize(
    ("optimizer", "ignored"),
    [
        ("adamw", ["muon_momentum"]),
        ("muon", []),
        ("adafactor", ["beta1", "muon_momentum"]),
        ("schedule_free", ["min_learning_rate", "lr_schedule", "muon_momentum"]),
    ],
)
def test_settings_without_effect_are_named(optimizer, ignored, caplog):
    changed = {"beta1": 0.8, "min_learning_rate": 0.0, "lr_schedule": "wsd", "muon_momentum": 0.9}
    build_optimizer(tiny_model(), TrainingConfig(optimizer=optimizer, learning_rate=0.1, **changed))
    assert caplog.messages == [
        f"train.{k}={changed[k]} has no effect with train.optimizer={optimizer}" for k in ignored
    ]
    caplog.clear()
    build_optimizer(tiny_model(), TrainingConfig(optimizer=optimizer, learning_rate=0.1))
    assert not caplog.messages


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (1, 50), (99, 100), (2000, 2001)])
def test_warmup_is_linear(warmup, total):
    config = TrainingConfig(learning_rate=3e-4, warmup_steps=warmup)
    rates = [learning_rate(step, total, config) for step in range(warmup)]
    assert rates == pytest.approx([3e-4 * (step + 1) / warmup for step in range(warmup)])
    assert rates[-1] == 3e-4
    assert learning_rate(warmup, total, config) == pytest.approx(3e-4)


@pytest.mark.parametrize(("warmup", "total"), [(0, 100), (10, 100), (0, 1), (99, 100)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedule_ends_at_minimum(warmup, total, schedule):
    for minimum, lowest in ((None, 3e-5), (0.0, 0.0), (1e-4, 1e-4), (3e-4, 3e-4)):
        settings = {"warmup_steps": warmup, "min_learning_rate": minimum, "lr_schedule": schedule}
        config = TrainingConfig(learning_rate=3e-4, **settings)
        rates = [learning_rate(step, total, config) for step in range(warmup, total + 1)]
        assert rates[0] == pytest.approx(3e-4)
        assert rates[-1] == pytest.approx(lowest)
        assert all(later <= earlier for earlier, later in pairwise(rates))
        assert learning_rate(10 * total, total, config) == pytest.approx(lowest)


def test_cosine_schedule():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=20, min_learning_rate=0.5)
    assert learning_rate(70, 120, config) == pytest.approx(0.75)
    assert learning_rate(45, 120, config) == pytest.approx(0.75 + 0.25 * 0.5**0.5)


def test_linear_and_wsd_schedules():
    linear = TrainingConfig(learning_rate=1.0, warmup_steps=20, min_learning_rate=0.0, lr_schedule="linear")
    assert [learning_rate(step, 120, linear) for step in (20, 45, 70, 95)] == pytest.approx([1, 0.75, 0.5, 0.25])
    wsd = TrainingConfig(
        learning_rate=1.0, warmup_steps=20, min_learning_rate=0.0, lr_schedule="wsd", decay_fraction=0.25
    )
    assert [learning_rate(step, 120, wsd) for step in (20, 60, 90, 105, 120)] == pytest.approx([1, 1, 1, 0.5, 0])


def test_wsd_decays_over_one_step_at_least():
    wsd = TrainingConfig(learning_rate=1.0, warmup_steps=2, lr_schedule="wsd", decay_fraction=0.01)
    assert [learning_rate(step, 10, wsd) for step in (2, 8, 9, 10)] == pytest.approx([1, 1, 1, 0.1])


def test_schedule_free_keeps_the_peak():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=20, min_learning_rate=0.0, optimizer="schedule_free")
    assert [learning_rate(step, 120, config) for step in (9, 19, 20, 119)] == [0.5, 1.0, 1.0, 1.0]


def test_warmup_longer_than_run_never_peaks():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=2000)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert all(earlier < later for earlier, later in pairwise(rates))
    assert rates[-1] == pytest.approx(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("parametrization", ["standard", "mup"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_optimizer_updates_identically(kind, parametrization):
    config = TrainingConfig(learning_rate=1e-2, optimizer=kind)
    model = tiny_model(parametrization=parametrization)
    optimizer = build_optimizer(model, config)
    for seed in range(3):
        update(model, optimizer, seed)

    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    assert {name.split("/", 1)[1] for name in saved} == {name for name, _ in model.named_parameters()}
    resumed, forgetful = copy.deepcopy(model), copy.deepcopy(model)
    memory = build_optimizer(resumed, config)
    load_optimizer_tensors(memory, resumed, saved)
    for seed in (3, 4):
        update(model, optimizer, seed)
        update(resumed, memory, seed)
    update(forgetful, build_optimizer(forgetful, config), 3)

    weights, resumed_weights = model.state_dict(), resumed.state_dict()
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    memories = optimizer_tensors(optimizer, model), optimizer_tensors(memory, resumed)
    assert memories[0].keys() == memories[1].keys()
    assert all(torch.equal(memories[0][name], memories[1][name]) for name in memories[0])
    assert not torch.equal(forgetful.final_norm.weight, resumed.final_norm.weight)


def test_new_optimizer_has_no_state():
    model = tiny_model()
    optimizer = build_optimizer(model, TrainingConfig())
    assert optimizer_tensors(optimizer, model) == {}
    load_optimizer_tensors(optimizer, model, {})
    update(model, optimizer, 0)
    assert all(state["step"] == 1 for state in optimizer.state.values())


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_every_optimizer_has_a_builder():
    (choices,) = (get_args(hint) for key, hint in get_type_hints(TrainingConfig).items() if key == "optimizer")
    assert set(choices) == set(OPTIMIZERS) == set(BUILDERS)
