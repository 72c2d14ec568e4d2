"""Comparing runs: run folders, tables, plots, the HTML page and the command."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2 import main
from gpt2.analysis import runs as runs_module
from gpt2.analysis.compare import Comparison, short_names, short_values
from gpt2.analysis.compare_html import page
from gpt2.analysis.runs import COLUMNS, RunResult, differences, find_runs
from gpt2.analysis.tables import as_markdown, as_text, is_number
from gpt2.errors import UserError
from gpt2.runtime.files import LOCK
from tests.helpers import ROOT


def make_run(folder: Path, losses: tuple[float, ...] = (3.0, 2.0), state: str = "finished", **config) -> RunResult:
    """A run folder as train.py leaves it, with values of its configuration by full key."""
    folder.mkdir(parents=True)
    nested: dict = {}
    for key, value in {"name": "tiny", **config}.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    lines = []
    for number, loss in enumerate(losses, 1):
        at = {"step": number * 10, "tokens": number * 1000, "seconds": number * 36.0}
        lines.append({**at, "train/loss": loss + 0.1, "train/tokens_per_second": 100.0 * number, "train/mfu": None})
        lines.append({**at, "val/loss": loss, "val/bits_per_byte": loss / 2, "sample": f"text <b>{number}</b>"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"title": f"{folder.name} seed={nested.get('train', {}).get('seed')}", "state": state, "config": nested}
    (folder / "run.json").write_text(json.dumps({**about, "parameters": 1234, "flops_per_token": 100.0}))
    return RunResult(folder)


@pytest.fixture
def two(tmp_path: Path) -> Comparison:
    make_run(tmp_path / "a", (3.0, 1.8, 2.5), **{"train.learning_rate": 1e-3, "train.seed": 1})
    make_run(tmp_path / "b", (3.0, 2.0), **{"train.learning_rate": 3e-3, "train.seed": 1})
    return Comparison(find_runs([str(tmp_path)]))


def test_columns_of_a_run(tmp_path):
    result = make_run(tmp_path / "a", (3.0, 1.8, 2.5))
    figures = {name: column.of(result) for name, column in COLUMNS.items()}
    assert figures == {
        "loss": 2.5,
        "best": 1.8,
        "bits_per_byte": 1.25,
        "steps": 30,
        "tokens": 3000,
        "tokens_per_second": 250.0,
        "hours": 0.03,
        "mfu": None,
        "flops": 300_000.0,
        "parameters": 1234,
        "text_bytes": pytest.approx(3000 * 2 / 0.6931471805599453),
    }


def test_speed_of_a_run_with_one_record_is_that_of_the_whole_run(tmp_path):
    """The record is that of the first step, which is slower than the others."""
    assert make_run(tmp_path / "a", (3.0,)).tokens_per_second == pytest.approx(1000 / 36)


def test_folder_with_only_metrics_is_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "seconds": 1.0, "train/loss": 3.0}\n{"st')
    (only,) = find_runs([str(tmp_path)])
    assert (only.last("train/loss"), COLUMNS["best"].of(only), only.config, only.state) == (3.0, None, {}, None)
    assert "n/a" in as_text(Comparison([only]).rows())


def test_runs_are_found_once_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        make_run(tmp_path / "sweep" / str(number))
    place = str(tmp_path / "sweep")
    assert [found.folder.name for found in find_runs([place])] == ["1", "9", "10"]
    assert [found.folder.name for found in find_runs([f"{place}/9", f"{place}/*", f"{place}/1"])] == ["9", "1", "10"]


def test_folder_names_with_pattern_characters(tmp_path, monkeypatch):
    make_run(tmp_path / "a[1]=b")
    monkeypatch.chdir(tmp_path)
    assert len(find_runs(["a[1]=b", str(tmp_path / "a[1]=b")])) == 1


def test_paths_without_a_run_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as refused:
        find_runs([str(tmp_path / "empty"), str(tmp_path / "gone"), str(tmp_path / "no*")])
    assert [("no run" in problem, "not exist" in problem) for problem in refused.value.problems] == [
        *((True, False), (False, True), (False, True))
    ]


def test_missing_keys_have_their_defaults(tmp_path):
    """A run of an earlier version does not differ from others in newer keys."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"train.on_nonfinite": "stop"})
    assert differences([first, second]) == []
    third = make_run(tmp_path / "c", **{"train.on_nonfinite": "skip"})
    assert differences([first, second, third]) == ["train.on_nonfinite"]


def test_table_begins_with_results_and_is_sorted(two):
    head, *rows = two.rows()
    assert head == ["run", "val loss", "best", "bits/byte", "tokens", "tokens/s", "hours", "learning_rate"]
    assert [[*row[:3], row[-1]] for row in rows] == [
        ["b", "2.0000", "2.0000", "0.003"],
        ["a", "2.5000", "1.8000", "0.001"],
    ]
    order = {key: [result.folder.name for result in Comparison(two.runs, key).runs] for key in ("best", "tokens")}
    assert order == {"best": ["a", "b"], "tokens": ["a", "b"]}  # more tokens come first
    assert [result.folder.name for result in Comparison(two.runs, "train.learning_rate").runs] == ["a", "b"]
    assert Comparison(two.runs, "flops").rows()[0][-2:] == ["FLOPs", "learning_rate"]
    with pytest.raises(UserError, match="there is no lss"):
        Comparison(two.runs, "lss")


STDLIB = [f"/usr/lib/python3.11/{part}/**/*.py" for part in ("json", "xml")]
DIFFERENT = [  # runs in a typical `outputs/runs`
    {"name": "quickstart"},
    {"name": "again", "train.seed": 2, "train.precision": "fp32", "machine.ranks": 2, "train.device": "cuda:0"},
    {"name": "rates", "train.learning_rate": 0.0056788, "train.warmup_steps": 7, "train.beta2": 0.9},
    {"name": "bytes", "data.tokenizer": "bytes", "data.files": STDLIB[:1], "model.vocab_size": 257},
    {
        "name": "tuned",
        "data.tokenizer": "bytes",
        "data.files": STDLIB[1:],
        "train.init_from": f"runs/{'x' * 60}/best.pth",
    },
    {"name": "wide", "model.d_model": 96, "model.d_ff": 384, "train.num_workers": 1, "train.eval_batches": 7},
]


def test_table_of_different_runs_has_six_keys_and_counts_the_others(tmp_path):
    """The keys that distinguish runs come first, so every two runs look different."""
    for number, config in enumerate(DIFFERENT):
        make_run(tmp_path / str(number), (3.0 + number,), **{"machine.ranks": 1, **config})
    found = Comparison(find_runs([str(tmp_path)]))
    head, *rows = found.rows()
    assert head[head.index("hours") + 1 :] == [
        *("init_from", "files", "tokenizer", "d_model", "learning_rate", "precision")
    ]
    assert len({tuple(row[-6:]) for row in rows}) == len(DIFFERENT)
    assert max(len(cell) for row in rows for cell in row) <= 26
    assert found.rest == "10 more keys differ: name, ranks, device and 7 more"
    wide = found.rows(all_keys=True)
    assert [row[: len(head)] for row in wide] == [head, *rows]
    assert len(wide[0]) == len(head) + 10
    text = page(found)
    assert text.count('<th class="more">') + text.count('<th class="number more">') == 10
    assert found.rest in text

    chosen = Comparison(found.runs, columns=["seed", "steps", "ranks"])
    assert chosen.rows()[0][-3:] == ["steps", "seed", "ranks"]
    with pytest.raises(UserError, match=r"columns: vocab_size is ambiguous: model\.vocab_size, data\.vocab_size"):
        Comparison(found.runs[:1], columns=["vocab_size"])


def test_keys_of_a_study_are_its_search_space(tmp_path):
    """Trials differ in all parameters, and one parameter sets three kinds of dropout."""
    for rate, decay, dropout in ((1e-3, 0.01, 0.123456), (2e-3, 0.02, 0.1234567), (3e-3, 0.03, 0.3)):
        config = {f"model.{place}dropout": dropout for place in ("", "attention_", "residual_")}
        config |= {"train.learning_rate": rate, "train.weight_decay": decay, "train.beta2": 1 - rate}
        make_run(tmp_path / str(rate), **config, **{"train.epsilon": decay / 1e6})
    found = Comparison(find_runs([str(tmp_path)]))
    assert [found.names[key] for key in found.informative] == [
        *("learning_rate", "weight_decay", "dropout", "beta2", "epsilon", "attention_dropout")
    ]


def test_short_values_stay_different():
    assert short_values([0.00123456, 0.1, 1e30, None, True]) == ["0.00123", "0.1", "1e+30", "null", "true"]
    assert short_values([0.1234561, 0.1234562]) == ["0.1234561", "0.1234562"]
    assert short_values(["a" * 50, "b"]) == [f"{'a' * 8}…{'a' * 15}", "b"]
    assert short_values([0.1234561, 0.1234571, "a" * 50]) == ["0.123456", "0.123457", f"{'a' * 8}…{'a' * 15}"]
    paths = [f"outputs/runs/quickstart/{stamp}/checkpoints/best_model.pth" for stamp in ("06-16", "06-17")]
    assert short_values(paths) == ["…6/checkp…/best_model.pth", "…7/checkp…/best_model.pth"]


def test_page_leaves_out_unknown_versions(tmp_path):
    run = make_run(tmp_path / "run")
    about = json.loads((run.folder / "run.json").read_text())
    versions = {"torch": "2.13.0", "cuda": None, "numpy": "2.4.0"}
    (run.folder / "run.json").write_text(json.dumps({**about, "versions": versions}))
    assert "versions  torch 2.13.0, numpy 2.4.0</pre>" in page(Comparison([RunResult(run.folder)]))


def test_machine_facts_replace_auto(tmp_path):
    for name, machine in (
        ("a", {"precision": "bf16", "device": "cpu", "ranks": 1}),
        ("b", {"precision": "fp32", "device": "NVIDIA H200", "ranks": 8}),
    ):
        about = json.loads((make_run(tmp_path / name).folder / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps({**about, "machine": machine}))
    head, *rows = Comparison(find_runs([str(tmp_path)])).rows()
    assert [head[-3:], *(row[-3:] for row in rows)] == [
        ["precision", "ranks", "device"],
        ["bf16", "1", "cpu"],
        ["fp32", "8", "NVIDIA H200"],
    ]


def test_run_without_the_value_sorts_last(tmp_path):
    make_run(tmp_path / "a", ())
    make_run(tmp_path / "b")
    assert [found.folder.name for found in Comparison(find_runs([str(tmp_path)])).runs] == ["b", "a"]


def test_nan_is_ignored_and_short_keys_sort(tmp_path):
    worst = make_run(tmp_path / "a", (3.0, float("nan")), **{"train.learning_rate": 1.0})
    make_run(tmp_path / "b", (2.5,), **{"train.learning_rate": 2.0})
    found = Comparison(find_runs([str(tmp_path)]), "learning_rate")
    assert (found.sort, worst.last("val/loss")) == ("train.learning_rate", 3.0)
    assert [run.folder.name for run in found.runs] == ["a", "b"]


def test_label_has_only_distinguishing_keys(tmp_path):
    for width, seed in ((32, 1), (32, 2), (64, 1)):
        config = {"model.d_model": width, "model.d_ff": 4 * width, "train.seed": seed, "train.log_every": seed}
        make_run(tmp_path / f"{width}-{seed}", **config)
    found = Comparison(find_runs([str(tmp_path)]))
    assert found.keys == ["model.d_model", "model.d_ff", "train.seed"]
    assert {found.label(result) for result in found.runs} == {
        *("d_model=32 seed=1", "d_model=32 seed=2", "d_model=64 seed=1")
    }
    assert {found.group(result) for result in found.runs} == {"d_model=32", "d_model=64"}


def test_equal_runs_are_labelled_by_folder(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    found = Comparison(find_runs([str(tmp_path)]))
    assert [found.label(result) for result in found.runs] == ["a", "b"]


def test_ambiguous_short_names_keep_their_group():
    assert short_names(["data.vocab_size", "model.vocab_size", "model.d_ff"]) == {
        "data.vocab_size": "data.vocab_size",
        "model.vocab_size": "model.vocab_size",
        "model.d_ff": "d_ff",
    }


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"model.vocab_size": 300}, "tokenizers differ"),
        ({"data.files": ["b.txt"]}, "data differ (files)"),
        ({"data.files": ["b.txt"], "model.vocab_size": 300}, "data differ (files)"),
        ({"train.eval_batches": 3}, "validated on parts"),
        ({"train.learning_rate": 1.0}, None),
    ],
)
def test_notes_on_incomparable_runs(tmp_path, changed, note):
    base = {"data.files": ["a.txt"], "train.eval_batches": 5, "train.batch_size": 4}
    make_run(tmp_path / "a", **base)
    make_run(tmp_path / "b", **{**base, **changed})
    notes = Comparison(find_runs([str(tmp_path)])).notes
    assert notes == [] if note is None else note in notes[-1]


def test_steps_after_the_last_record_of_an_interrupted_run_count(tmp_path):
    run = make_run(tmp_path / "a", state="interrupted")  # 20 steps are recorded
    about = json.loads((run.folder / "run.json").read_text())
    for step, tokens in ((25, 2500), (20, 2000)):
        reached = {"step": step, "tokens": 2500, "seconds": 80.0}
        (run.folder / "run.json").write_text(json.dumps({**about, "reached": reached}))
        found = RunResult(run.folder)
        assert (found.last("step"), found.last("tokens")) == (step, tokens)
    assert found.last("val/loss") == 2.0


def test_tokenizers_are_compared_by_their_content_if_it_is_recorded(tmp_path):
    for name, tokenizer, recorded in (("a", "train", "1"), ("b", "a/best_model.pth", "1"), ("c", "train", "2")):
        run = make_run(tmp_path / name, **{"data.tokenizer": tokenizer})
        about = json.loads((run.folder / "run.json").read_text())
        (run.folder / "run.json").write_text(json.dumps({**about, "tokenizer": recorded}))
    for names, differ in (("ab", False), ("ac", True), ("bc", True)):
        assert Comparison(find_runs([str(tmp_path / name) for name in names])).tokenizers_differ == differ


@pytest.mark.parametrize(("locked", "state"), [(True, "running"), (False, "killed")])
def test_state_of_a_running_and_of_a_killed_run(tmp_path, locked, state):
    folder = tmp_path / "a"
    make_run(folder, state="running")
    assert RunResult(folder).state == "running?"  # as of a copy without the lock
    code = "import sys\nfrom pathlib import Path\nfrom gpt2.runtime.files import run_lock\n"
    code += "with run_lock(Path(sys.argv[1])):"
    command = [sys.executable, "-c", f"{code} print(); input()", str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline()
    if not locked:
        holder.kill()
        holder.wait()
    assert RunResult(folder).state == state
    assert Comparison([RunResult(folder)]).rows()[1][-1] == state
    holder.communicate()
    (folder / LOCK).write_text((folder / LOCK).read_text().replace(socket.gethostname(), "another-machine"))
    assert RunResult(folder).state == "running?"


def test_tables_as_text_and_markdown():
    rows = [["run", "x"], ["a|b", "1"], ["c", "12,500"]]
    assert as_text(rows) == "run       x\na|b       1\nc    12,500"
    wide = as_text([["run", "x", "y", "z"], ["a", "1", "b", "text"]], width=10)
    assert wide == "run  x  y\na    1  b\n\nrun  z\na    text"
    assert as_text(rows, width=1) == as_text(rows)  # one column at least
    assert as_markdown(rows) == "| run | x |\n| --- | ---: |\n| a\\|b | 1 |\n| c | 12,500 |"


@pytest.mark.parametrize("cell", ["1", "-0.5", "1.31e+06", "12,500", "31.2%", "2.38 ± 0.01", "**2.38**", "n/a", ""])
def test_is_number(cell):
    assert is_number(cell)
    assert not is_number(f"{cell}x")


def test_html_page_is_self_contained_and_escaped(two):
    text = page(two)
    assert "<svg" in text
    assert "text &lt;b&gt;3&lt;/b&gt;" in text
    assert "<b>" not in text
    assert not re.findall(r"""(src|href)=.(?!#)|url\((?!#)|@import|<link""", text)
    assert text.count("<tr id=") == text.count("<details><summary>learning_rate=") == 2
    assert 'id="run-0-' in text


def run_compare(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    main.compare()


def test_json_output(two, capsys, monkeypatch):
    run_compare(monkeypatch, str(two.parent), "--json")
    records = json.loads(capsys.readouterr().out)
    assert [record["loss"] for record in records] == [2.0, 2.5]
    assert records[0]["config"] == {"train.learning_rate": 0.003}
    assert {"folder", "title", "state", *runs_module.COLUMNS} <= records[0].keys()


def test_note_about_the_command_line_is_not_on_the_page(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gpt2.analysis.compare.MAX_TABLE_KEYS", 0)
    run_compare(monkeypatch, str(two.parent), f"html={tmp_path}/page.html")
    note = "1 more key differs: learning_rate"
    assert f"{note}. columns=KEY,... shows others, html=FILE all of them." in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert note in text and "columns=KEY" not in text


def test_output_files_and_unwritable_paths(two, tmp_path, capsys, monkeypatch):
    run_compare(monkeypatch, str(two.parent), f"html={tmp_path}/new/page.html", f"picture={tmp_path}/c.svg")
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    assert "<svg" in (tmp_path / "c.svg").read_text()
    assert f"written to {tmp_path}/c.svg" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"picture: cannot write to .*/file/c.png: not a folder"):
        run_compare(monkeypatch, str(two.parent), f"picture={tmp_path}/file/c.png")
    with pytest.raises(UserError, match=r"none of \.png, \.svg"):
        run_compare(monkeypatch, str(two.parent), "picture=c.jpg")


def test_runs_without_a_loss_have_no_picture(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "a", ())
    run_compare(monkeypatch, str(tmp_path / "a"), f"picture={tmp_path}/c.png")
    assert "No run has a validation loss yet, so no picture is drawn." in capsys.readouterr().out
    assert not (tmp_path / "c.png").exists()


def test_resumed_run_has_its_newest_configuration(trained, workspace):
    (real,) = trained.runs()
    copy = workspace.folder / "outputs" / "runs" / "gpt2" / "a"
    shutil.copytree(real, copy)
    workspace.run(
        "train.py",
        f"resume={copy}",
        "resume_changes=true",
        "train.learning_rate=0.5",
        "train.max_steps=9",
        "wandb=off",
        "data.files=[corpus.txt]",
    )
    found = Comparison([RunResult(real), RunResult(copy)])
    assert "train.learning_rate" in found.keys
    assert RunResult(copy).config["train.learning_rate"] == 0.5
    assert RunResult(copy).config["data.tokenizer"] == "bytes"


# ---------------------------------------------------------------------------------------------------------------------
# As a command


def test_command_compares_runs_without_torch(trained, workspace):
    (real,) = trained.runs()
    for name, rate in (("a", "0.0003"), ("b", "0.01")):
        copy = workspace.folder / "outputs" / "runs" / "gpt2" / name
        shutil.copytree(real, copy)
        about = copy / "run.json"
        assert '"learning_rate": 0.0003' in about.read_text()
        about.write_text(about.read_text().replace('"learning_rate": 0.0003', f'"learning_rate": {rate}'))
    code = "import sys; sys.argv[1:] = ['compare']\nimport gpt2.main; gpt2.main.main(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workspace.folder, env=workspace.environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("False\n")
    assert "learning_rate" in done.stdout
    assert (workspace.folder / "outputs" / "comparison.png").exists()
    table = workspace.module("gpt2.main", "compare", "outputs/runs/*/*", "--markdown", "sort=train.learning_rate")
    assert [line.split(" | ")[-1] for line in table.stdout.splitlines()] == [
        "learning_rate |",
        "---: |",
        "0.0003 |",
        "0.01 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jsn"], "--jsn: there is no such option; there are sort=, html="),
        (["srt=loss"], "srt=loss: there is no such option"),
        (["corpus.txt"], "corpus.txt contains no run"),
        (["--json=x"], "--json=x: there is no such option"),
        (["outputs/runs/*seed=1"], "outputs/runs/*seed=1 does not exist"),
    ],
)
def test_wrong_arguments_are_errors(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("")
    with pytest.raises(UserError) as raised:
        run_compare(monkeypatch, *arguments)
    assert raised.value.problems[0].startswith(message)


def test_help_lists_the_options(workspace):
    done = workspace.module("gpt2.main", "compare", "--help")
    assert done.returncode == 0
    assert all(
        word in done.stdout for word in ("usage: python -m gpt2.main compare", "sort=KEY", "--json", "html=FILE")
    )
