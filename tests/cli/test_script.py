"""Paths that cannot be written, settings of the node `hydra`, file names that are not UTF-8, shell completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.runtime import hub
from tests import warm
from tests.conftest import ROOT, TEXT, TINY, Workspace

LONG = "n" * 300


def refusal(workspace: Workspace, *line: str) -> str:
    """The only line that a script or module prints about a path, before any work. It must leave nothing behind."""
    before = sorted(workspace.folder.rglob("*"))
    if line[0] == "-m":
        done = workspace.module(*line[1:])
        assert done.returncode == 2, done.stderr
    else:
        done = workspace.run(*line, expect=2)
    assert done.stdout == ""
    assert sorted(workspace.folder.rglob("*")) == before
    (text,) = done.stderr.splitlines()
    return text.removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hydra.run.dir=/proc/x"], "hydra.run.dir: cannot write to /proc/x: No such file or directory"),
        (["hydra.run.dir=corpus.txt"], "hydra.run.dir: cannot write to corpus.txt: not a folder"),
        ([f"hydra.run.dir=new/{LONG}/x"], f"hydra.run.dir: cannot write to new/{LONG}/x: File name too long"),
        (["-m", "train.seed=1,2", "hydra.sweep.dir=/proc/x"], "hydra.sweep.dir: cannot write to /proc/x: No such"),
        (["-m", "hparams_search=optuna", "hydra.sweep.dir=corpus.txt"], "hydra.sweep.dir: sqlite:///"),
        (["-m", "train.seed=1", f"hydra.sweep.subdir={LONG}"], "hydra.sweep.subdir: cannot write to outputs"),
        (["-m", "train.seed=1", "hydra.sweep.subdir=/proc/x"], "hydra.sweep.subdir: cannot write to /proc/x: No such"),
        (["data.cache_dir=corpus.txt/x"], "data.cache_dir: cannot write to corpus.txt/x: Not a directory"),
        (["-m", "train.seed=1,2", f"data.cache_dir={LONG}"], f"data.cache_dir: cannot write to {LONG}: File name too"),
        ([f"hydra.job.name={LONG}"], "hydra.run.dir: cannot write "),
        (["hydra.job_logging.root.level=loud"], "hydra: Unable to configure root logger: Unknown level: 'loud'"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_run_folder_that_cannot_be_written(workspace: Workspace, arguments, message):
    assert refusal(workspace, "train.py", *TINY, *arguments).startswith(message)


def test_outputs_that_is_a_file(workspace: Workspace):
    (workspace.folder / "outputs").write_text("")
    for line, message in [
        (["train.py", *TINY], "hydra.run.dir: cannot write to outputs/runs/gpt2/"),
        (["train.py", "-m", *TINY, "train.seed=1,2"], "hydra.sweep.dir: cannot write to outputs/sweeps/gpt2/"),
        (
            ["-m", "gpt2.main", "benchmark", "training", "json=outputs/x.json"],
            "json: cannot write to outputs/x.json: not",
        ),
    ]:
        assert refusal(workspace, *line).startswith(message)


def test_result_that_could_not_be_written_at_the_end(trained: Workspace):
    (run,) = trained.runs()
    checkpoint = f"checkpoint='{run}'"
    (trained.folder / "beside").mkdir(exist_ok=True)
    for place in ("/proc/x", LONG, "beside", "corpus.txt/x"):
        assert refusal(trained, "evaluate.py", checkpoint, f"output={place}").startswith("output: ")
    for place in ("/proc/x", LONG, "corpus.txt/x"):
        assert refusal(trained, "-m", "gpt2.main", "export", checkpoint, f"to={place}").startswith("to: ")
    (trained.folder / "beside").rmdir()


def test_run_folder_whose_lock_cannot_be_written(workspace: Workspace):
    workspace.run("train.py", *TINY, "train.max_steps=1")
    (run,) = workspace.runs()
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    assert refusal(workspace, "train.py", f"resume='{run}'").endswith(
        f"{run.name}/.lock: cannot be written: Is a directory"
    )


def test_refused_run_leaves_no_folder(workspace: Workspace):
    (workspace.folder / "empty.txt").write_text("")
    done = workspace.run("train.py", *TINY, "data.files=[empty.txt]", expect=2)
    assert "there is no text" in done.stderr
    assert not (workspace.folder / "outputs").exists()


def test_file_in_place_of_a_folder_during_a_run_is_one_line(workspace: Workspace):
    (workspace.folder / "run").mkdir()
    (workspace.folder / "run" / "checkpoints").write_text("")
    done = workspace.run("train.py", *TINY, "hydra.run.dir=run", expect=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: Not a directory: {workspace.folder}/run/checkpoints")


def test_cache_that_cannot_be_written_is_replaced(workspace: Workspace, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(hub.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    instead = tmp_path / "tmp" / f"gpt2-cache-{os.getuid()}"
    for place in ("/proc/x", tmp_path / "corpus.txt", tmp_path / LONG):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        with caplog.at_level("WARNING"):
            assert hub.caches() == hub.caches() == instead
        assert [record.message.partition(" (")[0] for record in caplog.records] == [
            f"The cache {place}/gpt2 cannot be written to"
        ]
        caplog.clear()
    assert instead.stat().st_mode & 0o077 == 0
    instead.rmdir()
    instead.symlink_to(tmp_path)  # as if another user had made it
    monkeypatch.setattr(hub.os, "getuid", lambda: 12345)
    (tmp_path / "tmp" / "gpt2-cache-12345").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/y")
    assert hub.caches().name != "gpt2-cache-12345"


@pytest.mark.parametrize(
    "settings",
    [
        ["hydra.output_subdir=null", "+hydra.job.env_set.GPT2_NOTHING=1", "hydra.job_logging.root.level=ERROR"],
        ["hydra/job_logging=default", "hydra.job.name=mine", "hydra.verbose=true"],
        ["hydra/job_logging=disabled"],
    ],
    ids=" ".join,
)
def test_settings_of_hydra_that_work(workspace: Workspace, settings):
    place = "hydra.run.dir=runs/${name}-${train.seed}"
    workspace.run("train.py", *TINY, "train.max_steps=2", "train.eval_batches=1", place, *settings)
    assert json.loads((workspace.folder / "runs" / "gpt2-1" / "run.json").read_text())["state"] == "finished"


def test_file_name_that_is_not_utf8(workspace: Workspace):
    """A pattern matches the file."""
    (workspace.folder / "caf\udce9.text").write_text(TEXT)
    files = ["train.max_steps=2", "train.eval_batches=1", "data.files=['caf*.text']"]
    workspace.run("train.py", *TINY, *files)
    (run,) = workspace.runs()
    workspace.run("evaluate.py", f"checkpoint='{run}'")
    (workspace.folder / "caf\udce9.text").write_bytes(b"\xff" + TEXT.encode())
    done = workspace.run("train.py", *TINY, *files, expect=2)
    assert "caf?.text is not UTF-8 at byte 0" in done.stderr


def test_working_folder_whose_name_is_not_utf8(workspace: Workspace):
    folder = workspace.folder / "caf\udce9"
    folder.mkdir()
    (folder / "corpus.txt").write_text(TEXT)
    for more in ([], ["-m", "train.seed=1,2"]):
        done = warm.run([str(ROOT / "train.py"), *TINY, *more], folder, workspace.environment, 600)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.endswith(r"/caf\xe9: the name of this folder is not UTF-8; start in another one")


def test_shell_completion_in_bash(workspace: Workspace):
    for script in ("train.py", "generate.py"):
        (workspace.folder / script).symlink_to(ROOT / script)
    ask = """
        COMP_LINE="$1" COMP_WORDS=($1) COMP_POINT=${#1} COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
    """
    lines = ["python train.py mode", "python3 train.py model=gpt2_m", "python train.py train.learning_"]
    (workspace.folder / "a.b-c").symlink_to(sys.prefix)
    lines += ["a.b-c/bin/python3 ./generate.py inference.top_", "python train.py model=null train.see"]
    lines += ["python -m gpt2.main do", "python3 -m gpt2.main doctor dev", "python -m gpt2.main compare so"]
    asked = "".join(f"ask '{line}'\n" for line in lines)
    script = f'eval "$(python3 train.py -sc install=bash)"\ncomplete -p\nask() {{ {ask} }}\n{asked}'
    environment = {**workspace.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=workspace.folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()[:2]) == [
        f"complete -o default -o nospace -F hydra_bash_completion {python}" for python in ("python", "python3")
    ]
    assert done.stdout.splitlines()[2:] == [
        "model. model=",
        "model=gpt2_medium model=gpt2_mini",
        "train.learning_rate=",
        "inference.top_k= inference.top_p=",
        "",  # a line that does not compose
        "doctor",
        "device=",
        "",  # a command without a configuration
    ]


@pytest.mark.parametrize(("arguments", "runs"), [([], 1), (["-m", "train.seed=1,2"], 2)])
def test_garbage_is_collected_while_a_command_runs(workspace: Workspace, arguments, runs):
    """Garbage collection is off only while a command line is checked."""
    program = workspace.folder / "program.py"
    task = "import gc\nfrom gpt2.cli.script import script\n@script('train')\ndef main(config):\n    "
    program.write_text(f"{task}print('collects', gc.isenabled())\nmain()")
    done = workspace.run(str(program), *TINY, *arguments)
    assert done.stdout.count("collects True") == runs
