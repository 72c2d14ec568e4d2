"""Fixtures shared by all tests, above all the workspace in which the real scripts run."""

import atexit
import gc
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests import fault_injection, no_sync, warm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread only slows down models this small
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts background jobs with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)

fault_injection.enable()  # in this process; `tests/site` does both in the scripts that a `Workspace` runs
no_sync.skip_disk_sync()

if "GPT2_TESTS" not in os.environ:  # the workers of pytest-xdist inherit it
    os.environ["GPT2_TESTS"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["GPT2_TESTS"], ignore_errors=True)
FOR_ALL_WORKERS = Path(os.environ["GPT2_TESTS"])

ENVIRONMENT = dict(os.environ)  # before tests change it: scripts are forked from one server only if theirs is the same
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

TEXT = "".join(f"def function_{i}(argument):\n    return argument + {i * i}\n\n\n" for i in range(400))
TINY = [
    *("data=text", "data.files=[corpus.txt]", "data.tokenizer=bytes", "wandb=off", "train.precision=fp32"),
    *("model=gpt2_nano", "model.num_layers=1", "model.d_model=32", "model.d_ff=64", "model.context_length=32"),
    *("train.batch_size=4", "train.num_workers=0", "train.warmup_steps=2", "inference.max_new_tokens=12"),
    *("train.max_steps=8", "train.eval_every=4", "train.eval_batches=4", "train.log_every=2"),
]


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, because some tests mostly wait for other processes."""
    return (os.cpu_count() or 1) + 1


LONGEST = (
    "[hang@",
    "failed_and_lost_jobs",
    "test_no_fault_loses",
    "test_commands_run_in_order",
    "test_shakespeare_loss",
    "killed_worker_loses_only_its_own_trial",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that no core is idle while another one finishes a long test."""
    items.sort(key=lambda item: not any(name in item.name for name in LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Exclude imported modules from garbage collection, which would take most of a second at the end of each trial."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def as_expected(done: subprocess.CompletedProcess, code: int) -> subprocess.CompletedProcess:
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process makes and all of them share."""
    folder, is_made = FOR_ALL_WORKERS / name, FOR_ALL_WORKERS / f"{name} is made"
    with FileLock(f"{folder}.lock"):
        if not is_made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            is_made.touch()
    return folder


def measure_products(folder: Path) -> None:
    """Store this machine's fastest matrix product in a cache: separate measurements could make runs differ."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    measure = "from gpt2.ops.linear import faster_linear; faster_linear()"
    subprocess.run([sys.executable, "-c", measure], cwd=ROOT, env=environment, check=True)


class Workspace:
    """A folder to run the scripts in, with its own caches, no account, and a Hub that refuses connections."""

    def __init__(self, folder: Path):
        self.folder = folder
        hidden = {"WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN", "HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE"}
        self.environment = {
            **{name: value for name, value in ENVIRONMENT.items() if name not in hidden},
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HOME": str(folder / "cache" / "huggingface"),
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": fault_injection.SITE,
            "PYTHONUNBUFFERED": "1",
            "WANDB_MODE": "disabled",  # unless a test sets another mode
            "GPT2_WANDB_PATIENCE": "10",  # a busy machine must not take wandb offline
        }
        (folder / "home").mkdir(exist_ok=True)
        shutil.copytree(made_once("measured", measure_products), folder / "cache", dirs_exist_ok=True)

    def command(self, script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / script), *arguments]

    def run(self, script: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
        """Run a script of the repository here and check its exit code. The output is text."""
        return as_expected(warm.run([str(ROOT / script), *arguments], self.folder, self.environment, 600), expect)

    def run_anew(self, script: str, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
        """Like `run`, but in a new interpreter, with its own imports and hash seed."""
        return as_expected(self._started(*self.command(script, *arguments)), expect)

    def start(self, script: str, *arguments: str, **options: Any) -> warm.Process:
        """Start a script, or `-m` and a module, without waiting for its end."""
        place = script if script == "-m" else str(ROOT / script)
        return warm.Process([place, *arguments], self.folder, self.environment, **options)

    def on_terminal(self, *command: str, expect: int = 0) -> str:
        """Run a script, or `-m` and a module, on a terminal. Returns its exact output."""
        master, slave = pty.openpty()
        tty.setraw(slave)
        place, *arguments = command if command[0] == "-m" else (str(ROOT / command[0]), *command[1:])
        environment = {**self.environment, "TERM": "xterm", "COLUMNS": "200"}
        process = warm.Process([place, *arguments], self.folder, environment, terminal=slave)
        os.close(slave)
        sent = b""
        with suppress(OSError):  # Linux raises it once no process has the terminal open
            while data := os.read(master, 2**16):
                sent += data
        os.close(master)
        assert process.wait(600) == expect, sent
        return sent.decode()

    def module(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run `python -m` here, with any exit code."""
        return warm.run(["-m", *arguments], self.folder, self.environment, 600)

    def module_anew(self, *arguments: str) -> subprocess.CompletedProcess:
        return self._started(sys.executable, "-m", *arguments)

    def _started(self, *command: str) -> subprocess.CompletedProcess:
        streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        return subprocess.run(command, cwd=self.folder, env=self.environment, timeout=600, **streams)

    def cache_as_from_hub(self, name: str, folder: Path) -> Path:
        """Copy a folder to where `huggingface_hub` stores downloads."""
        repository = self.folder / "cache" / "huggingface" / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        return repository

    def runs(self) -> list[Path]:
        """The run folders, oldest first."""
        return sorted(self.folder.glob("outputs/runs/*/*"), key=lambda path: path.stat().st_mtime)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "corpus.txt").write_text(TEXT)
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with one finished run, for tests that do not change it. Its standard output is `trained.output`."""

    def train(folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run" / "corpus.txt").write_text(TEXT)
        done = Workspace(folder / "run").run_anew("train.py", *TINY, "wandb=offline", "sample_prompt=def f")
        (folder / "output").write_text(done.stdout)

    made = made_once("trained", train)
    workspace = Workspace(shutil.copytree(made / "run", tmp_path_factory.mktemp("trained") / "run", symlinks=True))
    workspace.output = (made / "output").read_text()
    return workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder by `save_pretrained` of transformers, of a small model without zeros or ones among its weights."""
    from tests.helpers import noisy_model, tiny_config, transformers_twin  # imports torch, which few tests need

    transformers_twin(noisy_model(tiny_config(vocab_size=257), std=0.1)).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"
