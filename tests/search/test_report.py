"""What a study has found: the table, the file for spreadsheets, the pictures."""

import csv
import math

import optuna
import pytest
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from gpt2.search import report
from gpt2.search.plots import PICTURES, draw

SPACE = {
    "train.learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "train.warmup_steps": IntDistribution(1, 100),
    "train.batch_size": CategoricalDistribution([4, 8]),
}


def study_of(count: int, direction: str = "minimize") -> optuna.Study:
    """Trials whose loss depends on the learning rate; every third is pruned, the last one has failed."""
    study = optuna.create_study(study_name="s", direction=direction)
    for n in range(count):
        rate = 10 ** (-4 + 3 * ((n * 7) % count) / count)
        course = {k: 5 - 0.4 * k + (math.log10(rate) + 2.5) ** 2 for k in range(4)}
        params = {"train.learning_rate": rate, "train.warmup_steps": 1 + n % 90, "train.batch_size": 4 + 4 * (n % 2)}
        is_pruned, has_failed = n % 3 == 2, n == count - 1
        steps = {k: v for k, v in course.items() if k < 2} if is_pruned else course
        study.add_trial(
            create_trial(
                state=TrialState.FAIL if has_failed else TrialState.PRUNED if is_pruned else TrialState.COMPLETE,
                value=None if has_failed else steps[max(steps)],
                params=params,
                distributions=SPACE,
                intermediate_values=steps,
                user_attrs={
                    "spent": {"steps": 10 * len(steps), "tokens": 100 * len(steps), "seconds": 1.5},
                    "reason": "RuntimeError: a | b" if has_failed else None,
                },
            )
        )
    return study


def test_the_table_has_every_trial_the_best_first():
    study = study_of(12)
    header, _, *rows = report.table(study).splitlines()
    assert header.startswith("| trial | state | value | train.batch_size | train.learning_rate |")
    assert len(rows) == 12
    numbers = [int(row.split("|")[1]) for row in rows]
    assert numbers[0] == study.best_trial.number
    assert [row.split("|")[2].strip() for row in rows] == ["complete"] * 8 + ["pruned"] * 3 + ["failed"]
    assert r"a \| b" in rows[-1]
    assert all(row.count("|") - row.count(r"\|") == header.count("|") for row in rows)


def test_the_best_of_a_study_that_maximizes_is_the_largest():
    study = study_of(12, "maximize")
    first = report.table(study).splitlines()[2]
    assert int(first.split("|")[1]) == study.best_trial.number
    assert study.best_value == max(trial.value for trial in study.trials if trial.state == TrialState.COMPLETE)


def test_the_summary_tells_what_pruning_spared():
    summary = report.summary(study_of(12))
    assert "12 trials: 8 complete, 3 pruned, 1 failed." in summary
    spent, spared = 8 * 400 + 4 * 200, 3 * 200
    assert (
        f"It trained on {spent:,} tokens; pruning saved {spared:,}, {spared / (spent + spared):.0%} of all." in summary
    )


def test_the_file_for_spreadsheets_has_what_the_study_has():
    study = study_of(6)
    rows = list(csv.DictReader(report.csv_of(study).splitlines()))
    for row, trial in zip(rows, study.trials, strict=True):
        assert float(row["train.learning_rate"]) == trial.params["train.learning_rate"]
        values = [float(row[f"evaluation {n + 1}"]) for n in trial.intermediate_values]
        assert values == list(trial.intermediate_values.values())
        assert (row["value"] == "") == (trial.value is None)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_there_is_a_picture_of_whatever_there_is(tmp_path, count):
    study = study_of(count)
    report.write(study, tmp_path)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == (set() if count < 2 else PICTURES.keys() - ({"importances.png"} if count < 40 else set()))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    text = (tmp_path / "study.md").read_text()
    assert all(f"]({name})" in text for name in pictures)


def test_the_pictures_show_every_trial_and_the_best():
    study = study_of(40)
    figure = PICTURES["evaluations.png"](study)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    with_value = [trial for trial in study.trials if trial.value is not None]
    pruned = [trial for trial in with_value if trial.state == TrialState.PRUNED]
    assert len(axes.lines) == len(with_value) + len(pruned)  # a cross where a trial was pruned
    assert f"trial {study.best_trial.number}, the best" in [text.get_text() for text in axes.get_legend().get_texts()]
    low, high = axes.get_ylim()
    assert low < study.best_value < high
    slices = PICTURES["slices.png"](study)
    assert [axes.get_xlabel() for axes in slices.axes if axes.get_visible()] == sorted(SPACE)
    assert [axes.get_xscale() for axes in slices.axes[:3]] == ["linear", "log", "linear"]


def test_what_matters_is_found():
    figure = PICTURES["importances.png"](study_of(40))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[-1] == "train.learning_rate"  # the longest bar is on top


def test_a_study_in_which_all_is_equal_has_no_importances():
    study = optuna.create_study()
    for n in range(20):
        study.add_trial(
            create_trial(
                value=1.0,
                params={"train.warmup_steps": n + 1},
                distributions={"train.warmup_steps": IntDistribution(1, 100)},
            )
        )
    assert "importances.png" not in draw(study)
