"""The report of a study: table, CSV file, pictures."""

import csv
import math
import threading
from itertools import combinations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from gpt2.search import report
from gpt2.search.plots import evaluations, history, importances, slices

SPACE = {
    "train.learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "train.warmup_steps": IntDistribution(1, 100, log=True),
    "train.batch_size": CategoricalDistribution([4, 8]),
}


def study_of(count: int, direction: str = "minimize") -> optuna.Study:
    """Trials whose loss depends on the learning rate; every third is pruned, the last one failed."""
    study = optuna.create_study(study_name="s", direction=direction)
    for n in range(count):
        rate = 10 ** (-4 + 3 * ((n * 7) % count) / count)
        course = {k: 5 - 0.4 * k + (math.log10(rate) + 2.5) ** 2 for k in range(4)}
        params = {"train.learning_rate": rate, "train.warmup_steps": 1 + n % 90, "train.batch_size": 4 + 4 * (n % 2)}
        is_pruned, has_failed = n % 3 == 2, n == count - 1
        steps = {k: v for k, v in course.items() if k < 2} if is_pruned else course
        tokens = 25 * params["train.batch_size"]  # in a quarter of a trial
        study.add_trial(
            create_trial(
                state=TrialState.FAIL if has_failed else TrialState.PRUNED if is_pruned else TrialState.COMPLETE,
                value=None if has_failed else steps[max(steps)],
                params=params,
                distributions=SPACE,
                intermediate_values=steps,
                user_attrs={
                    "spent": {
                        "steps": 10 * len(steps),
                        "tokens": tokens * len(steps),
                        "seconds": 1.5,
                        "tokens_saved": 0 if has_failed else tokens * (len(course) - len(steps)),
                    },
                    "reason": "RuntimeError: a | b" if has_failed else None,
                },
            )
        )
    return study


def test_table_has_every_trial_and_the_best_first():
    study = study_of(12)
    header, _, *rows = report.table(study).splitlines()
    assert header.startswith("| trial | state | value | train.batch_size | train.learning_rate |")
    assert len(rows) == 12
    numbers = [int(row.split("|")[1]) for row in rows]
    assert numbers[0] == study.best_trial.number
    assert [row.split("|")[2].strip() for row in rows] == ["complete"] * 8 + ["pruned"] * 3 + ["failed"]
    assert r"a \| b" in rows[-1]
    assert all(row.count("|") - row.count(r"\|") == header.count("|") for row in rows)


def test_best_trial_of_a_maximized_study():
    study = study_of(12, "maximize")
    first = report.table(study).splitlines()[2]
    assert int(first.split("|")[1]) == study.best_trial.number
    assert study.best_value == max(trial.value for trial in study.trials if trial.state == TrialState.COMPLETE)


def test_summary_counts_the_tokens_that_pruning_saved():
    summary = report.summary(study_of(12))
    assert "12 trials: 8 complete, 3 pruned, 1 failed." in summary
    # Trials of 400 and of 800 tokens. Two small ones and a large one were pruned after one half; a large one failed.
    spent, spared = 4 * 400 + 4 * 800 + 2 * 200 + 400 + 400, 2 * 200 + 400
    assert (
        f"It trained on {spent:,} tokens; pruning saved {spared:,}, {spared / (spent + spared):.0%} of all." in summary
    )


def test_summary_of_one_trial_is_singular():
    assert report.summary(study_of(1)).startswith("1 trial: ")


def test_csv_has_all_values():
    study = study_of(6)
    rows = list(csv.DictReader(report.csv_of(study).splitlines()))
    for row, trial in zip(rows, study.trials, strict=True):
        assert float(row["train.learning_rate"]) == trial.params["train.learning_rate"]
        values = [float(row[f"evaluation {n + 1}"]) for n in trial.intermediate_values]
        assert values == list(trial.intermediate_values.values())
        assert (row["value"] == "") == (trial.value is None)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_report_has_a_picture_wherever_there_is_data(tmp_path, count):
    study = study_of(count)
    report.write(study, tmp_path)
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    expected = {0: set(), 1: set(), 2: {"evaluations", "history", "slices"}}
    assert pictures == expected.get(count, {"evaluations", "history", "slices", "importances"})
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    text = (tmp_path / "study.md").read_text()
    assert all(f"]({name}.png)" in text for name in pictures)
    assert ("importances.png needs 10 complete trials." in text) == ("importances" not in pictures)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_evaluations_show_every_trial_and_the_best(direction):
    study = study_of(40, direction)
    (axes,) = evaluations(study).axes
    with_value = [trial for trial in study.trials if trial.value is not None]
    pruned = [trial for trial in with_value if trial.state == TrialState.PRUNED]
    assert len(axes.lines) == len(with_value)
    assert sum(line.get_marker() == "x" for line in axes.lines) == len(pruned)
    labels = [text.get_text() for text in axes.texts]
    assert sorted(labels) == ["complete", "pruned", f"trial {study.best_trial.number}, the best"]
    low, high = axes.get_ylim()
    assert low < study.best_value < high


@pytest.mark.parametrize("count", [4, 40])
def test_labels_of_slices_do_not_overlap(count):
    study = study_of(count)
    for trial in study.trials[:-1]:  # panels for all kinds of distributions, and two rows of them
        trial.distributions |= {
            "model": CategoricalDistribution(["gpt2_nano", "gpt2_mini", "gpt2_medium", None]),
            "train.beta2": FloatDistribution(0.9, 0.999),
            "train.weight_decay": FloatDistribution(0.001, 0.3, log=True),
        }
        trial.params |= {"model": None, "train.beta2": 0.999, "train.weight_decay": 0.3 / (1 + trial.number)}
        study.add_trial(trial)
    figure = slices(study)
    figure.draw_without_rendering()
    boxes = []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        boxes += [label.get_window_extent() for label in labels if label.get_rotation() == 0]
        if axes.get_xlabel() == "train.warmup_steps":
            assert [label.get_text() for label in labels] == ["1", "10", "100"]
    assert len(boxes) > 10
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert len(figure.axes) == 6


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_history_has_the_best_value_so_far(direction):
    study = study_of(40, direction)
    (axes,) = history(study).axes
    dots, best = (list(line.get_ydata()) for line in axes.lines)
    choose = min if direction == "minimize" else max
    assert best == [choose(dots[: n + 1]) for n in range(len(dots))]
    assert best[-1] == study.best_value


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(("count", "is_shown"), [(4, True), (40, False)])
def test_only_the_worst_of_many_losses_are_outside_the_picture(direction, count, is_shown):
    study, worst = study_of(count, direction), 1e3 if direction == "minimize" else -1e3
    study.add_trial(create_trial(value=worst))
    low, high = history(study).axes[0].get_ylim()
    assert (low < worst < high) == is_shown
    assert low < study.best_value < high


def test_importances_are_sorted():
    (axes,) = importances(study_of(40)).axes
    shares = [bar.get_width() for bar in axes.patches]
    assert shares == sorted(shares) and sum(shares) == pytest.approx(1)


def test_report_of_the_process_that_ends_last_has_all_trials(tmp_path, monkeypatch):
    study, csv_of, others = study_of(3), report.csv_of, []

    def csv_while_another_process_ends(read: optuna.Study) -> str:
        content = csv_of(read)
        if not others:
            study.add_trial(study.trials[0])
            others.append(threading.Thread(target=report.write, args=(study, tmp_path)))
            others[0].start()
            others[0].join(0.5)  # without waiting it would end within this time
        return content

    monkeypatch.setattr(report, "csv_of", csv_while_another_process_ends)
    monkeypatch.setattr(report, "draw", lambda *_: {})
    report.write(study, tmp_path)
    others[0].join()
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 1 + 4
    assert "4 trials: " in (tmp_path / "study.md").read_text()
