"""Shared by the benchmarks: interleaved repetitions, medians with their range, tables, and the JSON file."""

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from gpt2.runtime.console import track
from gpt2.runtime.device import describe, hardware
from gpt2.runtime.rng import commit

T = TypeVar("T")
Row = dict[str, Any]


def interleaved(turns: Sequence[Callable[[], T]], repetitions: int, description: str) -> list[list[T]]:
    """Call each of `turns` once a repetition; the one that begins rotates. Returns the results of each.

    Other load on the machine and heat then slow all of them alike, and none always runs after the same other one.
    """
    results: list[list[T]] = [[] for _ in turns]
    with track(description, unit="repetitions") as advance:
        for repetition in range(repetitions):
            for place in range(len(turns)):
                number = (repetition + place) % len(turns)
                results[number].append(turns[number]())
            advance(repetition + 1, repetitions)
    return results


def spread(name: str, values: Sequence[float]) -> Row:
    """The median of repeated measurements as `<name>`, and all of them as `<name>_of_each`."""
    return {name: median(values), f"{name}_of_each": list(values)}


def from_to(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):,.{digits}f} - {max(values):,.{digits}f}"


def or_na(value: float | None, form: str) -> str:
    """Format a number; `n/a` for None and NaN."""
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    alignment = "<" + ">" * (len(widths) - 1)
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(cells, alignment, widths, strict=True))
        for cells in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def circumstances(device: torch.device, packages: Sequence[str] = ("torch", "transformers")) -> Row:
    """What the figures depend on besides the configuration: hardware, load, commit and versions."""
    return {
        "device": describe(device),
        "hardware": hardware(device),
        "cores_of_process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "repository": commit(),
        **{package: version(package) for package in packages},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def headline(about: Row, packages: Sequence[str] = ("torch", "transformers")) -> str:
    """`circumstances` in a line."""
    versions = [f"{name} {about[name]}" for name in (*packages, "python")]
    cuda = [f"CUDA {about['cuda']}"] if about["cuda"] else []
    cores = f"{about['cores_of_process']} cores"
    return ", ".join([about["device"], about["hardware"]["cpu"], cores, *versions, *cuda])


def write_json(file: str | None, record: Row) -> None:
    """Write a record to a file, if one is given. NaN and infinities become null."""
    if file is None:
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(_finite(record), indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
