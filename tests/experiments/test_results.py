"""Results of recorded studies: table, picture, results.csv, and the comparison with recorded results."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.experiments.plan import PlannedRun
from gpt2.experiments.results import CLOSING, OPENING, redraw, rows_of, with_section
from gpt2.experiments.runner import run_study
from tests.experiments.studies import PLAN, finished, results_of, write_study


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


def test_study_of_variants_alone_is_one_row(tmp_path, monkeypatch):
    plan = "variants: [narrow, wide]\nseeds: [1, 2]\n"
    results, _ = finished(tmp_path, monkeypatch, plan)
    assert results.table().split("|")[1:4] == [" variant ", " narrow ", " wide "]
    (cells,) = [row.split("|")[1:4] for row in results.table().splitlines()][2:]
    assert [cell.strip()[:2] for cell in cells] == ["va", "**", "2."]  # the best of both is bold
    rings = [line for line in results.over_x().axes[0].lines if line.get_marker() == "o"]
    assert len(rings) == 1


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
    assert results.compare_with_recorded() == []  # the runs are the same
    path = results.folder / "results.csv"
    path.write_text(path.read_text().replace(",2.16,", ",2.96,"))
    assert "1 of 1 means are within" in results.compare_with_recorded()[0]  # their range has grown
    path.write_text(path.read_text().replace(",2.96,", ",2.36,").replace(",2.26,", ",2.36,"))
    (line,) = results.compare_with_recorded()
    assert "0 of 1 means are within" in line
    assert "largest difference is 0.1500" in line


def test_only_runs_of_the_same_seed_are_compared(tmp_path, monkeypatch):
    results, _ = finished(tmp_path, monkeypatch)
    path = results.folder / "results.csv"
    first = [line for line in results.text.splitlines() if ",2,finished," not in line]
    path.write_text("\n".join(first) + "\n")  # as if recorded with one seed
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
    (results.folder / "study.yaml").write_text(PLAN.replace("x: ", "x: train.learning_rat #"))
    with pytest.raises(UserError, match=r"study.yaml: x: there is no train.learning_rat to draw by"):
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
