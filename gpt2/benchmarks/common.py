"""What the benchmarks share: turns, medians with their spread, tables, the file for everything that was measured."""

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from gpt2.config import Benchmark
from gpt2.runtime.console import track
from gpt2.runtime.device import describe, hardware
from gpt2.runtime.rng import commit

T = TypeVar("T")
Row = dict[str, Any]


def interleaved(turns: Sequence[Callable[[], T]], repetitions: int, description: str) -> list[list[T]]:
    """What each of `turns` returns in each repetition. All have one turn a repetition; who begins rotates.

    So a neighbour on the machine, or heat, slows all of them down alike, and nobody is always after the same one.
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
    """The median of some measurements under a name, and each of them under `<name>_of_each`."""
    return {name: median(values), f"{name}_of_each": list(values)}


def from_to(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):,.{digits}f} - {max(values):,.{digits}f}"


def or_na(value: float | None, form: str) -> str:
    """A number in a format; `n/a` where it is not known."""
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"{first[0]:<{first[1]}}" + "".join(f"  {cell:>{width}}" for cell, width in rest)

    return "\n".join(line(cells).rstrip() for cells in (head, *rows))


def circumstances(device: torch.device, packages: Sequence[str] = ("torch", "transformers")) -> Row:
    """What the figures depend on beside the configuration."""
    return {
        "device": describe(device),
        "hardware": hardware(device),
        "cores_of_process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,  # neighbours show in it
        "repository": commit(),
        **{package: version(package) for package in packages},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def headline(found: Row, packages: Sequence[str] = ("torch", "transformers")) -> str:
    """The circumstances in a line."""
    about = found["hardware"]
    versions = [f"{name} {found[name]}" for name in (*packages, "python")]
    cuda = [f"CUDA {found['cuda']}"] if found["cuda"] else []
    return ", ".join([found["device"], about["cpu"], f"{found['cores_of_process']} cores", *versions, *cuda])


def write_json(config: Benchmark, benchmark: str, found: Row) -> None:
    """Write everything that was measured to `config.json`, if it is asked for. What is no number becomes null."""
    if config.json is None:
        return
    result = _finite({"benchmark": benchmark, "config": asdict(config), **found})
    Path(config.json).parent.mkdir(parents=True, exist_ok=True)
    Path(config.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {config.json}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
