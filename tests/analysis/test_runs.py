"""Run folders with arbitrary files: a damaged run is named and left out, and the others are compared."""

import json
import os
import re
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt2.analysis.compare import Comparison
from gpt2.analysis.compare_html import page
from gpt2.analysis.compare_plot import curves
from gpt2.analysis.plotting import picture
from gpt2.analysis.runs import RunResult, find_runs
from gpt2.analysis.tables import as_markdown, as_text
from gpt2.errors import UserError
from tests.analysis.test_compare import make_run
from tests.conftest import Workspace

DEEP = "[" * 100_000 + "]" * 100_000
LEVELS = "[" * 200 + "]" * 200
LARGE = "1" * 400  # an int that is too large for a float


def with_about(folder: Path, **values: str) -> None:
    """Change values of run.json, given as JSON."""
    about = json.loads((folder / "run.json").read_text())
    fields = {**{key: json.dumps(value) for key, value in about.items()}, **values}
    (folder / "run.json").write_text("{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}")


def with_record(folder: Path, line: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")


def becomes_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def becomes_a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


ABOUT = {
    **{key: ["7", "[1]", "{}", "true"] for key in ("title", "state", "reason", "started", "ended")},
    **{
        key: ['"x"', "5", "[1]", "true", f'{{"a": {LEVELS}}}']
        for key in ("repository", "machine", "versions", "config")
    },
    **{key: ['"many"', '"12"', "[1]", "true", LARGE, f"-{LARGE}"] for key in ("parameters", "flops_per_token")},
    "tags": ['"x"', "5", "{}", LEVELS],
}
CONFIG = [
    *('{"train": 5}', '{"train": {"learning_rate": "fast"}}', '{"train": {"eval_batches": [1]}}', '{"name": 7}'),
    *('{"model": {"d_model": {"a": 1}}}', '{"data": {"files": "x"}}'),
]
RECORDS = [
    *('{"step": 50, "sample": 5}', '{"step": 50, "val/loss": "low"}', '{"step": 50, "tokens": [1]}'),
    *(f'{{"step": 50, "val/loss": {LARGE}}}', f'{{"step": {LARGE}}}', '{"step": 50, "seconds": true}'),
    *('{"step": 50, "train/mfu": {}}', '{"step": 50, "val/loss": 1e200}'),
]
DAMAGE = {
    **{f"{key}={v[:9]}": lambda f, k=key, v=v: with_about(f, **{k: v}) for key, vs in ABOUT.items() for v in vs},
    **{value[:60]: lambda folder, value=value: with_about(folder, config=value) for value in CONFIG},
    **{line[:40]: lambda folder, line=line: with_record(folder, line) for line in RECORDS},
    "commit=5": lambda folder: with_about(folder, repository='{"commit": 5}'),
    "dirty=1": lambda folder: with_about(folder, repository='{"commit": "a", "dirty": 1}'),
    "deep run.json": lambda folder: (folder / "run.json").write_text(f'{{"config": {DEEP}}}'),
    "no group": lambda folder: (folder / "run.json").write_text("[]"),
    "cut": lambda folder: (folder / "run.json").write_text('{"state": '),
    "binary run.json": lambda folder: (folder / "run.json").write_bytes(bytes(range(256))),
    "run.json folder": lambda folder: becomes_a_folder(folder / "run.json"),
    "run.json pipe": lambda folder: becomes_a_pipe(folder / "run.json"),
    "deep metrics": lambda folder: (folder / "metrics.jsonl").write_text(DEEP),
    "binary metrics": lambda folder: (folder / "metrics.jsonl").write_bytes(bytes(range(256)) * 9),
    "metrics folder": lambda folder: becomes_a_folder(folder / "metrics.jsonl"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_run_is_named_and_left_out(tmp_path, caplog, damage):
    make_run(tmp_path / "good")
    make_run(tmp_path / "bad")
    damage(tmp_path / "bad")
    assert [run.folder.name for run in find_runs([str(tmp_path)])] == ["good"]
    (message,) = caplog.messages
    assert re.match(rf"{tmp_path}/bad/(run.json|metrics.jsonl): .+; this run is left out$", message)
    assert len(message) < 500
    with pytest.raises(UserError, match=f"no run can be read: {tmp_path}/bad/") as raised:
        find_runs([str(tmp_path / "bad")])
    assert len(raised.value.problems[0].splitlines()) == 1


HARMLESS = {
    "no run.json": lambda folder: (folder / "run.json").unlink(),
    "null": lambda folder: with_about(folder, **dict.fromkeys(ABOUT, "null")),
    "empty": lambda folder: (folder / "run.json").write_text("{}"),
    "no config": lambda folder: with_about(folder, config="{}"),
    "extra key": lambda folder: with_about(folder, extra=LEVELS, more=LARGE),
    "extra metric": lambda folder: with_record(folder, f'{{"step": 50, "other": {LEVELS}, "more": {LARGE}}}'),
    "large setting": lambda folder: with_about(folder, config=f'{{"train": {{"batch_size": {LARGE}}}}}'),
    "other keys": lambda folder: with_about(folder, config='{"train": {"optimizer": "new", "x": {}}, "y": [1]}'),
    "no records": lambda folder: (folder / "metrics.jsonl").write_text(""),
    "NaN": lambda folder: with_record(folder, '{"step": 9, "val/loss": NaN, "tokens": -Infinity, "seconds": 1e999}'),
    "damaged line": lambda folder: with_record(folder, DEEP),
    "large": lambda folder: (
        with_about(folder, flops_per_token=LARGE[:99], parameters=LARGE[:99]),
        with_record(folder, f'{{"step": {LARGE[:99]}, "val/loss": 1e99, "tokens": {LARGE[:99]}, "seconds": -1e99}}'),
    ),
    "halves": lambda folder: with_about(folder, title='"\\ud800"', state='"\\udc9b"', config='{"name": "\\ud800\\n|"}'),
    "lock": lambda folder: (folder / ".lock").mkdir(),
    "long": lambda folder: with_about(folder, config=json.dumps({"name": "x" * 10_000})),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_unusual_run_is_shown_in_every_output(tmp_path, caplog, change):
    make_run(tmp_path / "good")
    make_run(tmp_path / "odd", state="running")
    change(tmp_path / "odd")
    comparison = Comparison(find_runs([str(tmp_path)]))
    assert caplog.messages == []
    assert {run.folder.name for run in comparison.runs} == {"good", "odd"}
    assert len(as_text(comparison.rows()).splitlines()) == 3
    assert len(as_markdown(comparison.rows()).splitlines()) == 4
    assert json.dumps(comparison.records())
    assert page(comparison).count("<tr id=") == 2
    ElementTree.fromstring(picture(curves(comparison), "svg"))


def test_a_name_that_is_too_long_is_an_error():
    with pytest.raises(UserError, match="File name too long"):
        find_runs(["x" * 300])


def test_values_of_another_run_are_escaped_in_the_page(tmp_path):
    """No text of a run folder becomes markup, anywhere in the page."""
    mark = "<i>&\"'$title"
    for name in ("a", f"b{mark}".replace("/", "")):
        folder = tmp_path / mark / name
        make_run(folder, name=name + mark, state=mark, **{f"train.{mark}": name + mark, f"data.{mark}": name})
        facts = {"title": mark, "reason": mark, "started": mark, "repository": {"commit": mark}}
        groups = {"machine": {mark: mark}, "versions": {mark: mark}, "tags": [mark]}
        with_about(folder, **{key: json.dumps(value) for key, value in {**facts, **groups}.items()})
        with_record(folder, json.dumps({"step": 90, "sample": mark}))
    text = page(Comparison(find_runs([str(tmp_path)]), f"train.{mark}"))
    assert "<i>" not in text
    assert '&"' not in text.partition("<svg")[0]
    assert text.count("&lt;i&gt;") > 20
    labels = re.findall(r"<summary>(.*?)</summary>", text)
    assert [label.startswith("name=") or mark in unescape(label) for label in labels if label != "Configuration"] == [
        True,
        True,
    ]


def test_command_leaves_damaged_runs_out_of_every_output(workspace: Workspace):
    runs = workspace.folder / "outputs" / "runs"
    for name in ("a", "b", "c"):
        make_run(runs / name)
    with_about(runs / "b", reason="7")
    with_record(runs / "c", '{"step": 50, "sample": 5}')
    named = [
        "outputs/runs/b/run.json: reason: 7 is not a text; this run is left out",
        "outputs/runs/c/metrics.jsonl: step 50: sample: 5 is not a text; this run is left out",
    ]
    for options in (["html=a.html", "picture=a.svg"], ["--json"], ["--markdown"]):
        done = workspace.module("gpt2.main", "compare", *options)
        assert (done.returncode, done.stderr.splitlines()) == (0, named)
        assert not re.search(r"\b[bc]\b.*2\.0000", done.stdout)
    assert "runs/a" in (workspace.folder / "a.html").read_text()
    done = workspace.module("gpt2.main", "compare", "outputs/runs/b", "outputs/runs/c")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no run can be read: outputs/runs/b/run.json: reason: 7 is not a text; ")


def test_properties_of_a_damaged_run_are_errors(tmp_path):
    run = make_run(tmp_path / "a")
    with_about(tmp_path / "a", config="5")
    assert run.problem == f"{tmp_path}/a/run.json: config: 5 is not a group of keys and values"
    with pytest.raises(UserError):
        RunResult(tmp_path / "a").title  # noqa: B018
