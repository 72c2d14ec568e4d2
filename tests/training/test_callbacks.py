"""The calls of a Trainer's callbacks, and the effects of the callbacks that the scripts use."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest

import tests.test_train as training
from gpt2.checkpoint import format as checkpoint
from gpt2.config import TrainingConfig
from gpt2.tracking.tracker import Tracker, read_metrics
from gpt2.training import callbacks as module
from gpt2.training.callbacks import Callback, ConsoleLog, Samples, TrackerLog, seconds_left
from gpt2.training.state import Progress
from tests.test_train import make_trainer

blocks = training.blocks  # the fixture
HOOKS = [name for name in vars(Callback) if not name.startswith("_") and "state_dict" not in name]


class Recorder(Callback):
    """Records the calls of all hooks with the step."""

    def __init__(self):
        self.calls = []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, *_, hook=hook: self.calls.append((hook, trainer.progress.step)))


def test_hooks_are_called_in_order(blocks, tmp_path):
    recorder = Recorder()
    make_trainer(blocks, tmp_path, callbacks=[recorder], max_steps=2, log_every=2, eval_batches=1).train()
    evaluation = ["on_validation_batch", "extend_evaluation", "on_log", "before_checkpoint", "on_checkpoint"]
    assert recorder.calls == [
        ("on_train_start", 0),
        ("on_step_end", 1),
        ("on_log", 1),  # the first step is always logged
        ("on_step_end", 2),
        ("on_log", 2),
        *((hook, 2) for hook in [*evaluation, "on_evaluation_end", "on_train_end"]),
    ]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "on_exception"])
def test_an_exception_of_a_callback_ends_training(blocks, tmp_path, hook):
    def fail(trainer, *_):
        raise ZeroDivisionError(hook)

    failing, recorder = Callback(), Recorder()
    setattr(failing, hook, fail)
    trainer = make_trainer(blocks, tmp_path, callbacks=[recorder, failing], max_steps=2, eval_batches=1)
    with pytest.raises(ZeroDivisionError, match=hook):
        trainer.train()
    if hook != "on_train_end":
        assert recorder.calls[-1][0] == "on_exception"


def test_an_interrupted_evaluation_is_discarded(blocks, tmp_path):
    def write(step):
        os.kill(os.getpid(), signal.SIGINT)
        yield "text"
        raise AssertionError("a sample ends when a signal arrives")

    recorder = Recorder()
    trainer = make_trainer(blocks, tmp_path, callbacks=[Samples(write), recorder], max_steps=2, eval_batches=1)
    trainer.train()
    assert trainer.interrupted_by == signal.SIGINT
    assert (trainer.progress.step, trainer.progress.evaluated_at) == (2, 0)
    assert "on_evaluation_end" not in dict(recorder.calls)


def test_sample_and_state_are_recorded(blocks, tmp_path):
    class WithState(Callback):
        def state_dict(self):
            return {"mine": 7}

    callbacks = [Samples(lambda step: f"step {step}"), TrackerLog(Tracker(tmp_path)), WithState()]
    make_trainer(blocks, tmp_path, callbacks=callbacks, max_steps=2).train()
    assert [record.get("sample") for record in read_metrics(tmp_path / "metrics.jsonl")] == [None, "step 2"]
    assert checkpoint.read_record(tmp_path / "last.pth")["mine"] == 7


def test_console_log_is_added_once(blocks, tmp_path):
    assert [type(callback) for callback in make_trainer(blocks, tmp_path).callbacks] == [ConsoleLog]
    mine = ConsoleLog("trial 3")
    assert make_trainer(blocks, tmp_path, callbacks=[mine]).callbacks == [mine]


def test_samples_are_logged_without_escape_sequences(blocks, tmp_path, caplog):
    caplog.set_level("INFO")
    make_trainer(blocks, tmp_path, callbacks=[Samples(lambda step: "a\x1b[2Jb\nc")], max_steps=1).train()
    assert "    | a\ufffd[2Jb\n    | c" in caplog.text


def test_training_from_python_prints_its_progress(blocks, tmp_path, capsys, monkeypatch):
    for logger in (logging.root, logging.getLogger("gpt2")):  # other tests may have configured them
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    make_trainer(blocks, tmp_path, max_steps=2, log_every=1, eval_batches=1).train()
    starts = ["step 1/2  loss ", "step 2/2  loss ", "step 2  validation loss "]
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert ["left" in line for line in lines] == [False, True, False]  # the first step is slower than the others


def test_progress_line_shows_the_step_and_what_happens(blocks, tmp_path):
    console, shown = ConsoleLog(), []

    class Watch(Callback):
        def on_step_end(self, trainer):
            (task,) = console.progress_line.progress.tasks
            shown.append((task.completed, task.total))

    trainer = make_trainer(blocks, tmp_path, callbacks=[console, Watch()], max_steps=3, log_every=1, eval_batches=2)
    trainer.train()
    assert shown == [(1, 3), (2, 3), (3, 3)]
    (task,) = console.progress_line.progress.tasks
    assert task.fields["figures"] == "validating 1/2"
    console.on_log(trainer, {"step": 2, "train/loss": 1.25, "train/tokens_per_second": 9e3, **ZEROS})
    assert task.fields["figures"].startswith("loss 1.250  9,000 tokens/s  ")


ZEROS = {"train/learning_rate": 0.0, "train/grad_norm": 0.0}


def test_a_long_validation_logs_a_line_now_and_then(monkeypatch, caplog):
    clock = iter([100.0, 109.9, 110.1, 120.0, 121.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    console = ConsoleLog()
    with caplog.at_level("INFO"):
        for batch in range(5):
            console.on_validation_batch(None, batch, 2000)
    assert caplog.messages == ["validating: batch 2 of 2,000", "validating: batch 4 of 2,000"]


@pytest.mark.parametrize(
    ("hours", "progress", "left"),
    [
        (1.0, Progress(step=10, seconds=20.0), 60.0),
        (0.02, Progress(step=10, seconds=20.0), 52.0),  # the time limit comes first
        (1.0, Progress(step=1, seconds=2.0), 78.0),
        (1.0, Progress(step=0, seconds=2.0), 80.0),
        (0.001, Progress(step=1, seconds=9.0), 0.0),  # the limit is exceeded
    ],
)
def test_time_left(hours, progress, left):
    trainer = SimpleNamespace(progress=progress, total_steps=40, config=TrainingConfig(max_training_hours=hours))
    assert seconds_left(trainer) == pytest.approx(left)
