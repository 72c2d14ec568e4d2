"""Plans of recorded studies."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.cli.compose import compose
from gpt2.cli.preflight import validate_command_line
from gpt2.errors import UserError
from gpt2.experiments.plan import PlannedRun, planned_runs, read_plan, validated_runs
from gpt2.experiments.results import OPENING
from gpt2.experiments.runner import RecordedStudy
from gpt2.runtime.repository import ROOT
from tests.analysis.test_compare import make_run
from tests.experiments.studies import PLAN, write_study

STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.yaml"))


def test_there_are_recorded_studies():
    assert {"learning_rate", "depth_or_width", "tokenizer"} <= {folder.name for folder in STUDIES}


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_recorded_study_composes_and_has_a_result_for_every_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without any of its runs
    (tmp_path / "input.txt").write_text("What a study may read that is not ours.")
    plan = read_plan(folder)
    validated_runs(replace(plan, seeds=plan.seeds[:1]), folder)  # other seeds compose like the first one
    with (folder / "results.csv").open() as file:
        rows = [(row["variant"], row["train.seed"]) for row in csv.DictReader(file)]
    runs = planned_runs(plan, folder.name)
    assert sorted(rows) == sorted((run.variant, str(run.values["train.seed"])) for run in runs)
    readme = (folder / "README.md").read_text()
    assert OPENING in readme
    assert f"python -m gpt2.main study experiments/{folder.name}" in readme


def test_planned_runs_are_all_combinations_seed_by_seed(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = RecordedStudy(folder).runs
    assert [run.name for run in runs[:5]] == [
        *("narrow learning_rate=0.001 seed=1", "narrow learning_rate=0.003 seed=1"),
        *("wide learning_rate=0.001 seed=1", "wide learning_rate=0.003 seed=1", "narrow learning_rate=0.001 seed=2"),
    ]
    assert runs[0].arguments == [
        *("+tiny=narrow", "train.learning_rate=0.001", "train.seed=1", "train.auto_resume=true"),
        "hydra.run.dir='outputs/studies/tiny/narrow,learning_rate=0.001,seed=1'",
    ]
    assert len({run.folder for run in runs}) == 8


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ("variants: [a", "study.yaml: while parsing"),
        ("variant: [narrow]", "study.yaml: variant: there is no such key; there are variants, sweep, seeds"),
        ("variants: [narow]", "there is no narow.yaml beside it"),
        ("variants: [narrow]\nmetric: lss", "metric: 'lss' is none of loss, best"),
        ("variants: [narrow]\nseeds: []", "need at least one value"),
        ("variants: [narrow]\nseeds: [1, 1]", "a run is planned twice"),
        ("", "expected `key: value` lines"),
        ("[1]", "expected `key: value` lines"),
        ("variants: narrow", "study.yaml: variants: 'narrow' is not a list"),
        ("variants: {narrow: 1}", "study.yaml: variants: {'narrow': 1} is not a list"),
        ("variants: [[narrow]]", "study.yaml: variants: ['narrow'] is not a text"),
        ("variants: [narrow]\nsweep: [a]", "study.yaml: sweep: ['a'] is not a group of keys and values"),
        ("variants: [narrow]\nsweep: {train.seed: 3}", "study.yaml: sweep: 3 is not a list"),
        ("variants: [narrow]\nseeds: 1", "study.yaml: seeds: 1 is not a list"),
        ("variants: [narrow]\nseeds: [a]", "study.yaml: seeds: 'a' is not a whole number"),
        ("seeds: {a: 1}\nmetric: [a]", "is not a list\noutputs/sweeps/tiny/study.yaml: metric: ['a'] is not a text"),
        ("variants: [narrow]\nx: nonsense", "x: there is no nonsense to draw by"),
        ("variants: [narrow]\nlines: loss", "lines: there is no loss to draw by"),
        ("variants: [narrow]\npanels: loss", "panels: there is no loss to draw by"),
        (
            "variants: [narrow, wide]\nx: train.max_steps\nlines: train.max_steps",
            "do not distinguish all runs; sweep one key, or use lines: v",
        ),
        (
            "variants: [narrow, wide]\nlines: train.seed",
            "lines: results are means over the seeds, so train.seed is no key to draw by",
        ),
        (
            "variants: [narrow]\nsweep: {train.beta1: [0.8, 0.9], train.beta2: [0.9, 0.95]}\nx: train.beta1",
            "sweep one key",
        ),
        ("variants: [narrow]\nsweep: {train.lr: [1]}", "sweep: train.lr=1: Key 'lr' not in 'TrainingConfig'"),
        ("variants: [narrow]\nsweep: {model.num_heads: [4, 5]}", "num_heads=5 seed=1: model.num_heads: 5 heads"),
        ("sweep: {train.lr: [1]}", "study.yaml: variants: missing"),
    ],
)
def test_problem_of_a_plan_is_reported_before_any_run(tmp_path, monkeypatch, plan, problem):
    write_study(tmp_path, plan)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        RecordedStudy(Path("outputs/sweeps/tiny"))
    assert problem in str(refused.value)
    assert not (tmp_path / "outputs" / "studies").exists()


def test_preset_without_its_package_is_refused_with_the_missing_line(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    preset = folder / "narrow.yaml"
    preset.write_text(preset.read_text().replace("# @package _global_\n", ""))
    message = "tiny/narrow.yaml needs the line `# @package _global_`, because it sets keys of other groups"
    with pytest.raises(UserError, match=f"narrow.yaml: {message}$"):
        RecordedStudy(folder)
    assert validate_command_line("train", ["+tiny=narrow"]) == [f"+tiny=narrow: {message}"]


def test_example_of_the_page_about_studies_is_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "sweeps" / "heads"
    folder.mkdir(parents=True)
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "experiments" / "README.md").read_text(), re.DOTALL):
        (name,) = re.findall(r"# experiments/heads/(\w+.yaml)", block)
        (folder / name).write_text(block)
    (folder / "four.yaml").write_text((folder / "one.yaml").read_text().replace("num_heads: 1", "num_heads: 4"))
    heads = [config.model.num_heads for config in RecordedStudy(folder).configs.values()]
    assert heads == [1, 1, 4, 4] * 2


def test_problem_of_many_runs_is_reported_once(tmp_path, monkeypatch):
    folder = write_study(tmp_path, PLAN.replace("sweep: {", "sweep: {train.batch_size: [0], "))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        RecordedStudy(folder)
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        f"{variant} batch_size=0 learning_rate=0.001 seed=1" for variant in ("narrow", "wide")
    ]


def test_study_outside_the_search_path_is_refused(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path / "outputs")
    with pytest.raises(UserError, match="presets are found"):
        RecordedStudy(folder)


def test_runs_of_an_earlier_plan_are_refused(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    run, other = RecordedStudy(folder).runs[:2]
    for each in (run, other):
        make_run(each.folder, **{"train.max_steps": 9, "train.precision": "fp32", "inference.precision": "fp32"})
    about = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**about, "machine": {"precision": "bf16"}}))
    with pytest.raises(
        UserError, match=r"seed=1 and 1 more: started with train.max_steps=9, the study now has 8;"
    ) as refused:
        RecordedStudy(folder)
    assert "precision" not in str(refused.value)  # chosen by the machine


def test_plan_is_data(tmp_path):
    plan = read_plan(write_study(tmp_path, PLAN.replace("[1e-3, 3e-3]", "['${oc.env:HOME}', '${x}']")))
    assert plan.sweep == {"train.learning_rate": ["${oc.env:HOME}", "${x}"]}
    arguments = PlannedRun("tiny", "narrow", {"sample_prompt": "${oc.env:HOME}"}).overrides[1:]
    assert compose("train", arguments).sample_prompt == "${oc.env:HOME}"


def test_numbers_in_scientific_notation(tmp_path):
    assert read_plan(write_study(tmp_path)).sweep == {"train.learning_rate": [0.001, 0.003]}
