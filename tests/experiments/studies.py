"""Studies of tiny models for the tests of recorded studies."""

from pathlib import Path

import yaml

from gpt2.experiments.plan import PlannedRun, planned_runs, read_plan
from gpt2.experiments.results import Results, recorded
from tests.analysis.test_compare import make_run
from tests.conftest import TEXT, TINY

PLAN = """
variants: [narrow, wide]
sweep: {train.learning_rate: [1e-3, 3e-3]}
seeds: [1, 2]
x: train.learning_rate
lines: model.d_model
"""


def write_study(folder: Path, plan: str = PLAN) -> Path:
    """Write a study of tiny models into a folder of the search path for presets."""
    study = folder / "outputs" / "sweeps" / "tiny"
    study.mkdir(parents=True)
    (folder / "corpus.txt").write_text(TEXT)
    groups = {key: value for key, value in (word.split("=") for word in TINY) if "." not in key}
    values: dict = {"name": "tiny"}
    for key, value in (word.split("=") for word in TINY if "." in word.split("=")[0]):
        group, name = key.split(".")
        values.setdefault(group, {})[name] = yaml.safe_load(value)
    defaults = {"defaults": [{f"override /{group}": choice} for group, choice in groups.items()]}
    (study / "_base.yaml").write_text("# @package _global_\n" + yaml.safe_dump({**defaults, **values}))
    for name, width in (("narrow", 16), ("wide", 32)):
        own = {"defaults": ["_base"], "model": {"d_model": width}}
        (study / f"{name}.yaml").write_text("# @package _global_\n" + yaml.safe_dump(own))
    (study / "study.yaml").write_text(plan)
    return study


def finished(folder: Path, monkeypatch, plan: str = PLAN) -> tuple[Results, list[PlannedRun]]:
    """Results of a finished study, whose loss depends on learning rate, width and seed."""
    study = write_study(folder, plan)
    monkeypatch.chdir(folder)
    runs = planned_runs(read_plan(study), "tiny")
    for run in runs:
        rate, seed = run.values.get("train.learning_rate", 1e-3), run.values["train.seed"]
        width = {"narrow": 16, "wide": 32}[run.variant]
        loss = round(2 - 100 * rate + seed / 10 + width / 100, 4)
        config = {"model.d_model": width, "train.learning_rate": rate, "train.seed": seed}
        make_run(run.folder, (3.0, loss), "diverged" if rate > 0.1 else "finished", **config)
    return results_of(study, runs), runs


def results_of(study: Path, runs: list[PlannedRun]) -> Results:
    plan = read_plan(study)
    return Results(study, plan, recorded(plan, runs))
