"""Several ranks are one run: the same numbers, one set of files, one end. With gloo, on the CPU."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from math import gcd
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.run_folder import LAST, newest_first
from gpt2.config import DistributedConfig, TrainingConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import UserError
from gpt2.ops.cross_entropy import IGNORE_INDEX
from gpt2.runtime.dist_env import DistEnv, dist_env, division
from gpt2.tracking.tracker import Record, read_about, read_metrics
from gpt2.validation import validate_distributed
from tests.conftest import ROOT, TEXT, TINY, Workspace
from tests.warm import Process

# 95 blocks in micro-batches of 4: the last of an epoch has 3, for 4 ranks, and the step that it is in has no second.
STEPS = ["train.batch_size=4", "train.accumulation_steps=2", "train.max_steps=16", "train.save_every=4"]
SAME = [*TINY, *STEPS, "train.log_every=1", "train.eval_batches=null", "train.seed=3"]
DRY = [f"model.{name}=0" for name in ("dropout", "attention_dropout", "residual_dropout")]


def torchrun(workspace: Workspace, group: int, *arguments: str, script: str = "train.py", **environment: str):
    """Start a script by torchrun, as a process that leads a group of its own."""
    options = [text for text in arguments if text.startswith("--")]  # torchrun's
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={group}", *options]
    return subprocess.Popen(
        [*command, *workspace.command(script, *(text for text in arguments if text not in options))[1:]],
        cwd=workspace.folder,
        env={**workspace.environment, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(workspace: Workspace, group: int, *arguments: str, fails: bool = False, **options: str) -> tuple[str, str]:
    """What `torchrun` prints, standard output and error, to its end."""
    process = torchrun(workspace, group, *arguments, **options)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode != 0) == fails, out[-2000:] + err[-4000:]
    return out, err


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(workspace: Workspace, group: int, *arguments: str, script: str = "train.py", **more: str) -> list[Process]:
    """The ranks of a script, started one by one, as schedulers do that are not torchrun: in a tenth of the time."""
    port = free_port()
    return [
        Process(
            [str(ROOT / script), *arguments],
            workspace.folder,
            {
                **workspace.environment,
                **more,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(group)),
            },
        )
        for rank in range(group)
    ]


def ends(processes: list[Process], *codes: int) -> tuple[str, str]:
    """What the ranks print, one after the other; all have ended with one of these exit codes, or 0."""
    try:
        printed = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    out, err = ("".join(texts) for texts in zip(*printed, strict=True))
    assert {process.returncode for process in processes} <= set(codes or (0,)), out[-2000:] + err[-4000:]
    return out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose text ends in the middle of everything, and what was trained on it by the numbers of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus.txt").write_text((TEXT * 3)[:3400])
    return Workspace(folder)


def trained(place: Workspace, group: int, *more: str) -> Path:
    """The run of so many ranks; each is made once."""
    name = "-".join(["run", str(group), *(word.rpartition("=")[2] for word in more)])
    if not (place.folder / name).exists():
        ends(start(place, group, *SAME, *DRY, *more, f"hydra.run.dir={name}"))
    return place.folder / name


def wait_for_step_4(folder: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not (folder / "checkpoints" / "step_00000004.pth").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def numbers(folder: Path) -> list[Record]:
    """All that a run has told but how fast it was."""
    told = read_metrics(folder / "metrics.jsonl")
    fast = ("seconds", "train/tokens_per_second", "train/mfu")
    return [{key: value for key, value in record.items() if key not in fast} for record in told]


def assert_close(one: Path, other: Path) -> None:
    assert len(numbers(one)) == len(numbers(other)) > 16
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            exact = key in ("step", "tokens", "sample", "train/epoch", "train/learning_rate")
            close = a[key] if exact else pytest.approx(a[key], abs=1e-5, rel=1e-5 if key == "val/perplexity" else 0)
            assert b[key] == close, f"step {a['step']}: {key}"


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(checkpoint.read_tensors(folder / "checkpoints" / LAST, ""))


# Who computes what


@pytest.mark.parametrize("group", range(1, 7))
def test_ranks_share_each_row_of_a_step_once_and_make_as_many_passes(group):
    for accumulation, batches in product(range(1, 7), range(1, 7)):
        parts = division(accumulation, group)[1]
        assert parts * gcd(accumulation, group) == group
        for last in range(1, 2 * parts + 1):
            sizes = [*[2 * parts] * (min(batches, accumulation) - 1), last]
            rows = torch.arange(sum(sizes)).split(sizes)
            step = [{"input_ids": r[:, None], "targets": r[:, None]} for r in rows]
            shares = [ProcessGroup(DistEnv(rank, group)).shard(step, accumulation) for rank in range(group)]
            assert len({len(share) for share in shares}) == 1
            computed = torch.cat([batch["targets"] for share in shares for batch in share]).flatten()
            assert sorted(computed[computed != IGNORE_INDEX].tolist()) == list(range(sum(sizes)))
            assert all(len(batch["input_ids"]) for share in shares for batch in share)


def test_what_ranks_cannot_do_is_told_with_what_they_can():
    def told(started: DistEnv, strategy: str = "ddp", **train) -> list[str]:
        return validate_distributed(DistributedConfig(strategy), TrainingConfig(**train), started)

    four = DistEnv(0, 4, 0, 4, by_torchrun=True)
    assert told(four) == told(four, batch_size=2, accumulation_steps=2) == told(DistEnv(), batch_size=3) == []
    (fault,) = told(four, batch_size=6)
    assert "6 * train.accumulation_steps=1 blocks cannot be divided over 4 ranks, 4 or 8 * 1 can" in fault
    (fault,) = told(four, batch_size=1, accumulation_steps=6)
    assert fault.endswith("over 4 ranks, 2 * 6 can")
    assert told(DistEnv(), "fsdp", optimizer="muon") == []  # alone there is nothing to divide: it goes on, resumed
    assert len(told(four, "fsdp", precision="fp16", optimizer="muon", compile=True)) == 3
    assert [fault.split(":")[0] for fault in told(four, device="cuda:1")] == ["train.device"]
    (fault,) = validate_distributed(DistributedConfig(timeout=1), TrainingConfig(), DistEnv())
    assert fault.startswith("distributed.timeout: 1")


def test_half_of_what_torchrun_says_is_a_mistake(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT"):
        dist_env.__wrapped__()


# The same run


def test_two_ranks_of_torchrun_are_one_run(place):
    run(place, 2, *SAME, *DRY, "hydra.run.dir=torchrun-2")
    alone, two = trained(place, 1), place.folder / "torchrun-2"
    assert_close(alone, two)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (alone, two)]
    assert names[0] == names[1]  # not a file more
    assert read_about(two)["machine"]["ranks"] == 2
    assert (two / "train.log").read_text().count("step 1/16") == 1
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(two)[name], tensor, atol=1e-5, rtol=1e-4, check_dtype=True)


@pytest.mark.parametrize("group, more", [(4, []), (2, ["distributed.strategy=fsdp"])], ids=["4", "2-fsdp"])
def test_any_number_of_ranks_is_the_same_run(place, group, more):
    assert_close(trained(place, 1), trained(place, group, *more))


@pytest.mark.slow
def test_what_ranks_have_trained_is_evaluated_and_written_with_as_anything_else(place):
    two = trained(place, 2, "distributed.strategy=fsdp").name
    alone = place.run("evaluate.py", f"checkpoint={two}", "wandb=off", "output=alone.json").stdout
    out, _ = ends(start(place, 2, f"checkpoint={two}", "wandb=off", "output=two.json", script="evaluate.py"))
    assert out.count("perplexity") == 1
    one, other = ((place.folder / f"{name}.json").read_text() for name in ("alone", "two"))
    assert one.splitlines()[1] == other.splitlines()[1] and '"loss"' in one.splitlines()[1]  # to the last bit
    assert "windows of" in alone
    assert place.run("generate.py", f"checkpoint={two}", "prompt=def").stdout.startswith("def")
    place.module("gpt2.main", "export", f"checkpoint={two}", "to=exported")
    assert (place.folder / "exported" / "model.safetensors").exists()


def test_parts_in_16_bits_come_to_the_loss_of_the_whole(place):
    """The loss is divided by a number of tokens that 16 bits do not hold: 257 and more are rounded there."""
    asked = [*SAME, *DRY, "train.precision=bf16", "train.max_steps=3", "train.batch_size=22", "model.context_length=27"]
    for strategy in ("ddp", "fsdp"):
        ends(start(place, 2, *asked, f"distributed.strategy={strategy}", f"hydra.run.dir=bf16-{strategy}"))
    whole, parts = (numbers(place.folder / f"bf16-{strategy}") for strategy in ("ddp", "fsdp"))
    for a, b in zip(whole, parts, strict=True):
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            assert key not in a or b[key] == pytest.approx(a[key], rel=1e-3), f"step {a['step']}: {key}"


# Going on


@pytest.mark.slow
def test_a_run_that_broke_goes_on_with_any_number_of_ranks(place):
    whole = trained(place, 2)
    broken = start(place, 2, *SAME, *DRY, "hydra.run.dir=broken", GPT2_FAULT="exception@7%1")
    _, err = ends(broken, 1)
    assert "rank 1: RuntimeError: on purpose. Step 4 is saved, resume with: torchrun --nproc_per_node=2" in err
    for group, more in ((1, []), (4, []), (2, ["distributed.strategy=fsdp"])):
        name = f"broken-{group}"
        shutil.copytree(place.folder / "broken", place.folder / name)
        ends(start(place, group, f"resume={name}", *more))
        assert_close(whole, place.folder / name)
    ends(start(place, 2, "resume=broken"))
    assert numbers(place.folder / "broken") == numbers(whole)


@pytest.mark.slow
def test_the_same_number_of_ranks_goes_on_to_the_bit(place):
    whole, stopped = (place.folder / name for name in ("whole", "stopped"))
    ends(start(place, 2, *SAME, f"hydra.run.dir={whole}"))  # with dropout: each rank draws its own
    process = torchrun(place, 2, *SAME, f"hydra.run.dir={stopped}", GPT2_FAULT="slow@5-16")
    wait_for_step_4(stopped, process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert err.count("Interrupted: finishing this step") == 1
    assert read_about(stopped)["state"] == "interrupted"
    assert "Resume with:  torchrun --nproc_per_node=2 train.py resume=stopped" in out
    ends(start(place, 2, "resume=stopped"))
    assert numbers(stopped) == numbers(whole)
    before, after = weights(whole), weights(stopped)
    assert "random/rank1/cpu" in before
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_what_is_killed_on_one_machine_is_started_again_on_all_and_goes_on_by_itself(place):
    """Two torchruns, as on two machines; they count their attempts each in its own way."""
    whole = trained(place, 2)
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=1", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    again = [*SAME, *DRY, "hydra.run.dir=restarted", "train.auto_resume=true", "--max-restarts=1"]
    machines = [torchrun(place, 1, *meeting, *again, GPT2_FAULT="slow@5-16") for _ in range(2)]
    wait_for_step_4(place.folder / "restarted", machines[0])
    os.kill(rank_of({machine.pid for machine in machines}, 1), signal.SIGKILL)
    printed = [machine.communicate(timeout=120) for machine in machines]
    out, err = ("".join(texts) for texts in zip(*printed, strict=True))
    assert {machine.returncode for machine in machines} == {0}, err
    assert out.count("Resuming after step") == 1
    assert numbers(place.folder / "restarted") == numbers(whole)


SLURM = {  # its commands, as far as the script asks for them
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" > requeued; else echo localhost; fi',
}


@pytest.mark.slow
def test_the_script_for_slurm_saves_when_it_is_warned_and_has_itself_requeued(place):
    whole = trained(place, 2)
    commands = place.folder / "slurm"
    commands.mkdir()
    for name, lines in {**SLURM, "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{lines}\n")
        (commands / name).chmod(0o755)
    script = (ROOT / "docs" / "torchrun.sbatch").read_text().replace("train.py train", f"{ROOT}/train.py train")
    assert str(ROOT) in script
    (place.folder / "job").write_text(script.replace(":29500", ":0"))
    environment = {
        **place.environment,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "GPT2_FAULT": "slow@5-16",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1]",
    }
    arguments = ["bash", "job", *SAME, *DRY, "hydra.run.dir=requeued-run"]
    printing = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(arguments, cwd=place.folder, env=environment, **printing)
    wait_for_step_4(place.folder / "requeued-run", job)
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert "Interrupted: finishing this step" in err
    assert (place.folder / "requeued").read_text() == "7\n"
    (place.folder / "requeued").unlink()
    again = subprocess.run(arguments, cwd=place.folder, env=environment, **printing, timeout=120)
    assert again.returncode == 0, again.stderr
    assert not (place.folder / "requeued").exists()
    assert numbers(place.folder / "requeued-run") == numbers(whole)


def rank_of(torchruns: set[int], rank: int) -> int:
    """The process of a rank."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            environment = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent.split()[1]) in torchruns and f"RANK={rank}".encode() in environment:
            return int(status.parent.name)
    raise AssertionError(f"there is no rank {rank}")


# The same end

FAULTS = {  # what happens to a rank: what is printed
    "kill@7%1": "error: rank 0: lost the connection to another rank",
    "exception@7%0": "RuntimeError: on purpose",
    "nan_gradient@7%1": "step 7 (batches 13 to 14 of epoch 1): the gradient of final_norm.weight is not finite",
    "memory_error@7%1": "error: rank 1: out of memory",
    "hang@7%1": "error: rank 0: another rank did not answer within distributed.timeout",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_failure_of_one_rank_ends_all_and_leaves_the_checkpoint_intact(place, fault):
    name = fault.replace("%", "-")
    arguments = [*SAME, *DRY, f"hydra.run.dir={name}", "distributed.timeout=10"]
    _, err = run(place, 2, *arguments, fails=True, GPT2_FAULT=fault)
    assert FAULTS[fault] in err
    saved = newest_first(place.folder / name / "checkpoints")[0]
    assert checkpoint.verify(saved)["progress"]["step"] == 4


@pytest.mark.slow
def test_a_mistake_is_told_once_before_any_work(place):
    for arguments, script, words in (
        ([*SAME, "train.batch_size=3", "train.accumulation_steps=1"], "train.py", "cannot be divided over 2 ranks"),
        (["-m", *SAME, "train.seed=1,2"], "train.py", "torchrun is for single runs"),
        (["prompt=a"], "generate.py", "torchrun is for single runs"),
    ):
        _, err = ends(start(place, 2, *arguments, script=script), 2)
        assert err.count("error: ") == 1
        assert words in err
    assert not (place.folder / "outputs").exists()


OTHER_DATA = """
import sys, torch
from torch.utils.data import DataLoader
from gpt2.config import GPT2Config, TrainingConfig
from gpt2.distributed.process_group import init_distributed
from gpt2.model import GPT2Model
from gpt2.train import Trainer

with init_distributed(20, "cpu") as ranks:
    shape = GPT2Config(vocab_size=50, context_length=8, d_model=16, num_heads=2, num_layers=1, d_ff=16)
    same = sys.argv[1] == "same"
    torch.manual_seed(0 if same else ranks.rank)
    batches = DataLoader(torch.randint(50, (6, 4, 8)), batch_size=None)
    torch.manual_seed(1)
    config = TrainingConfig(device="cpu", precision="fp32", max_epochs=1, warmup_steps=1, log_every=2)
    trainer = Trainer(GPT2Model(shape), batches, batches, config, sys.argv[2], group=ranks)
    trainer.train()
    print(f"rank {ranks.rank}: {trainer.progress.step} steps, {trainer.validate():.6f}\\n", end="")
"""


@pytest.mark.slow
def test_the_library_trains_with_ranks_and_other_data_on_one_of_them_are_noticed(place):
    library = place.folder / "library.py"
    library.write_text(OTHER_DATA)
    out, _ = ends(start(place, 2, "same", "same", script=str(library)))
    first, second = sorted(line for line in out.splitlines() if line.startswith("rank"))
    assert first.removeprefix("rank 0") == second.removeprefix("rank 1")
    _, err = ends(start(place, 2, "other", "other", script=str(library)), 1, 2)
    assert "the ranks have read other tokens at the same place" in err
