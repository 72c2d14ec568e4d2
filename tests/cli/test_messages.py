"""Expected failures are one line, with settings that need less memory."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2.checkpoint.run_folder import LAST, step_name
from gpt2.cli import messages
from gpt2.cli.messages import explain_failure, notes, planned_computation, settings_without_effect, size_of_run
from gpt2.config import DataConfig, GPT2Config, TrainingConfig, TrainRun
from gpt2.errors import DivergenceError, ResourceError, is_out_of_memory, machine_error
from gpt2.model import meta_model
from gpt2.runtime import device
from gpt2.runtime.device import Precision
from gpt2.training.compile import ComputePlan
from gpt2.training.cost import Work
from tests.helpers import tiny_config

RESUME = "python train.py resume=outputs/runs/a/1"


def raised(function, *arguments, **options) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*arguments, **options)
    return caught.value


OUT_OF_MEMORY = {
    "python": lambda: raised(lambda: bytearray(2**62)),
    "numpy": lambda: raised(np.zeros, 2**60, dtype=np.uint8),
    "torch_cpu": lambda: raised(torch.empty, 2**60, dtype=torch.uint8),
    "torch_cuda": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.1 GiB.\nSee documentation."
    ),
    "bare": MemoryError,
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line(kind):
    error = OUT_OF_MEMORY[kind]()
    assert is_out_of_memory(error)
    message = machine_error(error)
    assert message.startswith("out of memory: ")
    assert message.removeprefix("out of memory: ").strip()
    assert "\n" not in message
    assert "See documentation" not in message


def test_out_of_memory_names_requested_size():
    assert "1152921504606846976 bytes" in machine_error(OUT_OF_MEMORY["torch_cpu"]())
    assert "Tried to allocate 20.00 MiB" in machine_error(OUT_OF_MEMORY["torch_cuda"]())
    assert machine_error(MemoryError()) == "out of memory: MemoryError"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_names_reason_and_path(tmp_path, number):
    path = tmp_path / "not there yet" / "step.pth"
    message = machine_error(OSError(number, os.strerror(number), str(path)))
    assert re.fullmatch(rf"{os.strerror(number)}: {re.escape(str(path))} \([\d,.]+ MB are free there\)", message)
    assert machine_error(OSError(number, os.strerror(number))) == os.strerror(number)
    assert machine_error(OSError(number, os.strerror(number), 3)) == os.strerror(number)  # a descriptor
    assert not is_out_of_memory(OSError(number, os.strerror(number)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_disk():
    def write():
        with Path("/dev/full").open("w") as file:
            file.write("x")

    assert machine_error(raised(write)) == os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("no space left"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("can't allocate memory"),
        KeyboardInterrupt(),
        DivergenceError("step 3"),
    ],
)
def test_other_errors_are_not_explained(tmp_path, error):
    assert machine_error(error) is None
    assert (
        isinstance(error, DivergenceError | KeyboardInterrupt)
        or explain_failure(error, TrainRun(), tmp_path, RESUME) is None
    )


def test_explaining_memory_needs_no_torch():
    code = (
        "import sys; from gpt2.errors import machine_error; print(machine_error(MemoryError('x')));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "out of memory: x\n"


def test_warmup_that_is_longer_than_the_run_is_noted():
    run = TrainRun(train=TrainingConfig(warmup_steps=100, beta1=0.8))
    assert notes(run, 99) == [
        "train.warmup_steps=100 is longer than the run: the learning rate never reaches its peak; "
        "train.warmup_steps=9 would be a tenth of the steps"
    ]
    assert notes(run, 100) == notes(run, None) == []


def test_run_that_its_epochs_end_early_is_noted():
    run = TrainRun(train=TrainingConfig(max_epochs=10, max_steps=200, warmup_steps=0))
    assert notes(run, 80) == ["train.max_epochs=10 ends the run after 80 steps, before train.max_steps=200"]
    assert notes(run, 200) == []


def test_settings_without_effect_are_noted():
    config = TrainRun(model=GPT2Config(mup_base_width=64), train=TrainingConfig(decay_fraction=0.5))
    assert settings_without_effect(config) == [
        "model.mup_base_width=64 has no effect without model.parametrization=mup",
        "train.decay_fraction=0.5 has no effect without train.lr_schedule=wsd",
    ]
    config.model.parametrization, config.train.lr_schedule = "mup", "wsd"
    assert settings_without_effect(config) == settings_without_effect(TrainRun()) == []


def run_of(batch_size: int, accumulation_steps: int = 1) -> TrainRun:
    train = TrainingConfig(batch_size=batch_size, accumulation_steps=accumulation_steps, learning_rate=3e-4)
    return TrainRun(train=train, data=DataConfig(max_length=512))


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 8, 9, 12, 15, 35, 49, 97, 1000])
@pytest.mark.parametrize("accumulation_steps", [1, 3, 16])
def test_proposed_settings_keep_step_size(tmp_path, batch_size, accumulation_steps):
    message = str(explain_failure(MemoryError(), run_of(batch_size, accumulation_steps), tmp_path, RESUME))
    [proposal] = re.findall(r"(train\.batch_size=(\d+) train\.accumulation_steps=(\d+)) makes the same steps", message)
    smaller, more = int(proposal[1]), int(proposal[2])
    assert smaller * more == batch_size * accumulation_steps
    assert 1 <= smaller < batch_size
    assert smaller >= batch_size // 2 or all(batch_size % n for n in range(smaller + 1, batch_size))  # the next smaller
    assert f"A pass had train.batch_size={batch_size} blocks of data.max_length=512 tokens" in message
    assert f"a step had train.accumulation_steps={accumulation_steps} passes" in message


def test_batch_of_one_proposes_gradient_checkpointing(tmp_path):
    message = str(explain_failure(MemoryError(), run_of(1), tmp_path, RESUME))
    assert "train.gradient_checkpointing=true makes the same steps in less memory" in message
    assert "and so does" not in message
    assert "accumulation_steps=1 passes" in message


def test_active_setting_is_not_proposed(tmp_path):
    config = run_of(1)
    config.train.gradient_checkpointing = True
    assert "train.gradient_checkpointing=true" not in str(explain_failure(MemoryError(), config, tmp_path, RESUME))


@pytest.mark.parametrize(
    ("error", "kind", "exit_code", "command"),
    [
        (
            DivergenceError("step 9: the loss is nan"),
            DivergenceError,
            3,
            "train.learning_rate=0.00015 resume_changes=true",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, 1, ""),
        (MemoryError(), ResourceError, 1, "train.batch_size=4 train.accumulation_steps=2 resume_changes=true"),
    ],
)
def test_resume_command_follows_if_checkpoint_exists(tmp_path, error, kind, exit_code, command):
    nothing = explain_failure(error, run_of(8), tmp_path, RESUME)
    assert (type(nothing), nothing.exit_code) == (kind, exit_code)
    assert "resume with" not in str(nothing)
    (tmp_path / "checkpoints").mkdir()
    for name in (step_name(999), step_name(1200), LAST):
        (tmp_path / "checkpoints" / name).touch()
    saved = explain_failure(error, run_of(8), tmp_path, RESUME)
    assert type(saved) is kind
    assert str(saved).startswith(str(nothing))
    assert str(saved).endswith(f". Step 1,200 is saved, resume with: {RESUME} {command}".rstrip())
    assert len(saved.problems) == 1
    assert "\n" not in saved.problems[0]


def test_faster_precision_of_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(messages, "memory_of", lambda _: 16e9)
    gpu = torch.device("cuda")
    work = Work(meta_model(tiny_config()), TrainingConfig(precision="bf16"), 8, ranks=1, is_sharded=False)
    text = size_of_run(work, ComputePlan(gpu, Precision("bf16", gpu), "PyTorch", compiled=False), "ddp", 1, "")
    assert "On      Tesla T4, bf16, which this device emulates: train.precision=fp16 is faster\n" in text


@pytest.mark.parametrize(
    ("precision", "computes", "expected"),
    [
        ("auto", True, "bf16, which is faster on this CPU (train.precision=fp32 is exact)"),
        ("auto", False, "fp32"),
        ("bf16", True, "bf16"),
        ("bf16", False, "bf16, which this device emulates: train.precision=fp32 is faster"),
    ],
)
def test_precision_of_a_run_is_announced(precision, computes, expected, monkeypatch):
    monkeypatch.setattr(device, "computes_in_bf16", lambda _: computes)
    train = TrainingConfig(device="cpu", precision=precision)
    work = Work(meta_model(tiny_config()), train, 8, ranks=1, is_sharded=False)
    text = size_of_run(work, planned_computation(work, 1), "ddp", 1, "")
    assert re.search(r"^On +cpu, \d+ threads?, (.+)$", text, re.MULTILINE)[1] == expected
