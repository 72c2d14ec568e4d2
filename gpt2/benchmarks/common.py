"""What the benchmarks share: interleaved repetitions, medians, a description of the machine, and the JSON file."""

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from gpt2.errors import counted
from gpt2.ops.linear import LINEARS, LinearFunction
from gpt2.runtime.console import track
from gpt2.runtime.device import Precision, describe, fastest_seconds, hardware
from gpt2.runtime.rng import commit, versions

T = TypeVar("T")
Row = dict[str, Any]

MATRIX = 2048  # rows and columns of the matrices whose product measures a CPU's peak
MATRIX_ON_CUDA = 8192
READ_BYTES = 256 << 20  # more than any cache holds


def interleaved(functions: Sequence[Callable[[], T]], repetitions: int, description: str) -> list[list[T]]:
    """Call each function once per repetition, in rotated order. Return the results of each function.

    Heat and other programs then slow all functions alike, and no function always runs after the same other one.
    """
    results: list[list[T]] = [[] for _ in functions]
    with track(description, unit="repetitions") as advance:
        for repetition in range(repetitions):
            for place in range(len(functions)):
                number = (repetition + place) % len(functions)
                results[number].append(functions[number]())
            advance(repetition + 1, repetitions)
    return results


def spread(name: str, values: Sequence[float]) -> Row:
    """Return the median of repeated measurements as `<name>`, and all of them as `<name>_of_each`."""
    return {name: median(values), f"{name}_of_each": list(values)}


def circumstances(device: torch.device) -> Row:
    """Return what the figures depend on besides the configuration: hardware, load, commit and versions."""
    return {
        "device": describe(device),
        "hardware": hardware(device),
        "load_average": list(os.getloadavg()),
        "repository": commit(),
        "versions": {
            **versions(),
            **{name: version(name) for name in ("transformers", "tokenizers") if find_spec(name)},
        },
    }


def headline(about: Row) -> str:
    """Return `circumstances` in one line."""
    libraries = [f"{name} {number}" for name, number in about["versions"].items() if number is not None]
    machine = about["hardware"]
    return ", ".join([about["device"], machine["cpu"], counted(machine["cores"], "core"), *libraries])


def matmul_flops(precision: Precision) -> float:
    """Measure the FLOP/s of a large matrix product in a precision, with the fastest of our implementations."""
    size = MATRIX_ON_CUDA if precision.device.type == "cuda" else MATRIX
    left, right = (torch.ones(size, size, dtype=precision.dtype, device=precision.device) for _ in range(2))

    def product(linear: LinearFunction) -> None:
        linear(left, right, None)
        if precision.device.type != "cpu":
            torch.accelerator.synchronize(precision.device)

    return 2 * size**3 / min(fastest_seconds([partial(product, way) for way in LINEARS.values()], repetitions=1))


def read_bandwidth(memory: Tensor) -> float:
    """Measure the bytes per second at which the device reads memory, by summing a tensor."""
    began = time.perf_counter()
    float(memory.sum())  # waits for the device
    return memory.nbytes / (time.perf_counter() - began)


def reset_peak(device: torch.device) -> None:
    """Reset the peak of `peak_bytes` to the memory in use now. Without CUDA this works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory: on CUDA of PyTorch's allocator, else of this process, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # on Linux, `ru_maxrss` cannot be reset, and a new process inherits it from its parent
        status = Path("/proc/self/status").read_text()
        if match := re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE):
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_json(file: str | None, record: Row) -> None:
    """Write a record to a file, unless that is None. NaN and infinities, which JSON does not have, become null."""
    if file is None:
        return
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")
