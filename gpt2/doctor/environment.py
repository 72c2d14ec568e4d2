"""The part `What is here`: versions, processor, GPUs, compilers, disks, limits, accounts. Nothing is computed."""

import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
import tomllib
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement

from gpt2.doctor.report import MISSING, OK, SLOW, WRONG, Check, Machine, Row, collected_warnings
from gpt2.errors import UserError, counted, few
from gpt2.runtime.device import BF16_INSTRUCTIONS, available_cores, hardware
from gpt2.runtime.files import in_bytes, reason, writable_folder
from gpt2.runtime.hub import caches, connect
from gpt2.runtime.repository import ROOT
from gpt2.tracking.loggers import within
from gpt2.tracking.wandb_runs import resolve_mode
from gpt2.training.cost import memory_of

FEATURES = ("avx2", "avx512_f", "avx512_vnni", *BF16_INSTRUCTIONS, "neon", "sve")  # used by PyTorch
NETWORK_SECONDS = 1.0  # the server of W&B and the Hub have this long to answer
WRITTEN_BYTES = 64 << 20  # the size of a file that measures the speed of writing

# Limits below which a row is not OK; docs/doctor.md explains them.
MIN_FREE_IN_OUTPUTS = 6e9  # bytes: four checkpoints of GPT-2 124M
MIN_FREE_IN_CACHE = 1e9  # bytes
MIN_WRITTEN_PER_SECOND = 50e6  # bytes
MIN_OPEN_FILES = 1024
MIN_SHARED_MEMORY = 64 << 20  # bytes for each GPU
MIN_MEMORY = 4e9  # bytes; training GPT-2 124M takes 2.6 GB


def python(_machine: Machine) -> Row:
    system = f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}"
    return Row(f"{platform.python_version()} on {system}", figures={"platform": platform.platform()})


def pytorch(_machine: Machine) -> Row:
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return Row(f"{torch.__version__}, built for {built_for}", figures={"build": torch.__config__.show()})


def versions(_machine: Machine) -> Row:
    """Compare all packages with `constraints.txt`, and the required ones with `pyproject.toml`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    installed = {name: found for name in tested if (found := installed_version(name))}
    others = {name: found for name, found in installed.items() if found != tested[name]}
    needed = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    refused = [str(requirement) for requirement in needed if not is_satisfied(requirement)]
    figures = {"installed": installed, "others": others, "refused": refused}
    if refused:
        advice = "pip install -e . -c constraints.txt installs what is needed, in the tested versions"
        return Row(f"not installed as pyproject.toml requires: {few(refused)}", WRONG, advice, figures=figures)
    if others:
        shown = few([f"{name} {found} ({tested[name]})" for name, found in others.items()])
        value = f"{len(others)} of {len(installed)} packages are not the tested ones: {shown}"
        return Row(value, MISSING, "pip install -e . -c constraints.txt installs the tested ones", figures=figures)
    return Row(f"all {len(installed)} installed packages of constraints.txt are the tested ones", figures=figures)


def installed_version(name: str) -> str | None:
    """Return the version without its local part: 2.13.0 of 2.13.0+cpu. None if the package is not installed."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def is_satisfied(requirement: Requirement) -> bool:
    found = installed_version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def processor(machine: Machine) -> Row:
    """The CPU, and whether PyTorch uses one thread for each core that this process may use."""
    about, cores = hardware(torch.device("cpu")), available_cores()
    has = torch.cpu.get_capabilities()
    features = [name for name in FEATURES if has.get(name)]
    load, threads = os.getloadavg()[0], about["threads"]
    sizes = f"{counted(cores, 'core')}, {counted(threads, 'thread')}"
    value = f"{about['cpu']}, {sizes}; {', '.join(features) or 'no vector instructions known'}"
    figures = {"cores": cores, "threads": threads, "load": load, "capabilities": dict(has)}
    advice = ""
    if threads < cores and machine.device.type == "cpu":
        advice = f"PyTorch leaves {cores - threads} of {cores} cores idle: unset OMP_NUM_THREADS"
    elif threads > cores:
        advice = f"threads compete for the {counted(cores, 'core')} of this process: OMP_NUM_THREADS={cores}"
    elif "x86" in platform.machine() and not has.get("avx2"):
        advice = "without AVX2, matrix products take several times as long; only another processor helps"
    return Row(value, SLOW if advice else OK, advice, "as many threads as cores", figures)


def memory(_machine: Machine) -> Row:
    size = memory_of(torch.device("cpu"))
    advice = f"training GPT-2 124M takes about 2.6 GB; model=gpt2_mini takes less than {MIN_MEMORY / 1e9:g} GB"
    status = OK if size >= MIN_MEMORY else MISSING
    return Row(f"{size / 1e9:.1f} GB", status, advice, f"{MIN_MEMORY / 1e9:g} GB", {"bytes": size})


# ---------------------------------------------------------------------------------------------------------------------
# GPUs and compilers


@cache
def nvidia_smi() -> list[str]:
    """Return a line for each GPU that the NVIDIA driver lists, with its memory and the version of the driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # no driver, or it does not answer
        return []


def why_no_cuda() -> str:
    """Return why PyTorch cannot use CUDA, and what helps."""
    if not torch.backends.cuda.is_built():
        found = f"the driver lists {nvidia_smi()[0]}, but " if nvidia_smi() else ""
        remedy = "pip install --force-reinstall torch, without --index-url .../cpu, installs a build with it"
        return f"{found}PyTorch {torch.__version__} is built without CUDA; {remedy}"
    if not nvidia_smi():
        return "the NVIDIA driver does not answer: nvidia-smi should list the GPUs"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides GPUs"
    return f"the driver may be too old for CUDA {torch.version.cuda}, for which PyTorch is built: {nvidia_smi()[0]}"


def gpus(_machine: Machine) -> Row:
    if torch.backends.mps.is_available():
        return Row("Apple's GPU (mps)")
    if not torch.cuda.is_available():
        if nvidia_smi():
            on_purpose = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
            status = MISSING if on_purpose or not torch.backends.cuda.is_built() else WRONG
            return Row(f"PyTorch cannot use {nvidia_smi()[0]}", status, why_no_cuda(), figures={"driver": nvidia_smi()})
        return Row("none", MISSING, "small models need no GPU, but GPT-2 124M does (docs/training.md: recipes)")
    return cuda_gpus([torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())])


def cuda_gpus(found: list) -> Row:
    """Check the GPUs that CUDA lists: whether PyTorch has kernels for them, and whether their memory is free."""
    driver = nvidia_smi()[0].split(", ")[-1] if nvidia_smi() else "unknown"
    names = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB, sm_{gpu.major}{gpu.minor})" for gpu in found]
    value = f"{len(found)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)
    value = f"{value}, driver {driver}"
    figures = {"gpus": names, "driver": nvidia_smi(), "built_for": torch.cuda.get_arch_list()}
    if unknown := [gpu.name for gpu in found if not has_kernels(gpu.major, gpu.minor, figures["built_for"])]:
        advice = f"PyTorch {torch.__version__} is built for {', '.join(figures['built_for'])}: install another build"
        return Row(f"{value}: no kernels for {few(unknown)}", WRONG, advice, figures=figures)
    free = [torch.cuda.mem_get_info(number)[0] / gpu.total_memory for number, gpu in enumerate(found)]
    figures["free"] = free
    if min(free) < 0.8:
        advice = "other programs use the rest: nvidia-smi lists them"
        return Row(f"{value}; only {min(free):.0%} of the memory is free", SLOW, advice, "80 % free", figures)
    return Row(value, figures=figures)


def has_kernels(major: int, minor: int, built_for: list[str]) -> bool:
    """Return whether a build has kernels for a GPU: for its major version, or PTX, which the driver compiles."""
    builds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in built_for]
    if not any(builds):  # a build for GPUs of another maker
        return True
    found = [(build[1] == "compute", int(build[2]), int(build[3])) for build in builds if build]
    return any(b <= minor if a == major else is_ptx and a < major for is_ptx, a, b in found)


def nccl(_machine: Machine) -> Row:
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        return Row(".".join(map(str, torch.cuda.nccl.version())))
    return only_for_cuda("NCCL, which exchanges gradients between GPUs, is not in this PyTorch")


def triton(_machine: Machine) -> Row:
    if find_spec("triton"):
        return Row(version("triton"))
    return only_for_cuda("without it torch.compile is off: pip install triton")


def only_for_cuda(advice: str) -> Row:
    has_cuda = torch.cuda.is_available()
    return Row("not installed", MISSING, advice if has_cuda else "nothing: only NVIDIA GPUs use it")


def compiler(machine: Machine) -> Row:
    """The compiler that `torch.compile` calls: for a CPU Inductor calls a C++ compiler, for a GPU Triton a C one."""
    if found := find_compiler():
        return Row(found)
    off = "" if machine.device.type == "cuda" else ", which is off on a CPU by default"
    return Row("none", MISSING, f"torch.compile needs a compiler{off}: apt install g++, or set CXX and CC")


def find_compiler() -> str | None:
    names = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


# ---------------------------------------------------------------------------------------------------------------------
# Places and limits


def outputs(_machine: Machine) -> Row:
    return place(Path("outputs"), MIN_FREE_IN_OUTPUTS, "a checkpoint of GPT-2 124M takes 1.5 GB")


def cache_folder(_machine: Machine) -> Row:
    with collected_warnings() as warned:
        folder = caches()
    if warned:
        advice = "corpora are prepared again after a reboot; XDG_CACHE_HOME sets another folder"
        return Row(warned[0].getMessage(), MISSING, advice)
    advice = "a corpus and its tokens take gigabytes; data.cache_dir and HF_HOME set other folders"
    return place(folder, MIN_FREE_IN_CACHE, advice)


def place(folder: Path, min_free: float, advice: str) -> Row:
    """Check whether a folder can be written to, how much space is free, and how fast it is written."""
    try:
        with writable_folder(folder, str(folder)):
            free = shutil.disk_usage(folder).free
            rate = written_per_second(folder)
    except UserError as error:
        return Row(str(error), WRONG, "change the permissions of the folder, or start in another folder")
    except OSError as error:
        return Row(f"{folder}: {reason(error)}", WRONG, "free some space, or start in another folder")
    shown = str(folder).replace(str(Path.home()), "~")  # a bug report should contain no user name
    value = f"{in_bytes(free)} free, written at {in_bytes(round(rate))}/s ({shown})"
    figures = {"free_bytes": free, "bytes_per_second": rate}
    if free < min_free:
        return Row(value, MISSING, f"free some space: {advice}", f"{in_bytes(round(min_free))} free", figures)
    slow = f"a checkpoint of GPT-2 124M takes {1.5e9 / rate:.0f} s here: use a local disk, or save less often"
    expected = f"{in_bytes(round(MIN_WRITTEN_PER_SECOND))}/s"
    return Row(value, SLOW if rate < MIN_WRITTEN_PER_SECOND else OK, slow, expected, figures)


def written_per_second(folder: Path) -> float:
    """Measure the bytes per second at which a file is written and flushed to disk."""
    block = os.urandom(WRITTEN_BYTES // 8)  # zeros could be compressed
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN_BYTES / (time.perf_counter() - began)


def shared_memory(_machine: Machine) -> Row | None:
    if not Path("/dev/shm").exists():
        return None
    free, needed = shutil.disk_usage("/dev/shm").free, MIN_SHARED_MEMORY * max(1, torch.cuda.device_count())
    advice = "workers of the loader and NCCL use it: docker run --shm-size=1g, or train.num_workers=0"
    status = OK if free >= needed else MISSING
    return Row(f"{in_bytes(free)} free", status, advice, f"{in_bytes(needed)} free", {"free_bytes": free})


def open_files(_machine: Machine) -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    value = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    advice = f"workers and sweeps may fail with 'Too many open files': ulimit -n {max(MIN_OPEN_FILES, 4096)}"
    return Row(value, OK if is_enough else MISSING, advice, f"{MIN_OPEN_FILES:,}", {"soft": soft, "hard": hard})


# ---------------------------------------------------------------------------------------------------------------------
# Accounts


def weights_and_biases(_machine: Machine) -> Row:
    from gpt2.tracking import wandb_service as service

    mode = resolve_mode("auto")
    if mode != "online":
        return Row(f"{mode}, by WANDB_MODE={os.environ['WANDB_MODE']}")
    service.prepare()
    with collected_warnings() as warned:
        is_online = service.can_go_online(NETWORK_SECONDS)
    service.end_service(0)
    if is_online:
        return Row("logged in")
    why = warned[0].getMessage().partition(": ")[2] if warned else "not logged in"
    advice = "runs are recorded offline: `wandb login`, or wandb=off; `wandb sync` uploads offline runs later"
    return Row(why, MISSING, advice)


def hub(_machine: Machine) -> Row:
    if os.environ.get("HF_HUB_OFFLINE"):
        return Row(f"not contacted, by HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']}")
    advice = "only cached files can be used; quickstart and data.files need no network; HTTPS_PROXY sets a proxy"
    with suppress(TimeoutError):  # `connect` has no time limit for the name server
        within(2 * NETWORK_SECONDS, lambda: connect(NETWORK_SECONDS))
        if not os.environ.get("HF_HUB_OFFLINE"):  # `connect` sets it if there is no answer
            return Row("answers")
    return Row("does not answer", MISSING, advice)


CHECKS: dict[str, Check] = {
    "Python": python,
    "PyTorch": pytorch,
    "packages": versions,
    "processor": processor,
    "memory": memory,
    "GPUs": gpus,
    "NCCL": nccl,
    "Triton": triton,
    "C compiler": compiler,
    "outputs/": outputs,
    "cache": cache_folder,
    "shared memory": shared_memory,
    "open files": open_files,
    "Weights & Biases": weights_and_biases,
    "Hugging Face Hub": hub,
}
