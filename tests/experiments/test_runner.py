"""Recorded studies: plans, runs and results."""

import csv
import json
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from gpt2.cli.compose import ROOT, compose
from gpt2.cli.preflight import validate_command_line
from gpt2.errors import UserError
from gpt2.experiments import runner
from gpt2.experiments.plan import PlannedRun, planned_runs, read_plan
from gpt2.experiments.results import CLOSING, OPENING, Results, recorded, redraw, rows_of, with_section
from gpt2.experiments.runner import RecordedStudy, RunProcess, default_jobs, default_threads, print_plan, run_study
from gpt2.runtime import device
from tests.analysis.test_compare import make_run
from tests.conftest import TEXT, TINY, Workspace

STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.yaml"))
PLAN = """
variants: [narrow, wide]
sweep: {train.learning_rate: [1e-3, 3e-3]}
seeds: [1, 2]
x: train.learning_rate
lines: model.d_model
"""


def write_study(folder: Path, plan: str = PLAN) -> Path:
    """A study of tiny models, in a folder where presets are found."""
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
    """Results of runs as a finished study has them: the loss depends on learning rate, width and seed."""
    study = write_study(folder, plan)
    monkeypatch.chdir(folder)
    runs = planned_runs(read_plan(study), "tiny")
    for run in runs:
        rate, seed = run.values["train.learning_rate"], run.values["train.seed"]
        width = {"narrow": 16, "wide": 32}[run.variant]
        loss = round(2 - 100 * rate + seed / 10 + width / 100, 4)
        config = {"model.d_model": width, "train.learning_rate": rate, "train.seed": seed}
        make_run(run.folder, (3.0, loss), "diverged" if rate > 0.1 else "finished", **config)
    return results_of(study, runs), runs


def results_of(study: Path, runs: list[PlannedRun]) -> Results:
    plan = read_plan(study)
    return Results(study, plan, recorded(plan, runs))


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_there_are_recorded_studies():
    assert {"learning_rate", "depth_or_width", "tokenizer"} <= {folder.name for folder in STUDIES}


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_recorded_study_composes_and_has_a_result_for_every_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # none of its runs is here
    (tmp_path / "input.txt").write_text("What a study may read that is not ours.")
    study = RecordedStudy(folder)
    with (folder / "results.csv").open() as file:
        rows = [(row["variant"], row["train.seed"]) for row in csv.DictReader(file)]
    assert sorted(rows) == sorted((run.variant, str(run.values["train.seed"])) for run in study.runs)
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
        ("variant: [narrow]", "Key 'variant' not in 'StudyPlan'"),
        ("variants: [narow]", "there is no narow.yaml beside it"),
        ("variants: [narrow]\nmetric: lss", "metric: 'lss' is none of loss, best"),
        ("variants: [narrow]\nseeds: []", "need at least one value"),
        ("variants: [narrow]\nseeds: [1, 1]", "a run is planned twice"),
        ("", "expected `key: value` lines"),
        ("[1]", "expected `key: value` lines"),
        ("variants: narrow", "study.yaml: variants: expected a list of names, such as [narrow, wide]"),
        ("variants: {narrow: 1}", "study.yaml: variants: expected a list of names"),
        ("variants: [[narrow]]", "study.yaml: variants: expected a list of names"),
        ("variants: [narrow]\nsweep: [a]", "study.yaml: sweep: expected a list of values for each key"),
        ("variants: [narrow]\nsweep: {train.seed: 3}", "study.yaml: sweep: expected a list of values for each key"),
        ("variants: [narrow]\nseeds: 1", "study.yaml: seeds: expected a list of whole numbers"),
        ("variants: [narrow]\nseeds: [a]", "study.yaml: seeds: expected a list of whole numbers"),
        ("seeds: {a: 1}\nmetric: [a]", "such as [1, 2]\noutputs/sweeps/tiny/study.yaml: metric: expected a name"),
        ("variants: [narrow]\nx: nonsense", "x: there is no nonsense to draw by"),
        ("variants: [narrow]\nlines: loss", "lines: there is no loss to draw by"),
        ("variants: [narrow]\npanels: loss", "panels: there is no loss to draw by"),
        (
            "variants: [narrow, wide]\nx: train.seed\nlines: train.seed",
            "do not distinguish all runs; sweep one key, or use lines: v",
        ),
        (
            "variants: [narrow]\nsweep: {train.beta1: [0.8, 0.9], train.beta2: [0.9, 0.95]}\nx: train.beta1",
            "sweep one key",
        ),
        ("variants: [narrow]\nsweep: {train.lr: [1]}", "sweep: train.lr=1: Key 'lr' not in 'TrainingConfig'"),
        ("variants: [narrow]\nsweep: {model.num_heads: [4, 5]}", "num_heads=5 seed=1: model.num_heads: 5 heads"),
        ("sweep: {train.lr: [1]}", "missing mandatory value: variants"),
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
    run = RecordedStudy(folder).runs[0]
    make_run(run.folder, **{"train.max_steps": 9, "train.precision": "fp32", "inference.precision": "fp32"})
    about = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**about, "machine": {"precision": "bf16"}}))
    with pytest.raises(UserError, match=r"was started with train.max_steps=9, the study now has 8") as refused:
        RecordedStudy(folder)
    assert "precision" not in str(refused.value)  # neither what the machine made of it nor what training does not use


def test_plan_is_data(tmp_path):
    plan = read_plan(write_study(tmp_path, PLAN.replace("[1e-3, 3e-3]", "['${oc.env:HOME}', '${x}']")))
    assert plan.sweep == {"train.learning_rate": ["${oc.env:HOME}", "${x}"]}
    arguments = PlannedRun("tiny", "narrow", {"sample_prompt": "${oc.env:HOME}"}).overrides[1:]
    assert compose("train", arguments).sample_prompt == "${oc.env:HOME}"


def test_numbers_in_scientific_notation(tmp_path):
    assert read_plan(write_study(tmp_path)).sweep == {"train.learning_rate": [0.001, 0.003]}


# ---------------------------------------------------------------------------------------------------------------------
# Results


def test_table_of_means_and_spreads_with_the_best_in_bold(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch)
    assert results.table().splitlines() == [
        "| d model \\ learning rate | 0.001 | 0.003 |",
        "| ---: | ---: | ---: |",
        "| 16 | 2.2100 ± 0.050 | **2.0100 ± 0.050** |",
        "| 32 | 2.3700 ± 0.050 | **2.1700 ± 0.050** |",
    ]
    rows = [(row["variant"], row["model.d_model"], row["train.learning_rate"], row["loss"]) for row in results.rows]
    assert rows[:2] == [("narrow", 16, 0.001, 2.16), ("narrow", 16, 0.003, 1.96)]
    assert [text.get_text() for text in results.over_x().axes[0].texts] == ["d model 16", "d model 32"]


def test_short_training_is_in_minutes(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch, PLAN.replace("[1, 2]", "[1]"))
    assert "4 runs, 0.008 million tokens, 8e+05 FLOPs, 4.8 minutes of training" in results.section()


def test_panels_divide_the_picture_and_the_table(tmp_path, monkeypatch):
    plan = PLAN.replace("lines: model.d_model", "lines: variant\npanels: model.d_model")
    results, _ = finished(tmp_path, monkeypatch, plan)
    assert [row.split("|")[1].strip() for row in results.table().splitlines()] == [
        *("d model, variant \\ learning rate", "---", "16, narrow", "32, wide")
    ]
    assert [axes.get_title() for axes in results.over_x().axes] == ["16", "32"]
    assert [text.get_text() for axes in results.over_x().axes for text in axes.texts] == ["narrow", "wide"]


def test_diverged_setting_is_never_the_best(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch, PLAN.replace("3e-3", "1.0"))
    assert "| 16 | **2.2100 ± 0.050** | diverged |" in results.table()
    assert results.over_x().axes[0].lines


def test_study_that_diverged_has_no_best(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch, PLAN.replace("[1e-3, 3e-3]", "[1.0, 2.0]"))
    assert "| 16 | diverged | diverged |" in results.table()
    results.write()


def test_setting_that_diverged_with_one_seed_is_not_the_best(tmp_path, monkeypatch):
    results, runs = finished(tmp_path, monkeypatch)
    about = next(run for run in runs if run.values["train.learning_rate"] == 3e-3).folder / "run.json"
    about.write_text(about.read_text().replace('"finished"', '"diverged"'))
    results = results_of(results.folder, runs)
    assert "| 16 | **2.2100 ± 0.050** | 2.0600 (1 of 2 diverged) |" in results.table()
    rings = [line for line in results.over_x().axes[0].lines if line.get_marker() == "o"]
    assert [list(ring.get_ydata()) for ring in rings] == [[pytest.approx(2.21)], [pytest.approx(2.17)]]
    assert "The best of each row is bold, and in the picture it has a ring." in results.section()


def test_csv_has_full_precision(tmp_path, monkeypatch):
    results, runs = finished(tmp_path, monkeypatch)
    line = {"step": 90, "tokens": 12_345_678, "seconds": 1.0, "val/loss": 2.123456789012}
    (runs[0].folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    row = next(csv.DictReader(results_of(results.folder, runs).text.splitlines()))
    assert (row["tokens"], row["loss"]) == ("12345678", "2.123456789012")


def test_values_of_a_csv_are_numbers_or_texts():
    (row,) = rows_of("a,b,c,d,e,f,variant\n1,0.001,bpe_1k,,1_2,nan,12\n")
    assert row == {"a": 1, "b": 0.001, "c": "bpe_1k", "d": None, "e": "1_2", "f": "nan", "variant": "12"}


def test_nearly_equal_values_are_different_runs():
    names = {PlannedRun("s", "v", {"train.learning_rate": rate}).folder for rate in (0.0012345671, 0.0012345672)}
    assert len(names) == 2
    assert PlannedRun("s", "v", {"train.max_steps": None, "data.files": ["a b"]}).overrides == [
        *("+s=v", "train.max_steps=null", 'data.files=["a b"]')
    ]


def test_readme_keeps_its_other_parts():
    text = f"# A\n\nWhy?\n\n{OPENING}\nold\n{CLOSING}\n\nBecause.\n"
    once = with_section(text, "new \\1")
    assert once == f"# A\n\nWhy?\n\n{OPENING}\n\nnew \\1\n\n{CLOSING}\n\nBecause.\n"
    assert with_section(once, "new \\1") == once
    assert with_section("# A\n", "x").startswith("# A\n\n<!--")
    with pytest.raises(UserError, match="is missing"):
        with_section(f"{OPENING}\nold\n", "new")


def test_results_are_compared_with_the_recorded_ones(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch)
    assert results.compare_with_recorded() == []
    assert "results.csv, results.png, README.md" in results.write()
    assert results.compare_with_recorded() == []  # they are the same runs
    path = results.folder / "results.csv"
    path.write_text(path.read_text().replace(",2.16,", ",2.96,"))
    assert "1 of 1 means are within" in results.compare_with_recorded()[0]  # the range has grown too
    path.write_text(path.read_text().replace(",2.96,", ",2.36,").replace(",2.26,", ",2.36,"))
    (line,) = results.compare_with_recorded()
    assert "0 of 1 means are within" in line
    assert "largest difference is 0.1500" in line


def test_only_runs_of_the_same_seed_are_compared(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch)
    path = results.folder / "results.csv"
    first = [line for line in results.text.splitlines() if ",2,finished," not in line]
    path.write_text("\n".join(first) + "\n")  # as before the study got its second seed
    assert results.compare_with_recorded() == []
    path.write_text(path.read_text().replace(",2.16,", ",2.15,"))
    assert results.compare_with_recorded() == ["Compared with the recorded results: the largest difference is 0.0100"]


def test_redraw_needs_only_the_results(tmp_path, monkeypatch, capsys):
    results, _ = finished(tmp_path, monkeypatch)
    results.write()
    readme = (results.folder / "README.md").read_text()
    shutil.rmtree(tmp_path / "outputs" / "studies")
    for name in ("README.md", "results.png"):
        (results.folder / name).unlink()
    file = (results.folder / "results.csv").stat().st_ino
    redraw(results.folder)
    assert (results.folder / "results.csv").stat().st_ino == file  # not written again
    assert (results.folder / "README.md").read_text() == readme
    assert (results.folder / "results.png").stat().st_size
    assert "Written to outputs/sweeps/tiny: results.png, README.md" in capsys.readouterr().out
    first, last = results.text.index("\n") + 1, results.text.rindex("narrow")
    for text, problem in [
        (results.text.replace("machine", "computer"), "has no machine; the study writes it"),
        (results.text.replace("model.d_model", "d_model"), "has no model.d_model;"),
        (results.text[:last], "has no run narrow 0.003 2, which study.yaml plans"),
        (results.text.replace("wide", "wider"), "has no run wide 0.001 1, which"),
        (results.text + results.text[first : results.text.index("\n", first)], "has the run narrow 0.001 1, which"),
    ]:
        (results.folder / "results.csv").write_text(text)
        with pytest.raises(UserError, match=f"results.csv: {problem}"):
            redraw(results.folder)
    (results.folder / "study.yaml").write_text("variants: []")
    with pytest.raises(UserError, match="at least one value"):
        redraw(results.folder)
    (results.folder / "study.yaml").write_text(PLAN)
    (results.folder / "results.csv").unlink()
    with pytest.raises(UserError, match=r"no results.csv to draw from"):
        redraw(results.folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"<<<<<<< HEAD\n", "line 3: 1 instead of 2 fields; correct"),
        (b"wide,1,2\n", "line 3: 3 instead of 2 fields"),
        (b"wide,1.2x\n", "line 3: loss: 1.2x is no number"),
        (b"\xff", "can't decode byte 0xff"),
    ],
)
def test_damaged_results_are_refused_before_the_runs(tmp_path, monkeypatch, text, problem):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "results.csv").write_bytes(b"variant,loss\nnarrow,1.5\n" + text)
    with pytest.raises(UserError, match=f"^outputs/sweeps/tiny/results.csv: .*{problem}"):
        run_study(Path("outputs/sweeps/tiny"), jobs=1)
    (folder / "results.csv").unlink()
    (folder / "README.md").write_text(OPENING)
    with pytest.raises(UserError, match="is missing, which ends the generated part"):
        run_study(Path("outputs/sweeps/tiny"), jobs=1)
    assert not (tmp_path / "outputs" / "studies").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_variant_is_found_from_any_folder(workspace: Workspace):
    done = workspace.run("train.py", "+learning_rate=width_64", "train.learning_rate=4e-3", "--cfg", "job")
    assert "d_model: 64" in done.stdout


@pytest.mark.slow
def test_interrupted_study_resumes_and_writes_its_results(workspace: Workspace):
    """Stopped by Ctrl-C and by SIGTERM; meanwhile a second process is refused."""
    folder = write_study(workspace.folder, PLAN.replace("seeds: [1, 2]", "seeds: [1]"))
    command = ("gpt2.main", "study", "outputs/sweeps/tiny")
    for number, (sent, rate) in enumerate([(signal.SIGINT, "0.003"), (signal.SIGTERM, "0.001")]):
        running = workspace.start("-m", *command, "jobs=1", "threads=1", errors_in_output=True)
        name = f"{('narrow', 'wide')[number]},learning_rate={rate},seed=1"
        lock = workspace.folder / "outputs" / "studies" / "tiny" / name / ".lock"
        while not (lock.exists() and lock.read_text()):  # this run has begun
            time.sleep(0.05)
            assert running.poll() is None
        if sent == signal.SIGINT:
            second = workspace.module(*command)
            assert second.returncode == 2
            assert second.stderr.startswith("error: outputs/studies/tiny is being written by process ")
            assert len(second.stderr.splitlines()) == 1
        running.send_signal(sent)
        output, _ = running.communicate(timeout=120)
        assert running.returncode == 128 + sent, output
        assert "Resume with the same command." in output
        assert "1 thread each" in output
        assert "Traceback" not in output
        assert "\x1b" not in output
        assert not (folder / "results.csv").exists()

    collected = workspace.module(*command, "jobs=0")
    assert collected.returncode == 2
    assert re.fullmatch(r"error: jobs=0: \d of 4 runs are missing, so no results are written\n", collected.stderr)
    output = workspace.on_terminal("-m", *command)
    assert "of them done" in output
    assert re.search(r"of 4 runs, \d running.*%  \S+ left", output)
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert {row["state"] for row in rows} == {"finished"}
    assert (folder / "results.png").exists()
    again = workspace.module(*command)
    assert re.search(r"4 of them done\n.*\n\n\| ", again.stdout)  # the header, and then the table
    assert "Compared with" not in again.stdout


def test_run_has_a_low_priority_and_its_threads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 1)
    monkeypatch.setattr(runner, "NICE", lower)
    run = RunProcess(PlannedRun("tiny", "narrow", {}), threads=3)
    try:
        assert os.getpriority(os.PRIO_PROCESS, run.process.pid) == lower
        while not (environment := Path(f"/proc/{run.process.pid}/environ").read_bytes()):  # it is just starting
            assert not run.has_ended()
        assert b"\0OMP_NUM_THREADS=3\0" in b"\0" + environment
    finally:
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
def test_failed_run_is_reported_and_the_others_continue(workspace: Workspace):
    folder = write_study(workspace.folder, "variants: [narrow, wide]")
    (folder / "wide.yaml").write_text("# @package _global_\ndefaults: [_base]\ndata: {tokenizer: gpt2}\n")
    done = workspace.module("gpt2.main", "study", "outputs/sweeps/tiny")
    assert done.returncode == 1
    failure, count = done.stderr.splitlines()
    assert failure.startswith("error: wide seed=1: exit code 2, gpt2: there is no such folder here")  # no Hub here
    assert count == "error: 1 of 2 runs failed; the same command tries them again"
    assert re.search(r"wide seed=1 +failed", done.stdout)
    assert "val loss" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: study: one folder"),
        (["experiments/nothing"], "error: study: experiments/nothing does not exist"),
        (
            ["experiments/learning_rate", "experiments/tokenizer"],
            "error: study: one folder is needed, such as experiments/learning_rate, not experiments/l",
        ),
        (["experiments/learning_rate", "jobs=-1"], "error: jobs: '-1' is not a whole number from 0"),
        (["experiments/learning_rate", "threads=0"], "error: threads: '0' is not a whole number from 1"),
        (["experiments/learning_rate", "--plan=false"], "error: --plan=false: there is no such option"),
        (["experiments/learning_rate", "--redraw", "--plan"], "error: --redraw: it runs nothing, so leave out plan"),
    ],
)
def test_invalid_arguments_are_a_one_line_error(workspace, arguments, message):
    done = workspace.module("gpt2.main", "study", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("act", [run_study, print_plan])
def test_unwritable_place_of_the_runs_is_refused_before_any_work(tmp_path, monkeypatch, act):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "studies").mkdir()
    (tmp_path / "outputs" / "studies" / "tiny").touch()
    monkeypatch.setattr(runner, "RecordedStudy", None)  # not even opened
    with pytest.raises(
        UserError, match=r"^study: cannot write to outputs/studies/tiny: not a folder; run the command in"
    ):
        act(folder, 1, 1)


def test_unwritable_folder_of_a_study_is_refused_with_a_place_that_is_allowed(tmp_path, monkeypatch):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    temporary = tempfile.TemporaryFile

    def refused(dir: Path):
        if dir == folder:
            raise PermissionError(1, "Operation not permitted")
        return temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(UserError, match=r"Operation not permitted; make it writable, or copy the study to outputs/sw"):
        run_study(folder, 1)


@pytest.mark.parametrize("damage", ['{"config": {"train": 5}}', '{"state": 7}', '{"versions": []}', "[[", ""])
def test_damaged_run_is_named_and_counts_as_missing(tmp_path, monkeypatch, capsys, damage):
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = RecordedStudy(folder).runs[0].folder
    make_run(run)
    (run / "run.json").write_text(damage)
    with pytest.raises(UserError, match=r"^jobs=0: 8 of 8 runs are missing, so no results are written$"):
        run_study(folder, jobs=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run}/run.json: ")
    assert line.endswith("; this run counts as missing")
    assert "results.csv" not in {path.name for path in folder.iterdir()}


def test_default_jobs_and_threads_are_those_of_the_container(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(device, "container_limit", lambda _: "400000 100000")
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert (default_jobs(), default_threads(2)) == (4, 2)


def test_chosen_variants_do_not_change_the_folder(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert {run.variant for run in RecordedStudy(folder, ["wide"]).runs} == {"wide"}
    monkeypatch.setattr(PlannedRun, "is_done", True)
    run_study(folder, jobs=0, variants=["wide"])
    (line,) = caplog.messages
    assert line == "All 4 runs of wide are done. Without variants= the study writes its results."
    assert "results.csv" not in {path.name for path in folder.iterdir()}
    with pytest.raises(UserError, match="variants: wider is none of narrow, wide"):
        RecordedStudy(folder, ["wide", "wider"])
