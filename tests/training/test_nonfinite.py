"""Non-finite steps: they change no weights, are reported once, and end the run if configured."""

import json
import signal
from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch

import tests.test_train as training
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.checkpoint.format import nonfinite_names
from gpt2.config import OPTIMIZERS, TrainingConfig
from gpt2.errors import DivergenceError
from gpt2.tracking.tracker import Tracker, read_metrics
from gpt2.training.nonfinite import NonFiniteGuard, gradient_norms
from gpt2.training.optimizer import build_optimizer, optimizer_tensors
from tests import fault_injection
from tests.helpers import noisy_model, tiny_config
from tests.test_train import InterruptAt, assert_same_state, logged, make_trainer

blocks = training.blocks  # the fixture
FIRST = "token_embedding.weight"
LAST = "final_norm.bias"

both_ways = pytest.mark.parametrize("ahead", [False, True], ids=["host_waits", "host_runs_ahead"])


def make_guard(ahead: bool = False, loss_is_scaled: bool = False, **options) -> NonFiniteGuard:
    """The guard of a small model. `ahead`: the optimizer skips steps and the host is notified later, as on CUDA."""
    config = TrainingConfig(learning_rate=1e-2, **options)
    model = noisy_model(tiny_config())
    guard = NonFiniteGuard(model, build_optimizer(model, config), config, loss_is_scaled)
    guard.host_runs_ahead = ahead
    return guard


def take_step(guard: NonFiniteGuard, number: int, spoiled: str | None = None, value: float = nan, loss: float = 1.0):
    """Make step `number` with a random gradient of that seed, and set one element of one gradient to `value`."""
    random = torch.Generator().manual_seed(number)
    for name, parameter in guard.model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)
        if name == spoiled:
            parameter.grad.view(-1)[-1] = value
    admitted = guard.check(f"step {number}", torch.tensor(loss), gradient_norms(guard.model))
    if admitted:
        guard.optimizer.step()
    return admitted


def state(guard: NonFiniteGuard) -> dict[str, torch.Tensor]:
    tensors = {**guard.model.state_dict(), **optimizer_tensors(guard.optimizer, guard.model)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


WRONG = [
    ({"spoiled": FIRST}, f"the gradient of {FIRST} is not finite"),
    ({"spoiled": LAST, "value": -inf}, f"the gradient of {LAST} is not finite"),
    ({"loss": nan}, "the loss is nan"),
    ({"loss": -inf, "spoiled": LAST, "value": inf}, f"the loss is -inf and the gradient of {LAST} is not finite"),
]


@both_ways
@pytest.mark.parametrize(("wrong", "message"), WRONG)
@pytest.mark.parametrize("number", [1, 4])
def test_stop_raises_before_weights_change(ahead, wrong, message, number):
    guard = make_guard(ahead)
    for good in range(1, number):
        take_step(guard, good)
    before = state(guard)
    with pytest.raises(DivergenceError, match=f"^step {number}: {message}; the weights are as before it") as end:
        take_step(guard, number, **wrong)
        assert ahead  # raised during the next step, before it changes weights
        take_step(guard, number + 1)
    assert_same({name: tensor for name, tensor in state(guard).items() if name in before}, before)
    assert "\n" not in str(end.value)


@both_ways
def test_nonfinite_step_is_reported_once(ahead, caplog):
    guard = make_guard(ahead, on_nonfinite="skip")
    assert guard.poll()
    take_step(guard, 1, loss=nan)
    assert guard.poll() is not ahead
    assert guard.poll()
    assert guard.total == 1
    assert len(caplog.records) == 1
    assert "step 1: the loss is nan: skipped, 1 so far" in caplog.text


def test_message_names_first_parameter_and_counts_others():
    guard = make_guard()
    for parameter in guard.model.parameters():
        parameter.requires_grad_(False)
    guard.model.final_norm.weight.requires_grad_(True)
    guard.model.final_norm.bias.requires_grad_(True)
    guard.optimizer = build_optimizer(guard.model, guard.config)
    for parameter in (guard.model.final_norm.weight, guard.model.final_norm.bias):
        parameter.grad = torch.full_like(parameter, inf)
    message = r"the gradient of final_norm.weight is not finite, nor that of 1 other parameters"
    with pytest.raises(DivergenceError, match=message):
        guard.check("step 1", torch.tensor(1.0), gradient_norms(guard.model))


@both_ways
@pytest.mark.parametrize("wrong", [wrong for wrong, _ in WRONG])
@pytest.mark.parametrize("left_out", [{1, 2, 5}, {3, 6}])
@pytest.mark.parametrize("optimizer", [name for name, traits in OPTIMIZERS.items() if traits.skips_nonfinite])
def test_skipped_step_changes_nothing(ahead, wrong, left_out, optimizer):
    skipping = make_guard(ahead, on_nonfinite="skip", optimizer=optimizer)
    never = make_guard(optimizer=optimizer)
    for number in range(1, 7):
        take_step(skipping, number, **(wrong if number in left_out else {}))
        if number not in left_out:
            take_step(never, number)
    skipping.poll()
    assert_same(state(skipping), state(never))
    assert skipping.total == len(left_out)
    assert skipping.in_a_row == (6 in left_out)


@both_ways
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_limit_of_skipped_steps_in_a_row(ahead, limit):
    guard = make_guard(ahead, on_nonfinite="skip", nonfinite_limit=limit)
    number = 0
    for _ in range(2):  # a finite step resets the count
        for _ in range(limit):
            take_step(guard, number := number + 1, loss=nan)
        take_step(guard, number := number + 1)
        guard.poll()
        assert guard.in_a_row == 0
    before = state(guard)
    for _ in range(limit):
        take_step(guard, number := number + 1, loss=nan)
    with pytest.raises(
        DivergenceError, match=f"^step {number + 1}: .* after train.nonfinite_limit={limit} such steps in a row"
    ):
        take_step(guard, number + 1, loss=nan)
        guard.poll()
    assert guard.total == 3 * limit + 1
    assert_same(state(guard), before)


@both_ways
def test_count_of_skipped_steps_is_resumed(ahead):
    options = {"on_nonfinite": "skip", "nonfinite_limit": 3}
    first, second = make_guard(ahead, **options), make_guard(ahead, **options)
    for number in (1, 2, 4, 5):
        take_step(first, number, loss=nan)
        if number == 2:
            take_step(first, 3)
    first.poll()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() == {"total": 4, "in_a_row": 2}
    take_step(second, 6, loss=nan)
    with pytest.raises(DivergenceError, match="nonfinite_limit=3"):
        take_step(second, 7, loss=nan)
        second.poll()
    assert second.total == 6


@both_ways
def test_fp16_accepts_gradient_overflow_but_not_nan_loss(ahead):
    guard = make_guard(ahead, loss_is_scaled=True, nonfinite_limit=2)  # and on_nonfinite=stop
    assert take_step(guard, 1, spoiled=FIRST, value=inf)  # the scaler skips the step
    guard.poll()
    with pytest.raises(DivergenceError, match="step 2: the loss is nan"):
        take_step(guard, 2, loss=nan)
        guard.poll()


def test_fp16_skips_step_with_nonfinite_loss():
    guard, scaler = make_guard(False, loss_is_scaled=True, on_nonfinite="skip"), torch.amp.GradScaler("cpu")
    before = state(guard)
    for parameter in guard.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    scaler.scale(torch.tensor(1.0))
    scaler.unscale_(guard.optimizer)
    if guard.check("step 1", torch.tensor(nan), gradient_norms(guard.model)):
        scaler.step(guard.optimizer)
    guard.poll()
    assert guard.total == 1
    assert_same({name: state(guard)[name] for name in before}, before)


def test_nonfinite_names():
    good = {
        "large": torch.full((9,), 3e38),  # the sum is infinite
        "bf16": torch.full((9,), 3e38, dtype=torch.bfloat16),
        "fp16": torch.full((9,), 65504.0, dtype=torch.float16),
        "fp64": torch.tensor([1e308, 1e308], dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "zero_dim": torch.tensor(1.0),
        "integers": torch.tensor([2**62, -1]),
        "bytes": torch.tensor([255], dtype=torch.uint8),
    }
    assert nonfinite_names(good) == []
    for name in ("large", "bf16", "fp16", "fp64", "zero_dim"):
        for value in (nan, inf, -inf):
            spoiled = {**good, name: good[name].clone()}
            spoiled[name].view(-1)[-1] = value
            assert nonfinite_names(spoiled) == [name]


def test_private_api_of_torch():
    """Fused AdamW skips the step where `found_inf` is 1, and `_foreach_norm` returns norms as `vector_norm` does."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, torch.ones(3)), "torch no longer reads optimizer.found_inf, see training/nonfinite.py"
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))
    tensors = [torch.arange(5.0), torch.ones(2, 3)]
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    assert torch.equal(torch.stack(torch._foreach_norm(tensors)), torch.stack(norms)), "torch._foreach_norm differs"


# A whole run


@pytest.fixture
def fault(monkeypatch):
    return lambda text: monkeypatch.setenv(fault_injection.VARIABLE, text)


def run(blocks, folder: Path, ahead: bool = False, load: bool = False, **options):
    """A run of 9 steps, by default evaluated, saved and logged at each."""
    folder.mkdir(exist_ok=True)
    each = {"eval_every": 1, "save_every": 1, "log_every": 1, "keep_checkpoints": 99, "max_steps": 9}
    trainer = make_trainer(blocks, folder, 0.1, tracker=Tracker(folder), **{**each, **options})
    trainer.guard.host_runs_ahead = ahead
    if load:
        trainer.load_checkpoint(str(folder / run_folder.LAST))
    trainer.train()
    return trainer


def assert_finite_checkpoints(folder: Path, *steps: int) -> None:
    assert [run_folder.step_of(path) for path in sorted(folder.glob("step_*"))] == list(steps)
    for path in folder.glob("*.pth"):
        checkpoint.verify(path)
        assert nonfinite_names(checkpoint.read_tensors(path)) == []


def losses(folder: Path) -> dict[int, float | None]:
    return {r["step"]: r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r}


NOT_FINITE = ["nan_loss", "inf_loss", "nan_gradient", "inf_gradient"]


@both_ways
@pytest.mark.parametrize("kind", [*NOT_FINITE, "nan_weight"])
def test_run_stops_at_nonfinite_step_and_keeps_checkpoints(blocks, tmp_path, fault, kind, ahead):
    fault(f"{kind}@7")
    with pytest.raises(DivergenceError, match=r"^step 7 \(batch 2 of epoch 2\): the (loss|gradient of)") as end:
        run(blocks, tmp_path, ahead)
    assert ("the loss is" in str(end.value)) == (kind in ("nan_loss", "inf_loss", "nan_weight"))
    assert_finite_checkpoints(tmp_path, 1, 2, 3, 4, 5, 6)
    assert checkpoint.read_record(tmp_path / run_folder.LAST)["progress"]["step"] == 6
    assert None not in losses(tmp_path).values()


@both_ways
@pytest.mark.parametrize("only", ["log_every", "eval_every", "save_every"])
def test_nonfinite_step_is_neither_logged_nor_saved(blocks, tmp_path, fault, ahead, only):
    fault("nan_gradient@7")
    with pytest.raises(DivergenceError, match=r"^step 7 "):
        run(blocks, tmp_path, ahead, **{"log_every": 99, "eval_every": 99, "save_every": 99, only: 1})
    assert max(record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")) == (1 if "save" in only else 6)
    assert_finite_checkpoints(tmp_path, *([] if "log" in only else range(1, 7)))  # each evaluation is the best so far


@pytest.mark.parametrize("kind", ["out_of_memory", "out_of_host_memory"])
def test_run_out_of_memory_keeps_checkpoints(blocks, tmp_path, fault, kind):
    fault(f"{kind}@7")
    with pytest.raises(RuntimeError, match=r"out of memory|can't allocate memory"):
        run(blocks, tmp_path)
    assert_finite_checkpoints(tmp_path, 1, 2, 3, 4, 5, 6)


@both_ways
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_skipping_run_logs_and_saves_only_finite_values(blocks, tmp_path, fault, kind, ahead):
    fault(f"{kind}@1,{kind}@4-6")
    trainer = run(blocks, tmp_path, ahead, on_nonfinite="skip", nonfinite_limit=3)
    assert_finite_checkpoints(tmp_path, *range(1, 10))
    assert trainer.progress.step == 9
    by_step = losses(tmp_path)
    # If only the gradient is not finite, the loss is logged; else it is logged as null.
    without = {1, 4, 5, 6} if kind in ("nan_loss", "inf_loss") else set()
    assert {step for step, loss in by_step.items() if loss is None} == without
    assert all(1 < loss < 5 for loss in by_step.values() if loss is not None)
    records = {r["step"]: r for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r}
    assert [records[n]["train/steps_left_out"] for n in range(1, 10)] == [1, 1, 1, 2, 3, 4, 4, 4, 4]
    assert {step for step, record in records.items() if record["train/grad_norm"] is None} == {1, 4, 5, 6}
    saved = [checkpoint.read_record(path)["steps_left_out"]["in_a_row"] for path in sorted(tmp_path.glob("step_*"))]
    assert saved == [1, 0, 0, 1, 2, 3, 0, 0, 0]


def test_host_running_ahead_changes_no_result(blocks, tmp_path, fault):
    fault("nan_loss@2,inf_gradient@4-5,inf_loss@9")
    for options in ({}, {"eval_every": 99, "save_every": 4, "log_every": 3}):
        for ahead in (False, True):
            run(blocks, tmp_path / str(ahead), ahead, on_nonfinite="skip", **options)
        assert logged(tmp_path / "False") == logged(tmp_path / "True")
        for path in (tmp_path / "False").glob("*.pth"):
            assert_same_state(path, tmp_path / "True" / path.name)


def test_logged_mean_excludes_skipped_steps(blocks, tmp_path, fault):
    fault("nan_loss@5,inf_loss@7-9")
    run(blocks, tmp_path / "each", on_nonfinite="skip")
    trainer = run(blocks, tmp_path / "third", on_nonfinite="skip", log_every=3)
    each, third = losses(tmp_path / "each"), losses(tmp_path / "third")
    assert third == {
        1: each[1],
        3: pytest.approx((each[2] + each[3]) / 2),
        6: pytest.approx((each[4] + each[6]) / 2),
        9: None,
    }
    assert trainer.losses_since_log.totals.tolist() == [0, 0]


def test_loss_of_epoch_without_finite_step_is_nan(blocks, tmp_path, fault):
    fault("nan_loss@1-5")
    trainer = make_trainer(blocks, tmp_path, on_nonfinite="skip")
    assert isnan(trainer.train_epoch())


def test_fp16_run_resumes_with_its_loss_scale(blocks, tmp_path, fault):
    fault("inf_gradient@2")  # an overflow: the scale is halved before the interruption
    options = {"precision": "fp16", "eval_every": 4, "save_every": 99}
    straight = run(blocks, tmp_path / "straight", **options)
    run(blocks, tmp_path / "cut", callbacks=[InterruptAt(5)], **options)
    resumed = run(blocks, tmp_path / "cut", load=True, **options)
    assert straight.scaler.get_scale() == resumed.scaler.get_scale() == 2**15
    assert_same_state(tmp_path / "straight" / run_folder.LAST, tmp_path / "cut" / run_folder.LAST)
    assert logged(tmp_path / "straight") == logged(tmp_path / "cut")


@both_ways
@pytest.mark.parametrize("stop_at", [3, 5, 6])
def test_interrupted_skipping_run_matches_uninterrupted(blocks, tmp_path, fault, ahead, stop_at):
    fault("nan_loss@3-5,inf_gradient@8")
    options = {"on_nonfinite": "skip", "ahead": ahead, "eval_every": 4, "save_every": 99}
    run(blocks, tmp_path / "straight", **options)
    first = run(blocks, tmp_path / "cut", callbacks=[InterruptAt(stop_at)], **options)
    assert (first.interrupted_by, first.progress.step) == (signal.SIGINT, stop_at)
    run(blocks, tmp_path / "cut", load=True, **options)
    for name in (run_folder.LAST, run_folder.BEST):
        assert_same_state(tmp_path / "straight" / name, tmp_path / "cut" / name)
    assert logged(tmp_path / "straight") == logged(tmp_path / "cut")


@both_ways
def test_interruption_does_not_reset_limit(blocks, tmp_path, fault, ahead):
    fault("nan_gradient@3-9")
    options = {"on_nonfinite": "skip", "nonfinite_limit": 3, "ahead": ahead, "eval_every": 99, "save_every": 99}
    run(blocks, tmp_path, callbacks=[InterruptAt(4)], **options)
    with pytest.raises(DivergenceError, match=r"^step 6 .* after train.nonfinite_limit=3 such steps"):
        run(blocks, tmp_path, load=True, **options)


def test_nonfinite_weights_are_never_saved(blocks, tmp_path, fault):
    fault("nan_weight@4")
    with pytest.raises(DivergenceError, match=r"^step 4: .*final_norm.bias is not finite, not saved"):
        run(blocks, tmp_path, on_nonfinite="skip", eval_every=99)
    assert_finite_checkpoints(tmp_path, 1, 2, 3)


@both_ways
def test_fp16_lowers_scale_at_overflow_and_stops_at_nan_loss(blocks, tmp_path, fault, ahead):
    options = {"precision": "fp16", "ahead": ahead}
    fault("inf_gradient@4-5")
    trainer = run(blocks, tmp_path, **options)
    assert trainer.guard.total == 2
    assert trainer.scaler.get_scale() == 2**16 / 4
    before, after = (checkpoint.read_tensors(tmp_path / run_folder.step_name(step), "model/") for step in (3, 5))
    assert_same(before, after)
    assert None not in losses(tmp_path).values()
    norms = {r["train/grad_norm"] for r in read_metrics(tmp_path / "metrics.jsonl") if "train/grad_norm" in r}
    assert all(0.1 < norm < 10 for norm in norms - {None})  # not multiplied by the loss scale
    fault("nan_loss@4")
    with pytest.raises(DivergenceError, match=r"^step 4 .*the loss is nan"):
        run(blocks, tmp_path / "stopped", **options)
    assert_finite_checkpoints(tmp_path / "stopped", 1, 2, 3)
