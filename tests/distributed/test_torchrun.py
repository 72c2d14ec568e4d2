"""Several ranks compute the same run as one process and end together: gloo on a CPU, with torchrun where needed."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.run_folder import LAST, newest_first
from gpt2.tracking.tracker import Record, read_about, read_metrics
from tests import warm
from tests.conftest import ROOT, TEXT, TINY, Workspace
from tests.test_scripts import wait_for
from tests.warm import Process

# 95 blocks in micro-batches of 4: the last one of an epoch has 3 blocks, and its step has no second micro-batch.
STEPS = ["train.batch_size=4", "train.accumulation_steps=2", "train.max_steps=16", "train.save_every=4"]
SAME = [*TINY, *STEPS, "train.log_every=1", "train.eval_batches=null", "train.seed=3"]
SLOW = pytest.mark.slow
LONG = ["train.max_steps=80", "train.max_epochs=20", "train.eval_every=40"]  # 7 s or more if it is slowed down
SLOW_DOWN = "slow@5-80"
DRY = [f"model.{name}=0" for name in ("dropout", "attention_dropout", "residual_dropout")]


class Torchrun(Process):
    """A script under torchrun, which gets the arguments that begin with --."""

    def __init__(self, workspace: Workspace, size: int, *arguments: str, script: str = "train.py", **environment: str):
        self.name = secrets.token_hex(8)
        options = [argument for argument in arguments if argument.startswith("--")]
        command = ["-m", "torch.distributed.run", f"--nproc_per_node={size}", *options]
        overrides = [argument for argument in arguments if argument not in options]
        super().__init__(
            [*command, str(ROOT / script), *overrides],
            workspace.folder,
            {**workspace.environment, **environment, "STARTED_BY": self.name},
        )


def finish(*torchruns: Torchrun, fails: bool = False) -> tuple[str, str]:
    """Wait for torchruns to end. Returns their output and errors, and checks that none of their processes remains."""
    try:
        printed = [process.communicate(timeout=240) for process in torchruns]
    finally:
        left = ranks_of(*torchruns)
        for process in torchruns:
            process.kill()
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
    out, err = ("".join(texts) for texts in zip(*printed, strict=True))
    assert all((process.returncode != 0) == fails for process in torchruns), out[-2000:] + err[-4000:]
    assert not left
    return out, err


def ranks_of(*torchruns: Torchrun) -> dict[int, int]:
    """The process ids of running ranks, found by their environment even if their torchrun is gone."""
    ranks = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(line.split("=", 1) for line in environ.read_text().split("\0") if "=" in line)
        except (OSError, UnicodeDecodeError):
            continue
        if variables.get("STARTED_BY") in {process.name for process in torchruns} and "RANK" in variables:
            ranks[int(variables["RANK"])] = int(environ.parent.name)
    return ranks


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start_ranks(
    workspace: Workspace, size: int, *arguments: str, script: str = "train.py", **environment: str
) -> list[Process]:
    """Start the ranks of a script without torchrun, forked from a process that has imported torch, which is faster."""
    port = free_port()
    return [
        Process(
            [str(ROOT / script), *arguments],
            workspace.folder,
            {
                **workspace.environment,
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(size)),
            },
        )
        for rank in range(size)
    ]


def run_ranks(
    workspace: Workspace, size: int, *arguments: str, script: str = "train.py", code: int = 0, **environment: str
) -> tuple[str, str]:
    """Run ranks without torchrun. Returns their output and errors, and checks that one has the expected exit code."""
    processes = start_ranks(workspace, size, *arguments, script=script, **environment)
    try:
        printed = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, err = ("".join(texts) for texts in zip(*printed, strict=True))
    codes = {process.returncode for process in processes}
    assert codes == {0} if code == 0 else code in codes, out[-2000:] + err[-4000:]
    return out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace for all tests of this file, so that runs can be compared."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus.txt").write_text((TEXT * 3)[:3400])
    return Workspace(folder)


def trained(place: Workspace, size: int, *more: str) -> Path:
    """The folder of a run with a number of ranks. Each run is made once."""
    name = "-".join(["run", str(size), *(word.rpartition("=")[2] for word in more)])
    if not (place.folder / name).exists():
        dropout = [] if more == tuple(LONG) else DRY
        run_ranks(place, size, *SAME, *dropout, *more, f"hydra.run.dir={name}")
    return place.folder / name


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    wait_for(lambda: any(newest_first(folder / "checkpoints")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


def numbers(folder: Path) -> list[Record]:
    """The metrics of a run without its speed."""
    timed = ("seconds", "train/tokens_per_second", "train/mfu")
    records = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def assert_close(one: Path, other: Path) -> None:
    """Assert that two runs have the same metrics, up to the rounding of sums in another order."""
    assert len(numbers(one)) == len(numbers(other)) > 16
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            exact = key in ("step", "tokens", "sample", "train/epoch", "train/learning_rate")
            close = a[key] if exact else pytest.approx(a[key], abs=1e-5, rel=1e-5 if key == "val/perplexity" else 0)
            assert b[key] == close, f"step {a['step']}: {key}"


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(checkpoint.read_tensors(folder / "checkpoints" / LAST, ""))


# ---------------------------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize(
    ("size", "more"),
    [(2, ["distributed.strategy=fsdp"]), pytest.param(2, [], marks=SLOW), pytest.param(4, [], marks=SLOW)],
    ids=["fsdp", "ddp", "ddp-4"],
)
def test_ranks_match_a_single_process(place, size, more):
    assert_close(trained(place, 1), trained(place, size, *more))


def test_torchrun_restarts_killed_ranks_which_resume_with_the_same_result(place):
    """The restarted run has the files and the weights of a run in a single process."""
    options = ["--max-restarts=1", "train.auto_resume=true", "hydra.run.dir=restarted"]
    single, restarted = trained(place, 1), place.folder / "restarted"
    out, err = finish(Torchrun(place, 2, *SAME, *DRY, *options, GPT2_FAULT="kill@7%1"))
    assert out.count("Resuming after step") == 1
    assert err.count("error: rank 0: lost the connection to another rank") == 1
    assert_close(single, restarted)
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (single, restarted)]
    assert files[0] == files[1]
    assert read_about(restarted)["machine"]["ranks"] == 2
    assert read_about(restarted)["state"] == "finished"
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(restarted)[name], tensor, atol=1e-5, rtol=1e-4, check_dtype=True)


@pytest.mark.slow
def test_fsdp_in_bf16_matches_ddp(place):
    """The loss is divided by the number of tokens, which bf16 rounds from 257 on: FSDP must not cast it."""
    options = [
        *SAME,
        *DRY,
        "train.precision=bf16",
        "train.max_steps=3",
        "train.batch_size=22",
        "model.context_length=27",
    ]
    for strategy in ("ddp", "fsdp"):
        run_ranks(place, 2, *options, f"distributed.strategy={strategy}", f"hydra.run.dir=bf16-{strategy}")
    ddp, fsdp = (numbers(place.folder / f"bf16-{strategy}") for strategy in ("ddp", "fsdp"))
    for a, b in zip(ddp, fsdp, strict=True):
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            assert key not in a or b[key] == pytest.approx(a[key], rel=1e-3), f"step {a['step']}: {key}"


@pytest.mark.slow
def test_model_trained_by_ranks_is_like_any_other(place):
    name = trained(place, 2, "distributed.strategy=fsdp").name
    single = place.run("evaluate.py", f"checkpoint={name}", "wandb=off", "output=single.json").stdout
    out, _ = run_ranks(place, 2, f"checkpoint={name}", "wandb=off", "output=two.json", script="evaluate.py")
    assert out.count("perplexity") == 1
    one, two = ((place.folder / f"{output}.json").read_text() for output in ("single", "two"))
    assert one.splitlines()[1] == two.splitlines()[1] and '"loss"' in one.splitlines()[1]  # to the last bit
    assert "windows of" in single
    assert place.run("generate.py", f"checkpoint={name}", "prompt=def").stdout.startswith("def")
    place.module("gpt2.main", "export", f"checkpoint={name}", "to=exported")
    assert (place.folder / "exported" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Failures

FAILURES = {  # the fault: the error line of a rank, and the root cause in torchrun's report
    "kill@7%1": ("error: rank 0: lost the connection to another rank", "Signal 9 (SIGKILL) received"),
    "exception@7%0": ("RuntimeError: on purpose", "RuntimeError: on purpose"),
    "nan_gradient@7%1": ("error: rank 0: step 7 (", "the gradient of final_norm.weight is not finite"),
    "out_of_memory@7%1": ("error: rank 1: out of memory: CUDA", "rank 1: out of memory: CUDA"),
    "hang@7%1": ("error: rank 0: another rank did not answer", "another rank did not answer within"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAILURES)
def test_failure_of_one_rank_ends_all_and_leaves_the_checkpoint_intact(place, fault):
    name = fault.replace("%", "-")
    options = [*SAME, *DRY, f"hydra.run.dir={name}"]
    if fault.startswith("hang"):  # a hanging rank ignores SIGTERM too
        options += ["distributed.timeout=20", "--shutdown_timeout=2"]
    _, err = finish(Torchrun(place, 2, *options, GPT2_FAULT=fault), fails=True)
    printed, _, report = err.partition("ChildFailedError")
    line, cause = FAILURES[fault]
    assert line in printed
    assert cause in report.partition("Root Cause")[2]
    about = read_about(place.folder / name)
    assert (about["state"], about["exit_code"]) == (("diverged", 3) if "nan" in fault else ("failed", 1))
    if fault.startswith(("kill", "hang")):  # in the words of the error line, not of gloo
        assert line.partition(": ")[2].partition(": ")[2] in about["reason"]
    if fault != "exception@7%0":
        assert "Step 4 is saved" in (place.folder / name / "train.log").read_text().splitlines()[-1]
    assert checkpoint.verify(newest_first(place.folder / name / "checkpoints")[0])["progress"]["step"] == 4


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_resumes_bit_for_bit(place):
    whole, stopped = trained(place, 2, *LONG), place.folder / "stopped"
    process = Torchrun(place, 2, *SAME, *LONG, "hydra.run.dir=stopped", GPT2_FAULT=SLOW_DOWN)
    wait_for_checkpoint(stopped, process)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, fails=True)
    assert err.count("Interrupted: finishing this step") == 1
    assert read_about(stopped)["state"] == "interrupted"
    assert "Resume with:  torchrun --nproc_per_node=2 train.py resume=stopped" in out
    run_ranks(place, 2, "resume=stopped")
    assert numbers(stopped) == numbers(whole)
    before, after = weights(whole), weights(stopped)
    assert "random/rank1/cpu" in before  # dropout masks differ between ranks
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_run_resumes_with_another_number_of_ranks(place):
    whole = trained(place, 2)
    broken = place.folder / "broken"
    run_ranks(place, 2, *SAME, *DRY, "hydra.run.dir=broken", code=1, GPT2_FAULT="exception@7%1")
    for size, more in ((1, []), (4, []), (2, ["distributed.strategy=fsdp"])):
        resumed = place.folder / f"broken-{size}"
        shutil.copytree(broken, resumed)
        run_ranks(place, size, f"resume={resumed.name}", *more)
        assert_close(whole, resumed)
    run_ranks(place, 2, "resume=broken")
    assert numbers(broken) == numbers(whole)


def test_skipped_checkpoint_is_reported_by_rank_0_only(place):
    damaged = place.folder / "damaged"
    shutil.copytree(trained(place, 1), damaged)
    newest = next(iter(newest_first(damaged / "checkpoints")))
    newest.write_bytes(newest.read_bytes()[:-100])
    out, err = run_ranks(place, 2, "resume=damaged")
    assert out.count(f"{newest.name} is damaged") == 1
    assert f"{newest.name} is damaged" in (damaged / "train.log").read_text()
    assert f"{newest.name} is damaged" not in err


@pytest.mark.slow
def test_ranks_of_two_machines_are_restarted_together(place):
    """Two torchruns, as on two machines. The rank of one is killed, the rank of the other loses the connection."""
    whole, restarted = trained(place, 2), place.folder / "machines"
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=1", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    options = [*SAME, *DRY, *meeting, "hydra.run.dir=machines", "train.auto_resume=true", "--max-restarts=1"]
    _, err = finish(*(Torchrun(place, 1, *options) for _ in range(2)), fails=True)
    assert "error: rank 0: torchrun: --max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP" in err
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    out, _ = finish(
        Torchrun(place, 1, *options, **fresh_store, GPT2_FAULT="kill@7"), Torchrun(place, 1, *options, **fresh_store)
    )
    assert out.count("Resuming after step") == 1
    assert numbers(restarted) == numbers(whole)


@pytest.mark.slow
def test_mistake_is_reported_once_before_any_work(place):
    _, err = finish(Torchrun(place, 2, *SAME, "train.batch_size=3", "train.accumulation_steps=1"), fails=True)
    assert err.count("error: ") == 1
    assert err.count("cannot be divided over 2 ranks") == 2  # in this line and in torchrun's report
    for arguments, script in ((["-m", *SAME, "train.seed=1,2"], "train.py"), (["prompt=a"], "generate.py")):
        _, err = run_ranks(place, 2, *arguments, script=script, code=2)
        (line,) = err.splitlines()
        assert "torchrun is for single runs" in line
    assert not (place.folder / "outputs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Slurm and the library

SLURM = {  # the commands of Slurm that the script calls
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo localhost; fi',
    "torchrun": f'exec {ROOT}/tests/warm_python -m torch.distributed.run "$@"',
}


@pytest.mark.slow
def test_slurm_script_saves_when_warned_and_requeues_itself(place):
    whole = trained(place, 2, *LONG)
    commands = place.folder / "slurm"
    commands.mkdir()
    for name, line in SLURM.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    script = (ROOT / "docs" / "torchrun.sbatch").read_text().replace("train.py train", f"{ROOT}/train.py train")
    assert str(ROOT) in script
    (place.folder / "job").write_text(script.replace(":29500", ":0"))
    environment = {
        **place.environment,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "WARM_SERVER": warm.server_for(place.environment),
        "WARM_PYTHON": sys.executable,
        "GPT2_FAULT": SLOW_DOWN,
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1]",
    }
    command = ["bash", "job", *SAME, *LONG, "hydra.run.dir=requeued-run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(command, cwd=place.folder, env=environment, **pipes)
    wait_for_checkpoint(place.folder / "requeued-run", job)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=240)
    assert "Interrupted: finishing this step" in err
    assert (place.folder / "requeued").read_text() == "7\n"
    (place.folder / "requeued").unlink()
    del environment["GPT2_FAULT"]
    again = subprocess.run(command, cwd=place.folder, env=environment, **pipes, timeout=240)
    assert again.returncode == 0, again.stderr
    assert not (place.folder / "requeued").exists()
    assert numbers(place.folder / "requeued-run") == numbers(whole)


LIBRARY = """
import sys, torch
from torch.utils.data import DataLoader
from gpt2.config import GPT2Config, TrainingConfig
from gpt2.distributed.process_group import init_distributed
from gpt2.model import GPT2Model
from gpt2.train import Trainer

with init_distributed(120, "cpu") as group:
    shape = GPT2Config(vocab_size=50, context_length=8, d_model=16, num_heads=2, num_layers=1, d_ff=16)
    torch.manual_seed(0 if sys.argv[1] == "same" else group.rank)
    batches = DataLoader(torch.randint(50, (6, 4, 8)), batch_size=None)
    torch.manual_seed(1)
    config = TrainingConfig(device="cpu", precision="fp32", max_epochs=1, warmup_steps=1, log_every=2)
    trainer = Trainer(GPT2Model(shape), batches, batches, config, sys.argv[1], group=group)
    trainer.train()
    print(f"rank {group.rank}: {trainer.progress.step} steps, {trainer.validate():.6f}\\n", end="")
"""


@pytest.mark.slow
def test_library_trains_on_ranks_and_rejects_different_data(place):
    library = place.folder / "library.py"
    library.write_text(LIBRARY)
    out, _ = run_ranks(place, 2, "same", script=str(library))
    first, second = sorted(line for line in out.splitlines() if line.startswith("rank"))
    assert first.removeprefix("rank 0") == second.removeprefix("rank 1")
    _, err = run_ranks(place, 2, "other", script=str(library), code=1)
    assert "the ranks read different tokens at the same place" in err
