"""Resuming a run: the note about a higher learning rate, and which evaluation is the best."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

import tests.test_train as training
from gpt2 import train
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.config import PARAMETRIZATION, SHAPE
from gpt2.errors import UserError
from gpt2.evaluate import Score
from gpt2.training.optimizer import learning_rate
from gpt2.training.state import Progress, check_compatible, restored_progress
from tests.helpers import tiny_config
from tests.test_train import make_trainer

blocks = training.blocks  # the fixture
RAISED = "Changed: the learning rate of the next step is"


def resume(blocks, folder, caplog, name: str = run_folder.LAST, **options) -> tuple[train.Trainer, str]:
    """A Trainer that resumes a checkpoint, and its log."""
    caplog.clear()
    trainer = make_trainer(blocks, folder, **{"learning_rate": 1e-3, **options})
    with caplog.at_level("INFO"):
        trainer.load_checkpoint(str(folder / name))
    return trainer, caplog.text


def test_note_about_a_learning_rate_raised_by_a_longer_schedule(blocks, tmp_path, caplog):
    """A run of 17 steps is extended to 25."""
    options = {"learning_rate": 1e-3, "warmup_steps": 1, "save_every": 10, "eval_every": 99}
    trainer = make_trainer(blocks, tmp_path, max_steps=17, **options)
    trainer.train()
    before, after = (learning_rate(step, n, trainer.config) for step, n in ((16, 17), (17, 25)))
    assert trainer.progress.learning_rate == before

    _, text = resume(blocks, tmp_path, caplog, max_steps=25, **options)
    assert "Changed: train.max_steps is 25, it was 17" in text
    assert f"{RAISED} {after:.2e}, it was {before:.2e}. To keep it: train.learning_rate={before:.2e}" in text
    assert after == pytest.approx(3.25e-4)
    for kept in ({"max_steps": 17}, {"max_steps": 25, "learning_rate": before, "min_learning_rate": before}):
        resumed, text = resume(blocks, tmp_path, caplog, **{**options, **kept})
        assert RAISED not in text
    resumed.train()
    assert resumed.progress.learning_rate == pytest.approx(before)
    resumed, text = resume(blocks, tmp_path, caplog, max_steps=40, max_training_hours=1e-9, **options)
    assert resumed.progress.limits_reached(resumed.config) == ["train.max_training_hours=1e-09"]
    assert RAISED not in text  # there is no next step
    _, text = resume(blocks, tmp_path, caplog, max_epochs=20, **{**options, "max_steps": None})
    assert RAISED in text


def test_with_wsd_a_run_is_made_longer_at_the_same_rate_until_its_decay(blocks, tmp_path, caplog):
    options = {"lr_schedule": "wsd", "decay_fraction": 0.5, "save_every": 10, "eval_every": 99, "learning_rate": 1e-3}
    make_trainer(blocks, tmp_path, max_steps=20, **options).train()
    resumed, text = resume(blocks, tmp_path, caplog, run_folder.step_name(10), max_steps=40, **options)
    assert RAISED not in text
    assert resumed.progress.learning_rate == learning_rate(10, 40, resumed.config) == 1e-3
    _, text = resume(blocks, tmp_path, caplog, max_steps=100, **options)
    assert f"{RAISED} 1.00e-03, it was 1.90e-04" in text


def test_no_note_during_warmup(blocks, tmp_path, caplog):
    make_trainer(blocks, tmp_path, max_steps=2, warmup_steps=8).train()
    for longer in ({"max_steps": 2}, {"max_steps": 9}):
        _, text = resume(blocks, tmp_path, caplog, warmup_steps=8, learning_rate=1e-2, **longer)
        assert RAISED not in text


def test_bound_on_the_rate_of_adafactor_is_recorded_and_no_change(blocks, tmp_path, caplog):
    settings = {"optimizer": "adafactor", "learning_rate": 1.0, "min_learning_rate": 0.9, "warmup_steps": 0}
    trainer = make_trainer(blocks, tmp_path, max_steps=4, **settings)
    trainer.train()
    assert trainer.progress.learning_rate == 0.5
    _, text = resume(blocks, tmp_path, caplog, max_steps=6, **settings)
    assert RAISED not in text


def test_of_equal_evaluations_the_first_is_the_best(blocks, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train, "score", lambda *_: Score(2.0, 1))
    trainer = make_trainer(blocks, tmp_path, max_steps=3, eval_every=1, save_every=99, keep_checkpoints=9)
    with caplog.at_level("INFO"):
        trainer.train()
    assert caplog.text.count("(best so far)") == 1
    assert checkpoint.read_record(tmp_path / run_folder.BEST)["progress"]["step"] == 1
    saved = [run_folder.step_of(path) for path in sorted(tmp_path.glob("step_*"))]
    assert saved == [1, 3]  # the best and the last


SAVED = {"data": "a", "model": asdict(tiny_config()), "train": {"batch_size": 4}}
SAVED["progress"] = asdict(Progress(step=7, epoch=1, position=3))


@pytest.mark.parametrize(
    ("data", "batch_size", "position"),
    [("a", 4, 3), ("a", 6, 2), ("a", 5, 2), ("a", 1, 12), ("a", 13, 0), ("b", 4, 0)],
)
def test_the_position_is_the_same_block_in_other_batches_and_the_start_in_other_data(data, batch_size, position):
    progress = restored_progress(SAVED, {"data": data, "train": {"batch_size": batch_size}})
    assert progress == Progress(step=7, epoch=1, position=position)


def test_other_data_needs_consent_and_another_shape_is_refused():
    check_compatible(Path("x"), SAVED, SAVED, accept_other_data=False)
    check_compatible(Path("x"), SAVED, {**SAVED, "data": "b"}, accept_other_data=True)
    with pytest.raises(UserError, match=r"x was trained on other data \(fingerprint a, not b\)"):
        check_compatible(Path("x"), SAVED, {**SAVED, "data": "b"}, accept_other_data=False)
    for key in SHAPE:
        other = {**SAVED, "model": {**SAVED["model"], key: 7}}
        with pytest.raises(UserError, match=f"another shape: {key}={SAVED['model'][key]}, not 7"):
            check_compatible(Path("x"), SAVED, other, accept_other_data=True)


def test_another_activation_is_refused():
    other = {**SAVED, "model": {**SAVED["model"], "activation": "gelu"}}
    with pytest.raises(UserError, match="another activation: activation=gelu_new, not gelu"):
        check_compatible(Path("x"), SAVED, other, accept_other_data=True)


def test_another_parametrization_is_refused_and_the_base_counts_only_with_mup():
    mup = {**SAVED, "model": {**SAVED["model"], "parametrization": "mup"}}
    for key in PARAMETRIZATION:
        other = {**mup, "model": {**mup["model"], key: "mup" if key == "parametrization" else 7}}
        saved = SAVED if key == "parametrization" else mup
        with pytest.raises(UserError, match=f"another parametrization: {key}={saved['model'][key]}, not"):
            check_compatible(Path("x"), saved, other, accept_other_data=False)
    check_compatible(Path("x"), SAVED, {**SAVED, "model": {**SAVED["model"], "mup_base_width": 7}}, False)


def test_the_end_of_an_epoch_is_position_0_of_the_next():
    progress = Progress(step=0, position=2)
    progress.advance(2, batches_per_epoch=5, tokens=7)
    assert progress == Progress(step=1, epoch=0, position=4, tokens=7)
    progress.advance(1, batches_per_epoch=5, tokens=3)
    assert progress == Progress(step=2, epoch=1, position=0, tokens=10)


def test_only_time_may_differ_between_a_run_and_its_checkpoint():
    progress = Progress(step=3, seconds=1.0)
    assert progress.same_but_time(replace(progress, seconds=2.0))
    assert not progress.same_but_time(replace(progress, step=4))
    assert not progress.same_but_time(None)
