"""The training loop: arithmetic, limits, and that an interrupted run matches an uninterrupted one."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gpt2 import train
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.config import OPTIMIZERS, GPT2Config, TrainingConfig
from gpt2.data_loader import TokenDataset, get_dataloaders
from gpt2.errors import DivergenceError, UserError
from gpt2.evaluate import score
from gpt2.model import GPT2Model
from gpt2.ops import linear as onednn
from gpt2.runtime import device
from gpt2.tracking.tracker import Tracker, read_metrics
from gpt2.train import Trainer
from gpt2.training import compile as compilation
from gpt2.training.callbacks import Callback, Samples, TrackerLog
from gpt2.training.compile import Compiled
from gpt2.training.optimizer import learning_rate
from gpt2.training.profiler import StepProfiler

VOCABULARY, LENGTH = 31, 16


@pytest.fixture
def blocks(tmp_path: Path) -> TokenDataset:
    """20 blocks of learnable numbers; the last block is short."""
    steps = np.random.default_rng(0).integers(1, 4, size=20 * LENGTH - 5)
    path = tmp_path / "tokens.bin"
    (np.cumsum(steps) % VOCABULARY).astype(np.uint8).tofile(path)
    return TokenDataset(path, "uint8", LENGTH)


def make_trainer(
    blocks: TokenDataset, folder: Path, dropout: float = 0.0, tracker: Tracker | None = None, callbacks=(), **options
) -> Trainer:
    defaults = {"batch_size": 4, "num_workers": 0, "warmup_steps": 2, "learning_rate": 1e-2, "device": "cpu"}
    defaults["precision"] = "fp32"
    config = TrainingConfig(**{**defaults, **options})
    torch.manual_seed(config.seed)
    shape = GPT2Config(VOCABULARY, LENGTH, 16, 2, 1, 32, dropout, dropout, dropout)
    train_loader, val_loader, _ = get_dataloaders(blocks, blocks, blocks, config)
    callbacks = [*callbacks, *([TrackerLog(tracker)] if tracker else [])]
    return Trainer(GPT2Model(shape), train_loader, val_loader, config, str(folder), callbacks)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_state(left: Path, right: Path) -> None:
    """Assert that two checkpoints are bitwise equal, except for the training time."""
    one, other = checkpoint.read_tensors(left), checkpoint.read_tensors(right)
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    records = [checkpoint.read_record(path) for path in (left, right)]
    progress = [{**record["progress"], "seconds": 0} for record in records]
    assert progress[0] == progress[1]
    for key in ("steps_left_out", "scaler", "random"):
        assert records[0][key] == records[1][key], key


def logged(folder: Path) -> list[dict]:
    """The metrics of a run without those that depend on time."""
    by_clock = {"seconds", "train/tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in by_clock} for record in read_metrics(folder / "metrics.jsonl")]


# Arithmetic


def test_accumulation_matches_larger_batch(blocks, tmp_path):
    # A large epsilon, so that Adam does not turn gradients of pure rounding error into full steps.
    whole = make_trainer(blocks, tmp_path, batch_size=8, max_steps=3, epsilon=1e-2)
    parts = make_trainer(blocks, tmp_path, batch_size=2, accumulation_steps=4, max_steps=3, epsilon=1e-2)
    whole.train_epoch()  # 20 blocks: the last step has 4, one of them short
    parts.train_epoch()
    assert whole.progress.step == parts.progress.step == 3
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=2e-6)


def test_training_lowers_the_loss(blocks, tmp_path):
    trainer = make_trainer(blocks, tmp_path, max_epochs=20)
    before = trainer.validate()
    trainer.train()
    assert trainer.progress.val_loss < before - 1


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.05)])
def test_mixed_precision_learns_like_fp32(blocks, tmp_path, precision, tolerance):
    losses = {}
    for name in ("fp32", precision):
        trainer = make_trainer(blocks, tmp_path, precision=name, max_epochs=5)
        losses[name] = trainer.train_epoch()
    assert losses[precision] == pytest.approx(losses["fp32"], abs=tolerance)
    assert all(tensor.dtype == torch.float32 for tensor in weights(trainer).values())


def test_mixed_precision_false_means_fp32(blocks, tmp_path):
    assert make_trainer(blocks, tmp_path, mixed_precision=False).plan.precision.name == "fp32"


def test_gradients_are_clipped(blocks, tmp_path):
    trainer = make_trainer(blocks, tmp_path, gradient_clip=1e-3)
    _, norm = trainer.train_step([blocks.__getitems__([0, 1])])
    moments = trainer.optimizer.state[trainer.model.token_embedding.weight]["exp_avg"]
    assert norm > 1e-3
    assert moments.norm() <= 1e-3 * (1 - trainer.config.beta1) * 1.01


def test_gradient_checkpointing_changes_no_result(blocks, tmp_path):
    plain, recomputed = (make_trainer(blocks, tmp_path, gradient_checkpointing=flag) for flag in (False, True))
    plain.train_epoch()
    recomputed.train_epoch()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(recomputed)[name], tensor, rtol=0, atol=1e-6)


def test_evaluation_samples_and_saves_do_not_change_training(blocks, tmp_path):
    def draw(step):
        yield str(torch.rand(3, generator=torch.Generator().manual_seed(step)))

    often = make_trainer(
        *(blocks, tmp_path / "often", 0.1),
        callbacks=[Samples(draw)],
        max_steps=7,
        eval_every=1,
        save_every=1,
        log_every=1,
    )
    often.train()
    never = make_trainer(blocks, tmp_path / "never", 0.1, max_steps=7, eval_every=999, save_every=999, log_every=999)
    never.train()
    assert all(torch.equal(tensor, weights(never)[name]) for name, tensor in weights(often).items())


@pytest.mark.parametrize("as_pair", [True, False])
def test_loaders_of_pairs_and_of_tensors(tmp_path, as_pair):
    input_ids = torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(input_ids, input_ids) if as_pair else input_ids, batch_size=4)
    model = GPT2Model(GPT2Config(VOCABULARY, LENGTH, 16, 2, 1, 32, 0.0, 0.0, 0.0))
    expected = model(input_ids, labels=input_ids)[1].item()
    config = TrainingConfig(max_epochs=1, device="cpu", precision="fp32")
    trainer = Trainer(model, loader, loader, config, checkpoint_dir=str(tmp_path))
    assert trainer.validate() == pytest.approx(expected, abs=1e-5)
    trainer.train()
    assert trainer.progress.tokens == 8 * (LENGTH - 1)


def test_validation_loss_does_not_depend_on_the_batch_size(blocks, tmp_path):
    trainer = make_trainer(blocks, tmp_path)
    losses = [
        score(trainer.model, get_dataloaders(blocks, blocks, blocks, config)[1], trainer.device).loss
        for config in (TrainingConfig(batch_size=size, num_workers=0) for size in (1, 3, 20))
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 4])
def test_mfu_is_the_share_of_the_peak_of_all_chips(blocks, tmp_path, monkeypatch, ranks):
    trainer = make_trainer(blocks, tmp_path, tracker=Tracker(tmp_path), max_steps=3, log_every=1)
    trainer.train()
    assert {record.get("train/mfu") for record in read_metrics(tmp_path / "metrics.jsonl")} == {None}  # on a CPU
    monkeypatch.setattr("gpt2.training.compile.peak_flops", lambda precision: 5e9)
    monkeypatch.setattr(trainer.throughput, "tokens_per_second", lambda tokens: 700.0)
    trainer.group.size = ranks
    trainer._log(torch.tensor(1.0))
    share = 700 * trainer.model.flops_per_token(LENGTH) / 5e9 / ranks
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["train/mfu"] == pytest.approx(share)


# Stops


@pytest.mark.parametrize(
    ("options", "steps", "reason"),
    [
        ({"max_steps": 3}, 3, "train.max_steps=3"),
        ({"max_epochs": 2, "max_steps": 99}, 10, "train.max_epochs=2"),
        ({"max_epochs": 2, "max_steps": 10}, 10, "train.max_steps=10"),
        ({"max_epochs": 2, "accumulation_steps": 3}, 4, "train.max_epochs=2"),
        ({"max_training_hours": 1e-9}, 0, "train.max_training_hours=1e-09"),
    ],
)
def test_training_stops_at_first_limit(blocks, tmp_path, options, steps, reason):
    trainer = make_trainer(blocks, tmp_path, **options)
    trainer.train()
    assert trainer.progress.step == steps
    if steps:  # the schedule ends with the run
        assert trainer.progress.learning_rate == learning_rate(steps - 1, steps, trainer.config)
    assert trainer.stop_reason == f"{reason} reached"
    assert (tmp_path / run_folder.LAST).is_file()


class FailsOnce(Callback):
    def __init__(self):
        self.at = 7

    def on_step_end(self, trainer):
        if trainer.progress.step == self.at:
            self.at = 0
            raise RuntimeError("once")


@pytest.mark.parametrize("first", ["train_epoch", "train"])
def test_training_continues_after_a_failed_callback_or_an_epoch(blocks, tmp_path, first):
    whole = make_trainer(blocks, tmp_path / "whole", max_steps=12, save_every=3)
    whole.train()
    trainer = make_trainer(blocks, tmp_path / "parts", callbacks=[FailsOnce()], max_steps=12, save_every=3)
    trainer.train_epoch()
    with pytest.raises(RuntimeError, match="once"):
        getattr(trainer, first)()
    trainer.train()
    assert trainer.progress.step == 12
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(trainer).items())


def test_best_checkpoint_has_lowest_validation_loss(blocks, tmp_path):
    tracker = Tracker(tmp_path)
    trainer = make_trainer(blocks, tmp_path / "kept", tracker=tracker, max_epochs=12, eval_every=2, learning_rate=0.1)
    trainer.train()
    losses = {r["step"]: r["val/loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "val/loss" in r}
    best = checkpoint.read_record(tmp_path / "kept" / run_folder.BEST)["progress"]
    assert best["val_loss"] == min(losses.values()) == losses[best["step"]]
    assert len(losses) == 30


def test_nan_loss_ends_training_and_keeps_checkpoint(blocks, tmp_path):
    trainer = make_trainer(blocks, tmp_path, max_steps=9, eval_every=2, log_every=1)
    trainer.train()
    before = (tmp_path / run_folder.LAST).read_bytes()
    trainer.config.max_steps = 20
    with torch.no_grad():
        trainer.model.final_norm.bias.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"step 10 \(batch 5 of epoch 2\): the loss is nan and the gradient of"):
        trainer.train()
    assert (tmp_path / run_folder.LAST).read_bytes() == before


@pytest.mark.filterwarnings("ignore:Error detected in")  # with the operation's traceback
def test_detected_anomaly_names_the_operation(blocks, tmp_path):
    trainer = make_trainer(blocks, tmp_path, max_steps=1, detect_anomaly=True)
    with torch.no_grad():
        trainer.model.final_norm.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"Function '\w+Backward\w*' returned nan values"):
        trainer.train()
    assert not torch.is_anomaly_enabled()


# Interruption: k + k steps equal 2k steps


class InterruptAt(Callback):
    """Sends SIGINT when a certain step is logged."""

    def __init__(self, step: int):
        self.step = step

    def on_log(self, trainer: Trainer, metrics: dict) -> None:
        if metrics["step"] == self.step and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("stop_at", "num_workers"),  # 4 is in the middle of an epoch, 5 at its end; 6 cuts an evaluation off
    [(4, 2), (5, 0), (5, 2), (6, 0)],
)
def test_interrupted_run_matches_uninterrupted(blocks, tmp_path, num_workers, stop_at):
    options = {
        "dropout": 0.1,
        "accumulation_steps": 1 if stop_at == 5 else 2,
        "max_epochs": 4,
        "eval_every": 3,
        "log_every": 1 if stop_at != 4 else 4,
        "num_workers": num_workers,
    }
    straight, folder = tmp_path / "straight", tmp_path / "interrupted"
    for path in (straight, folder):
        path.mkdir()
    make_trainer(blocks, straight, tracker=Tracker(straight), **options).train()

    first = make_trainer(blocks, folder, tracker=Tracker(folder), callbacks=[InterruptAt(stop_at)], **options)
    first.train()
    assert first.interrupted_by == signal.SIGINT
    assert first.progress.step == stop_at

    second = make_trainer(blocks, folder, tracker=Tracker(folder), **options)
    second.load_checkpoint(str(folder / run_folder.LAST))
    second.train()

    assert_same_state(straight / run_folder.LAST, folder / run_folder.LAST)
    assert_same_state(straight / run_folder.BEST, folder / run_folder.BEST)
    assert logged(folder) == logged(straight)


def test_run_killed_after_last_save_matches_uninterrupted(blocks, tmp_path):
    """The last save is at the end of an epoch, before the final evaluation."""
    options = {"dropout": 0.1, "max_steps": 10, "save_every": 5, "eval_every": 3}
    straight = make_trainer(blocks, tmp_path / "straight", **options)

    def after_step(*numbers: torch.Tensor) -> None:
        Trainer._after_step(straight, *numbers)
        if straight.progress.step == 10:  # the files of a process that is killed now
            shutil.copytree(tmp_path / "straight", tmp_path / "killed")

    straight._after_step = after_step
    straight.train()
    resumed = make_trainer(blocks, tmp_path / "killed", **options)
    resumed.load_checkpoint(str(tmp_path / "killed" / run_folder.LAST))
    resumed.train()
    assert (straight.progress.epoch, straight.progress.position) == (2, 0)
    assert_same_state(tmp_path / "straight" / run_folder.LAST, tmp_path / "killed" / run_folder.LAST)


def test_run_resumed_from_older_checkpoint_repeats_the_same_steps(blocks, tmp_path):
    options = {"dropout": 0.1, "max_steps": 9, "eval_every": 100, "save_every": 4, "log_every": 3}
    tracker = Tracker(tmp_path)
    trainer = make_trainer(blocks, tmp_path / "a", tracker=tracker, **options)
    original = trainer.save_checkpoint
    trainer.save_checkpoint = lambda name: original(name) or original(f"step_{trainer.progress.step}")
    trainer.train()
    before = logged(tmp_path)

    again = make_trainer(blocks, tmp_path / "b", tracker=tracker, **options)
    again.load_checkpoint(str(tmp_path / "a" / "step_4"))
    again.train()
    assert_same_state(tmp_path / "a" / run_folder.LAST, tmp_path / "b" / run_folder.LAST)
    assert logged(tmp_path) == before


def test_checkpoints_of_another_run_are_kept(blocks, tmp_path, caplog):
    make_trainer(blocks, tmp_path, max_steps=8, save_every=2, eval_every=4).train()
    make_trainer(blocks, tmp_path, max_steps=3, save_every=1, keep_checkpoints=1).train()
    assert "holds another run" in caplog.text
    kept = {path.name for path in tmp_path.glob("step_*")}
    assert kept == {"step_00000003.pth", "step_00000006.pth", "step_00000008.pth"}


def test_time_limit_includes_earlier_sessions(blocks, tmp_path):
    trainer = make_trainer(blocks, tmp_path, max_steps=2)
    trainer.train()
    trainer.progress.seconds = 3600.0
    trainer.throughput.started -= 3600
    trainer.save_checkpoint("late.pth")
    resumed = make_trainer(blocks, tmp_path, max_training_hours=1.0, max_steps=9)
    resumed.load_checkpoint(str(tmp_path / "late.pth"))
    resumed.train()
    assert resumed.progress.step == 2
    assert resumed.stop_reason == "train.max_training_hours=1.0 reached"


def test_checkpoint_of_other_shape_is_refused(blocks, tmp_path):
    make_trainer(blocks, tmp_path, max_steps=1).train()
    other = make_trainer(blocks, tmp_path)
    other.model.config.num_heads = 4
    with pytest.raises(UserError, match="holds a model of another shape: num_heads=2, not 4"):
        other.load_checkpoint(str(tmp_path / run_folder.LAST))


# The compute plan


@pytest.mark.parametrize(
    "option", [*({"optimizer": name} for name in OPTIMIZERS), {"precision": "bf16"}, {"lr_schedule": "wsd"}], ids=str
)
def test_resumed_run_matches_uninterrupted_with(option, blocks, tmp_path):
    whole = make_trainer(blocks, tmp_path / "whole", max_steps=6, **option)
    whole.train()
    half = make_trainer(blocks, tmp_path / "parts", callbacks=[InterruptAt(3)], max_steps=6, log_every=1, **option)
    half.train()
    rest = make_trainer(blocks, tmp_path / "parts", max_steps=6, **option)
    rest.load_checkpoint(str(tmp_path / "parts" / "last.pth"))
    rest.train()
    assert all(torch.equal(weights(rest)[name], tensor) for name, tensor in weights(whole).items())


@pytest.mark.parametrize(("then", "today"), [(True, False), (False, True)])
def test_resumed_run_keeps_automatic_precision(then, today, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "computes_in_bf16", lambda device: then)
    first = make_trainer(blocks, tmp_path, max_steps=2, precision="auto", optimizer="muon")
    first.train()
    monkeypatch.setattr(device, "computes_in_bf16", lambda device: today)
    resumed = make_trainer(blocks, tmp_path, max_steps=4, precision="auto", optimizer="muon")
    assert resumed.plan.precision.name != first.plan.precision.name
    assert resumed.optimizer.parts[0].dtype != first.optimizer.parts[0].dtype
    resumed.load_checkpoint(str(tmp_path / "last.pth"))
    assert resumed.plan.precision.name == first.plan.precision.name == ("bf16" if then else "fp32")
    assert resumed.optimizer.parts[0].dtype == first.optimizer.parts[0].dtype == first.plan.precision.dtype
    explicit = make_trainer(blocks, tmp_path, max_steps=4, precision="bf16", optimizer="muon")
    explicit.load_checkpoint(str(tmp_path / "last.pth"))
    assert explicit.plan.precision.name == "bf16"


@pytest.mark.parametrize("then", onednn.LINEARS)
def test_resumed_run_keeps_linear_implementation(then, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "faster_linear", lambda: then)
    make_trainer(blocks, tmp_path, max_steps=2).train()
    for today in onednn.LINEARS:
        monkeypatch.setattr(compilation, "faster_linear", lambda today=today: today)
        resumed = make_trainer(blocks, tmp_path, max_steps=4)
        assert onednn.name_of(resumed.model.linear) == today
        resumed.load_checkpoint(str(tmp_path / "last.pth"))
        assert onednn.name_of(resumed.model.linear) == then


def test_deterministic_and_16_bit_runs_do_not_measure(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(
        compilation, "faster_linear", lambda: pytest.fail("a measurement may give another result each time")
    )
    monkeypatch.setattr(train, "make_deterministic", lambda: None)
    for option in ({"deterministic": True}, {"precision": "bf16"}):
        assert make_trainer(blocks, tmp_path, **option).model.linear is torch.nn.functional.linear


def test_other_optimizer_starts_without_state(blocks, tmp_path, caplog):
    make_trainer(blocks, tmp_path, max_steps=2).train()
    resumed = make_trainer(blocks, tmp_path, max_steps=4, optimizer="muon")
    resumed.load_checkpoint(str(tmp_path / "last.pth"))
    assert "starts without its state" in caplog.text
    resumed.train()
    assert resumed.progress.step == 4


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2, "gradient_checkpointing": True}], ids=str)
def test_compiled_run_matches_uncompiled(blocks, tmp_path, monkeypatch, caplog, options):
    """With smaller last batches, and nothing compiled in the second epoch. `aot_eager` needs no C++ compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="aot_eager", **options))
    plain, compiled = (
        make_trainer(blocks, tmp_path / str(option), batch_size=3, max_epochs=2, compile=option, **options)
        for option in (False, True)
    )
    plain.train()
    compiled.train_epoch()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled.train_epoch()
        assert compiled.validate() == pytest.approx(plain.progress.val_loss, abs=1e-5)
    assert isinstance(compiled.forward, Compiled)
    assert "Not compiled" not in caplog.text
    torch.compiler.reset()


def test_profile_lists_operations(blocks, tmp_path, caplog):
    trainer = make_trainer(blocks, tmp_path, callbacks=[StepProfiler(tmp_path)], max_steps=9)
    with caplog.at_level("INFO"):
        trainer.train()
    assert "Profile of 3 steps" in caplog.text
    assert "aten::addmm" in caplog.text or "mkldnn::" in caplog.text
    assert "nothing was recorded" not in caplog.text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("steps", [2, 6])  # before the profiler has started, and while it records
def test_run_too_short_for_profile_warns(blocks, tmp_path, caplog, steps):
    make_trainer(blocks, tmp_path, callbacks=[StepProfiler(tmp_path)], max_steps=steps).train()
    assert "at least 8 steps" in caplog.text
    assert not (tmp_path / "trace.json").exists()


def test_profile_that_cannot_be_written_is_a_warning(blocks, tmp_path, caplog):
    trainer = make_trainer(blocks, tmp_path, callbacks=[StepProfiler(tmp_path / "nowhere")], max_steps=9)
    with caplog.at_level("INFO"):
        trainer.train()
    assert trainer.progress.step == 9
    assert "nowhere/trace.json cannot be written" in caplog.text
    assert "written to" not in caplog.text


def test_a_trainer_on_a_cpu_keeps_freed_memory(blocks, tmp_path, monkeypatch):
    """The setting is that of `Trainer`, so it applies without the scripts too."""
    called = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: called.append(True))
    make_trainer(blocks, tmp_path)
    assert called
