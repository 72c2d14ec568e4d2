"""The cost of a recorded study."""

import shutil
from math import isnan

import pytest

from gpt2.experiments.cost import SECONDS_BESIDE, StudyCost
from gpt2.experiments.runner import RecordedStudy, StudyProgress
from tests.analysis.test_compare import make_run
from tests.conftest import Workspace
from tests.experiments.studies import write_study

PLAN = """
variants: [narrow, wide]
sweep: {train.max_steps: [8, 80]}
x: train.max_steps
"""


@pytest.fixture
def study(tmp_path, monkeypatch) -> RecordedStudy:
    folder = write_study(tmp_path, PLAN)
    monkeypatch.chdir(tmp_path)
    return RecordedStudy(folder)


def logged(run, steps: int, seconds: float, state: str = "running") -> None:
    shutil.rmtree(run.folder, ignore_errors=True)
    make_run(run.folder, (), state)
    (run.folder / "metrics.jsonl").write_text(f'{{"step": {steps}, "tokens": 1, "seconds": {seconds}}}\n')


def test_runs_count_by_their_flops(study):
    cost = StudyCost(study.configs)
    short, long, *wide = cost.flops.values()
    assert long == pytest.approx(10 * short)
    assert wide[0] > short
    assert cost.share_done == 0
    assert isnan(cost.seconds_left(jobs=2))  # before any measurement
    logged(study.runs[1], 40, 20)
    cost.update(study.runs[1])
    assert cost.share_done == pytest.approx(long / 2 / sum(cost.flops.values()))
    logged(study.runs[0], 8, 4, "finished")
    assert StudyCost(study.configs).share_done == pytest.approx((short + long / 2) / sum(cost.flops.values()))


def test_time_left_is_that_of_the_flops_left(study):
    logged(study.runs[0], 8, 4, "finished")
    logged(study.runs[1], 40, 20)  # narrow: half a second per step
    logged(study.runs[2], 8, 8, "finished")  # wide: a second
    cost = StudyCost(study.configs)
    seconds = [20 + SECONDS_BESIDE, 80 + SECONDS_BESIDE]
    assert cost.seconds_left(jobs=1) == pytest.approx(sum(seconds))
    assert cost.seconds_left(jobs=2) == pytest.approx(max(seconds))  # one run is not split over jobs
    logged(study.runs[2], 2, 2, "diverged")
    assert StudyCost(study.configs).left[study.runs[2]] == 0
    (study.runs[2].folder / "metrics.jsonl").write_text("damaged")
    assert StudyCost(study.configs).share_done < cost.share_done  # it counts as missing


def test_size_without_runs_is_measured(study):
    logged(study.runs[0], 8, 4, "finished")
    logged(study.runs[3], 0, 1)  # only an evaluation before the first step
    cost = StudyCost(study.configs)
    narrow, wide = (cost.kinds[run] for run in study.runs[::2])
    assert cost.seconds_per_flop(wide) == pytest.approx(cost.seconds_per_flop(narrow) * 5 / 4)
    shutil.rmtree(study.runs[3].folder)
    cost = StudyCost(study.configs)
    cost.measure(threads=1)
    assert set(cost.measured) == {wide}
    assert cost.seconds_per_flop(wide) == cost.measured[wide]


def test_time_left_is_known_before_the_first_run_ends(study):
    progress = StudyProgress(study.configs, jobs=1)
    progress.measure(threads=1)
    assert progress.cost.measured.keys() == set(progress.cost.kinds.values())
    assert progress.cost.seconds_left(jobs=1) > 4 * SECONDS_BESIDE


def test_runs_that_end_together_are_counted_one_by_one(study, caplog):
    progress = StudyProgress(study.configs, jobs=2)
    for run in study.runs[:2]:
        logged(run, 8, 4, "finished")
        progress.cost.update(run)
    with caplog.at_level("INFO"):
        for run in study.runs[:2]:
            progress.count(run, "a line")
    assert [line.split("  a line")[0].strip() for line in caplog.messages] == ["1 of 4", "2 of 4"]


def test_optimizers_differ_in_speed(tmp_path, monkeypatch):
    plan = "variants: [narrow]\nsweep: {train.optimizer: [adamw, muon]}\nseeds: [1, 2]\nx: train.optimizer"
    folder = write_study(tmp_path, plan)
    monkeypatch.chdir(tmp_path)
    study = RecordedStudy(folder)
    logged(study.runs[0], 8, 4, "finished")
    logged(study.runs[1], 8, 8, "finished")
    cost = StudyCost(study.configs)
    assert cost.seconds_left(jobs=1) == pytest.approx(4 + 8 + 2 * SECONDS_BESIDE)
    assert cost.seconds_left(jobs=2) == pytest.approx(8 + SECONDS_BESIDE)


def test_plan_counts_missing_runs_within_the_time_limit_of_a_run(tmp_path, monkeypatch):
    key = "train.max_training_hours"
    folder = write_study(tmp_path, f"variants: [narrow]\nsweep: {{{key}: [1e-3, 1]}}\nseeds: [1, 2]\nx: {key}")
    monkeypatch.chdir(tmp_path)
    study = RecordedStudy(folder)
    logged(study.runs[1], 8, 4, "finished")
    logged(study.runs[2], 4, 3)
    cost = StudyCost(study.configs)
    assert cost.seconds_left(1) == pytest.approx(3.6 + 0.6 + 56 / 12 + 3 * SECONDS_BESIDE)
    (row,) = [line.split() for line in cost.plan(1).splitlines() if line.startswith("narrow")]
    assert row[1:4] == ["4", "1", f"{20 * 4 * 32:,}"]
    assert row[5] == "0:21"
    assert "about 0:21 for the missing runs" in cost.plan(1)


def test_plan_prints_the_missing_runs_and_starts_nothing(workspace: Workspace):
    folder = write_study(workspace.folder, PLAN)
    before = sorted(folder.iterdir())
    done = workspace.module("gpt2.main", "study", "outputs/sweeps/tiny", "--plan", "jobs=2", "threads=1")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["Study", "tiny:", "4", "runs"]
    tokens = 88 * 4 * 32
    assert ["narrow", "2", "0", f"{tokens:,}"] in [line[:4] for line in lines]
    assert ["all", "4", "0", f"{2 * tokens:,}"] in [line[:4] for line in lines]
    assert "2 at a time, 1 thread each, at a low priority (nice 10)" in done.stdout
    assert "Measuring the speed of 2 kinds of runs" in done.stdout
    assert "by a step measured alone, without evaluations" in done.stdout
    assert "Disk    at most" in done.stdout
    assert sorted(folder.iterdir()) == before
    assert not (workspace.folder / "outputs" / "studies").exists()


def test_plan_reports_every_problem_of_a_run(workspace: Workspace):
    write_study(workspace.folder, PLAN.replace("[8, 80]", "[8, -1]"))
    done = workspace.module("gpt2.main", "study", "outputs/sweeps/tiny", "--plan")
    assert done.returncode == 2
    assert "train.max_steps" in done.stderr
