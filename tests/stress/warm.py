"""Fast starts of the real scripts: each run is a fork of one process that has imported everything."""

import logging
import os
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo

import gpt2.cli.command
import gpt2.cli.sweeper
import gpt2.data.corpus
import gpt2.inference
import gpt2.optimize
import gpt2.search.report
import gpt2.train  # noqa: F401  # imported by the scripts
from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.tracking.tracker import read_metrics
from tests import fault_injection
from tests.conftest import ROOT, made_once, measure_products

TEXT = "".join(f"def function_{i}(argument):\n    return argument + {i * i}\n\n\n" for i in range(75))

# A run of 40 steps, 14 per epoch: it logs every step, evaluates and samples every 6, saves every 4.
SMALL = [
    *("data=text", "data.files=[corpus.txt]", "data.tokenizer=bytes", "wandb=off", "train.auto_resume=true"),
    *("model=gpt2_nano", "model.num_layers=2", "model.d_model=32", "model.d_ff=64", "model.context_length=32"),
    *("model.dropout=0.1", "model.attention_dropout=0.1", "model.residual_dropout=0.1", "train.warmup_steps=2"),
    *("train.batch_size=4", "train.accumulation_steps=2", "train.num_workers=0", "inference.max_new_tokens=4"),
    *("train.max_steps=40", "train.eval_every=6", "train.eval_batches=2", "train.log_every=1", "train.save_every=4"),
]
BY_CLOCK = {"seconds", "train/tokens_per_second"}


@dataclass
class Ended:
    """How a process ended: its exit code, minus the signal that killed it, and what it printed."""

    code: int
    output: str
    seconds: float


@dataclass
class Place:
    """A folder to run scripts in, with its own cache."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "corpus.txt").write_text(TEXT)
        shutil.copytree(made_once("measured", measure_products), self.folder / "cache", dirs_exist_ok=True)

    def start(self, script: str, *arguments: str, before: Callable[[], None] = lambda: None) -> int:
        """Start a script of the repository here, after calling `before` in its process. Returns the process."""
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            cache = str(self.folder / "cache")
            os.environ.update(self.environment, XDG_CACHE_HOME=cache, PYTHONPATH=fault_injection.SITE)
            logging.disable(logging.NOTSET)  # logging is disabled in this process only
            before()
            sys.argv = [script, *arguments]
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001  # the fork must end here
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def wait_for_handler(process: int) -> None:
        """Wait until a process has installed its handler of SIGTERM, because earlier signals would end it at once."""
        caught = 0
        while not caught & 1 << signal.SIGTERM - 1:
            caught = int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process}/status").read_text())[1], 16)
            time.sleep(0.002)

    def wait(self, process: int, seconds: float = 120) -> Ended:
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                output = (self.folder / "output").read_text(errors="replace")
                return Ended(os.waitstatus_to_exitcode(status), output, time.monotonic() - began)
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise AssertionError(f"a process in {self.folder} did not end within {seconds} s")

    def run(self, script: str, *arguments: str, before: Callable[[], None] = lambda: None) -> Ended:
        return self.wait(self.start(script, *arguments, before=before))

    def runs(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("outputs/runs/*/*") if path.is_dir())

    def checkpoints(self) -> Path:
        (run,) = self.runs()
        return run / "checkpoints"

    def newest_step(self) -> int:
        """The step of the newest intact checkpoint; 0 if there is none yet. Raises UserError if all are damaged."""
        folders = [run / "checkpoints" for run in self.runs()]
        path = run_folder.first_intact(run_folder.newest_first(folders[0])) if folders else None
        return checkpoint.read_record(path)["progress"]["step"] if path else 0

    def leftovers(self) -> list[Path]:
        """Temporary files of a process that was killed while it wrote."""
        pattern = re.compile(r"\.(saving-.*|making-.*|metrics\.jsonl|samples\.md)")
        return [path for path in self.folder.rglob(".*") if pattern.fullmatch(path.name)]


@dataclass
class Result:
    """The results that must be equal in an interrupted run and the uninterrupted one."""

    logged: list[dict]
    tensors: dict[str, torch.Tensor]
    progress: dict

    @classmethod
    def of(cls, place: Place) -> "Result":
        (run,) = place.runs()
        last = run / "checkpoints" / run_folder.LAST
        logged = [{k: v for k, v in r.items() if k not in BY_CLOCK} for r in read_metrics(run / "metrics.jsonl")]
        progress = {**checkpoint.read_record(last)["progress"], "seconds": 0}
        return cls(logged, checkpoint.read_tensors(last), progress)

    def differences(self, other: "Result") -> list[str]:
        found = [name for name in ("logged", "progress") if getattr(self, name) != getattr(other, name)]
        if self.tensors.keys() != other.tensors.keys():
            return [*found, "names of tensors"]
        return found + [name for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])]
