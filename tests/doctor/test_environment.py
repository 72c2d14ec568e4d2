"""The rows for machines that lack something."""

import errno
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch

from gpt2.doctor import environment
from gpt2.doctor.environment import CHECKS
from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Machine, Row
from gpt2.runtime import device, hub

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    """This machine, in an empty folder, with an empty cache and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "nvidia_smi", list)
    monkeypatch.setattr(environment, "WRITTEN_BYTES", 8000)
    monkeypatch.setattr(environment, "MIN_WRITTEN_PER_SECOND", 0)  # no test depends on the speed of this machine
    return Machine(CPU, tmp_path)


def row(machine: Machine, name: str) -> Row:
    found = CHECKS[name](machine)
    assert found is not None
    assert found.status == OK or found.advice
    return found


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ("Weights & Biases", "Hugging Face Hub")])
def test_this_machine_is_not_wrong(machine, name):
    assert row(machine, name).status != WRONG


def test_outputs_are_not_left_behind(machine):
    assert row(machine, "outputs/").value.endswith("(outputs)")
    assert not (machine.folder / "outputs").exists()


def test_versions_that_differ(machine, monkeypatch):
    real = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: "9.9" if name == "numpy" else real(name))
    found = row(machine, "packages")
    assert found.status == MISSING
    assert found.figures["others"]["numpy"] == "9.9"
    assert "constraints.txt" in found.advice
    monkeypatch.setattr(environment, "installed_version", lambda name: "2.12.0" if name == "torch" else real(name))
    assert row(machine, "packages").status == WRONG  # pyproject.toml requires one version
    assert "torch==2.13.0" in row(machine, "packages").value
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "einops" else real(name))
    assert "einops" in row(machine, "packages").value


def test_few_open_files(machine, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    found = row(machine, "open files")
    assert (found.status, found.value) == (MISSING, "256")
    assert "ulimit -n 4096" in found.advice
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert row(machine, "open files").status == OK


def test_no_compiler(machine, monkeypatch):
    monkeypatch.setenv("PATH", str(machine.folder))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    found = row(machine, "C compiler")
    assert (found.status, found.value) == (MISSING, "none")
    assert "apt install g++" in found.advice


@pytest.mark.parametrize("name", ["outputs/", "cache", "shared memory"])
def test_little_space(machine, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    found = row(machine, name)
    assert found.status == MISSING
    assert "5.0 MB free" in found.value


def test_no_space_and_no_right_to_write(machine, monkeypatch):
    (machine.folder / "outputs").write_text("")
    found = row(machine, "outputs/")
    assert (found.status, found.value) == (
        WRONG,
        "outputs: cannot write to outputs: not a folder; choose another place",
    )
    (machine.folder / "outputs").unlink()

    def full(_folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(environment, "written_per_second", full)
    found = row(machine, "outputs/")
    assert (found.status, found.value) == (WRONG, "outputs: No space left on device")
    assert "free some space" in found.advice


def test_slow_disk(machine, monkeypatch):
    monkeypatch.setattr(environment, "MIN_WRITTEN_PER_SECOND", 50e6)
    monkeypatch.setattr(environment, "written_per_second", lambda _: 1e6)
    assert row(machine, "outputs/").status in (SLOW, MISSING)
    monkeypatch.setattr(environment, "MIN_FREE_IN_OUTPUTS", 0)
    found = row(machine, "outputs/")
    assert found.status == SLOW
    assert "takes 1500 s here" in found.advice


def test_cache_that_cannot_be_written(machine, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/doctor")
    monkeypatch.setattr(hub.tempfile, "tempdir", str(machine.folder))
    found = row(machine, "cache")
    assert found.status == MISSING
    assert "/proc/doctor/gpt2 cannot be written to" in found.value


@pytest.mark.parametrize(
    ("quota", "threads", "status", "advice"),
    [
        ("max 100000", 4, OK, ""),
        ("200000 100000", 4, SLOW, "OMP_NUM_THREADS=2"),
        ("max 100000", 1, SLOW, "3 of 4 cores idle"),
    ],
)
def test_threads_and_cores(machine, monkeypatch, quota, threads, status, advice):
    monkeypatch.setattr(device, "container_limit", lambda _: quota)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    found = row(machine, "processor")
    assert found.status == status
    assert advice in found.advice
    assert f"{threads} thread{'s' * (threads > 1)}; avx2" in found.value


def test_memory_of_a_container(machine, monkeypatch):
    monkeypatch.setattr("gpt2.training.cost.container_limit", lambda _: "2000000000")
    found = row(machine, "memory")
    assert found.status == MISSING
    assert found.value == "2.0 GB"


def test_gpu_that_pytorch_cannot_use(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert row(machine, "GPUs").status == MISSING
    monkeypatch.setattr(environment, "nvidia_smi", lambda: ["NVIDIA H100, 81559 MiB, 470.1"])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert row(machine, "GPUs").status == MISSING
    assert "is built without CUDA; pip install" in row(machine, "GPUs").advice
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert row(machine, "GPUs").status == WRONG
    assert "driver may be too old" in row(machine, "GPUs").advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES= hides GPUs" in row(machine, "GPUs").advice
    assert row(machine, "GPUs").status == MISSING  # hidden on purpose
    monkeypatch.setattr(environment, "nvidia_smi", list)
    assert "driver does not answer" in environment.why_no_cuda()


def test_gpus_of_pytorch(machine, monkeypatch):
    def gpu(major: int, minor: int) -> SimpleNamespace:
        return SimpleNamespace(name="NVIDIA X", total_memory=80e9, major=major, minor=minor)

    monkeypatch.setattr(environment, "nvidia_smi", lambda: ["NVIDIA X, 81559 MiB, 580.1"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "sm_100a", "compute_100"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79e9, 80e9))
    found = environment.cuda_gpus([gpu(9, 0), gpu(9, 0)])
    assert (found.status, found.value) == (OK, "2 x NVIDIA X (80 GB, sm_90), driver 580.1")
    assert environment.cuda_gpus([gpu(8, 6), gpu(10, 0)]).status == OK  # kernels of 8.0 run on 8.6
    assert environment.cuda_gpus([gpu(12, 0)]).status == OK  # the driver compiles PTX
    assert environment.cuda_gpus([gpu(7, 0)]).status == WRONG
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8e9, 80e9))
    found = environment.cuda_gpus([gpu(9, 0)])
    assert found.status == SLOW
    assert "only 10% of the memory is free" in found.value


def test_network_is_not_used_if_the_environment_forbids_it(machine, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert row(machine, "Hugging Face Hub").value == "not contacted, by HF_HUB_OFFLINE=1"
    assert row(machine, "Weights & Biases").value == "offline, by WANDB_MODE=offline"


def test_network_that_does_not_answer(machine, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(environment, "connect", hub.connect.__wrapped__)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert row(machine, "Hugging Face Hub").status == MISSING
    monkeypatch.delenv("HF_HUB_OFFLINE")  # set by the check for the libraries
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("gpt2.tracking.wandb_service.can_go_online", lambda seconds: False)
    assert row(machine, "Weights & Biases").value == "not logged in"
    monkeypatch.setattr("gpt2.tracking.wandb_service.can_go_online", lambda seconds: True)
    assert row(machine, "Weights & Biases").status == OK
