"""Ctrl-C in each phase of each script: its exit code is 130, it prints no traceback, and leaves nothing unfinished."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY, Workspace

TRAIN = ["train.py", *TINY, "hydra.run.dir=new", "sample_prompt=def"]
SWEEP = ["train.py", "-m", *TINY, "train.max_steps=2", "train.warmup_steps=1", "hydra.sweep.dir=new", "train.seed=1,2"]
GENERATE = ["generate.py", "checkpoint=run", "wandb=off", "prompt=def"]
EVALUATE = ["evaluate.py", "checkpoint=run", "wandb=off", "output=new/result.json"]
EXPORT = ["gpt2/main.py", "export", "checkpoint=run", "to=new/exported"]
OF_RUN = ["checkpoints/last.pth", "curves.png", "metrics.jsonl", "run.json", "train.log"]

# The phase, the function that begins it, the command, and files that must be in the folder `new` afterwards.
PHASES = [
    ("composition", "gpt2.cli.preflight:compose", TRAIN, []),
    ("reading the data", "gpt2.data.text_files:fingerprint_of", TRAIN, []),
    ("tokenizing", "gpt2.data.corpus:write_tokens#2", [*TRAIN, "data.validation_fraction=0.2"], []),
    ("start of W&B", "gpt2.tracking.loggers:start_run_loggers", TRAIN, []),
    ("validation", "gpt2.train:score", TRAIN, OF_RUN),
    ("a sample", "gpt2.generation.sampling:sample", TRAIN, OF_RUN),
    ("saving", "gpt2.checkpoint.format:_bytes_of", TRAIN, [*OF_RUN, "checkpoints/best_model.pth"]),
    ("the curves", "gpt2.analysis.plotting:draw_curves", TRAIN, ["checkpoints/step_00000008.pth"]),
    ("the first run of a sweep", "gpt2.cli.job:run_task", SWEEP, []),
    ("between two runs", "gpt2.cli.command:run_sweep_job#2", SWEEP, ["multirun.yaml", "0/curves.png"]),
    ("generation", "gpt2.generation.sampling:sample#3", GENERATE, []),
    ("evaluation", "gpt2.evaluate:as_inputs#2", EVALUATE, []),
    ("writing the result", "gpt2.tracking.evaluations:atomic_write", EVALUATE, []),
    ("export", "gpt2.checkpoint.format:_header", EXPORT, []),
]


@pytest.fixture(scope="module")
def workspace(trained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a finished run in the folder `run`."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copy(trained.folder / "corpus.txt", folder)
    shutil.copytree(trained.runs()[0], folder / "run")
    return Workspace(folder)


@pytest.mark.parametrize(("place", "command", "left"), [phase[1:] for phase in PHASES], ids=[p[0] for p in PHASES])
def test_ctrl_c(workspace: Workspace, place, command, left):
    before = {*files_in(workspace.folder)}
    done = workspace.run("tests/interrupted.py", place, *command, expect=130)
    assert "Interrupted" in done.stderr
    new = {path.removeprefix("new/") for path in files_in(workspace.folder) if path not in before}
    assert {*left} <= new if left else not new
    assert not list(workspace.folder.rglob(".saving-*"))
    if left and command == TRAIN:
        assert json.loads((workspace.folder / "new" / "run.json").read_text())["state"] == "interrupted"
    shutil.rmtree(workspace.folder / "new", ignore_errors=True)


def files_in(folder: Path) -> list[str]:
    """The files of a workspace, without its caches."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return [str(path) for path in paths if path.parts[0] not in ("cache", "home")]
