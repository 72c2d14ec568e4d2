"""The hardware: choice of device and precision, description, peak FLOP/s, memory of freed models."""

import ctypes
import gc
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from gpt2.config import TrainingConfig
from gpt2.errors import UserError, counted
from gpt2.runtime.dist_env import dist_env

log = logging.getLogger(__name__)

# Peak TFLOP/s of one chip for dense 16-bit matrix products (bf16; fp16 on V100 and T4) with sums in fp32, by words of
# the chip's name in PyTorch. From NVIDIA's documents, most of which state twice as much, for sparse matrices.
PEAK_TERAFLOPS = {
    "GB300": 2500.0,  # GB300 NVL72, data sheet: 72 chips
    "GB200": 2500.0,  # GB200 NVL72, data sheet: 72 chips
    "B300": 2250.0,  # HGX, product page: 8 chips
    "B200": 2250.0,  # HGX, product page: 8 chips
    "GH200": 989.0,  # GH200 Grace Hopper, data sheet
    "H200 NVL": 835.0,  # H200, data sheet
    "H200": 989.0,  # the same
    "H100 PCIe": 756.0,  # H100, data sheet
    "H100 NVL": 835.0,  # the same
    "H100": 989.0,  # the same: SXM
    "A100": 312.0,  # A100, data sheet: PCIe and SXM alike
    "A40": 149.7,  # A40, data sheet
    "A30": 165.0,  # A30, data sheet
    "A10": 125.0,  # A10, data sheet
    "L40S": 362.0,  # L40S, data sheet
    "L40": 181.0,  # L40, data sheet
    "L4": 121.0,  # L4, data sheet
    "RTX PRO 6000 Blackwell": 503.8,  # RTX Blackwell PRO, architecture white paper
    "RTX 6000 Ada": 364.2,  # Ada for professional visualization, architecture white paper
    "RTX A6000": 154.8,  # GA102, architecture white paper
    "RTX 5090": 209.5,  # RTX Blackwell, architecture white paper
    "RTX 5080": 112.6,  # the same
    "RTX 4090": 165.2,  # Ada, architecture white paper
    "RTX 4080": 97.5,  # the same
    "RTX 3090 Ti": 80.0,  # the same
    "RTX 3090": 71.0,  # GA102, architecture white paper
    "RTX 3080": 59.5,  # the same
    "V100S": 130.0,  # V100, data sheet
    "V100 PCIE": 112.0,  # the same
    "V100": 125.0,  # the same: SXM2
    "T4": 65.0,  # T4, data sheet
}
# A name of the table with one of these additional words denotes another chip, or a part of a chip.
OTHER_CHIPS = {"Laptop", "Max", "Ti", "SUPER", "D", "MIG"}

# Keys of `torch.cpu.get_capabilities()`: two of x86, then two of ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def choose_device(name: str, key: str = "device") -> torch.device:
    """Return the named device. `auto` is CUDA, else Apple's GPU, else the CPU. A rank of torchrun gets its own GPU.

    Args:
        key: The configuration key that holds the name, for error messages.

    Raises:
        UserError: This machine has no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() and not dist_env().by_torchrun else "cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{key}: {name!r} is none of auto, cuda, cuda:N, mps, cpu") from error
    if name == "cuda" and dist_env().by_torchrun:
        device = torch.device("cuda", dist_env().local_rank)
    available = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [kind for kind, is_available in available.items() if is_available]
    if device.type not in usable:
        others = f", and {dist_env().local_world_size} ranks need one each" if dist_env().by_torchrun else ""
        raise UserError(f"{key}: there is no {device} here{others}; use auto or {' or '.join(usable)}")
    return device


def cuda_or_fallback(name: str) -> torch.device:
    """Like `choose_device`, but `cuda` on a machine without CUDA falls back to `auto`, with a warning.

    For the Python API, where `cuda` is the default of classes that work on all devices.
    """
    if name != "cuda" or torch.cuda.is_available():
        return choose_device(name)
    device = choose_device("auto")
    log.warning("There is no CUDA device here: using %s.", device)
    return device


@dataclass(frozen=True)
class Precision:
    """The number format of matrix products under autocast. Weights, gradients and optimizer state stay in fp32."""

    name: str  # fp32 | bf16 | fp16
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    @property
    def is_emulated(self) -> bool:
        """Whether this is bf16 on a CPU or CUDA device that has no instructions for it."""
        return self.name == "bf16" and self.device.type in ("cpu", "cuda") and not computes_in_bf16(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, enabled for fp16 only: gradients would underflow in it."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def requested_precision(config: TrainingConfig) -> str:
    """The precision that the configuration requests, which may be `auto`."""
    return config.precision if config.mixed_precision else "fp32"


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the named precision. `auto` is bf16 where the chip is fast in it, else fp16 on CUDA, else fp32."""
    if name != "auto":
        return Precision(name, device)
    if computes_in_bf16(device):
        return Precision("bf16", device)
    return Precision("fp16" if device.type == "cuda" else "fp32", device)


def auto_without_training(name: str, device: torch.device) -> str:
    """Return the precision for evaluation and generation: `auto` becomes fp32, which is exact, except on CUDA.

    On CUDA, PyTorch multiplies fp32 matrices without tensor cores: an A100 reaches 19.5 TFLOP/s instead of 312.
    """
    return "fp32" if name == "auto" and device.type != "cuda" else name


def computes_in_bf16(device: torch.device) -> bool:
    """Whether this CPU or CUDA device has instructions for bf16 products and PyTorch uses them; False for MPS.

    The speed is not measured: on a busy machine, the same command could then get another precision.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # only oneDNN uses them
        return False
    return any(torch.cpu.get_capabilities().get(name) for name in BF16_INSTRUCTIONS)


def fastest_seconds(ways: Sequence[Callable[[], Any]], repetitions: int = 8, min_seconds: float = 0.0) -> list[float]:
    """Return the shortest time of each function over interleaved repetitions. Other programs affect it least.

    Args:
        min_seconds: Fast functions are repeated more often, until all repetitions together take this long.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    while len(seconds[0]) <= repetitions or sum(map(sum, seconds)) < min_seconds:
        for way, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            taken.append(time.perf_counter() - began)
    return [min(taken[1:]) for taken in seconds]  # without the first call, which may compile or allocate


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware that decides the speed of a run: device, its memory in GB, CPU, usable cores, threads of PyTorch."""
    about: dict[str, Any] = {"cpu": _cpu_name(), "cores": available_cores(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1), **about}
    return {"device": device.type, **about}


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")  # on Linux
    match = re.search(r"model name\s*: (.+)", file.read_text() if file.exists() else "")
    return match[1] if match else platform.processor() or platform.machine()


def available_cores() -> int:
    """The number of cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = container_limit("cpu.max").split()
    return min(cores, ceil(int(quota[0]) / int(quota[1]))) if quota and quota[0].isdecimal() else cores


def container_limit(name: str) -> str:
    """A limit of the root control group inside a container, such as `memory.max`; empty if there is none."""
    file = Path("/sys/fs/cgroup", name)
    return file.read_text().strip() if file.exists() else ""


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel; no effect with other C libraries.

    Each step on a CPU allocates and frees the same activations, and page faults take longer than many layers.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def free_memory() -> None:
    """Release the memory of deleted models: reference cycles, and the caches of the C library and PyTorch."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # torch.compile stops compiling after a number of models
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_flops(precision: Precision) -> float | None:
    """Peak FLOP/s of the chip for 16-bit matrix products; None if unknown."""
    if precision.device.type != "cuda" or precision.name == "fp32":
        return None
    return known_peak(torch.cuda.get_device_name(precision.device))


def known_peak(name: str) -> float | None:
    """Peak FLOP/s by a device's name: the first entry of `PEAK_TERAFLOPS` whose words are all in the name.

    Whole words are compared, because an A1000 is not an A100. A laptop's RTX 4090 is another chip than the RTX 4090.
    """
    words = set(re.split(r"[\s-]+", name))
    for chip, teraflops in PEAK_TERAFLOPS.items():
        if words.issuperset(chip.split()) and not OTHER_CHIPS & words - set(chip.split()):
            return teraflops * 1e12
    return None
