"""Shared by the benchmarks: interleaved repetitions, medians, a description of the machine, and the JSON file."""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from gpt2.runtime.console import track
from gpt2.runtime.device import describe, hardware
from gpt2.runtime.rng import commit, versions

T = TypeVar("T")
Row = dict[str, Any]


def interleaved(turns: Sequence[Callable[[], T]], repetitions: int, description: str) -> list[list[T]]:
    """Call each of `turns` once a repetition, each time starting with another one. Returns the results of each.

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


def circumstances(device: torch.device) -> Row:
    """What the figures depend on besides the configuration: hardware, load, commit and versions."""
    return {
        "device": describe(device),
        "hardware": hardware(device),
        "load_average": list(os.getloadavg()),
        "repository": commit(),
        "versions": {**versions(), **{name: version(name) for name in ("transformers", "tokenizers")}},
    }


def headline(about: Row) -> str:
    """`circumstances` in a line."""
    libraries = [f"{name} {number}" for name, number in about["versions"].items() if number is not None]
    return ", ".join([about["device"], about["hardware"]["cpu"], f"{about['hardware']['cores']} cores", *libraries])


def write_json(file: str | None, record: Row) -> None:
    """Write a record to a file, if one is given. NaN and infinities, which JSON does not have, become null."""
    if file is None:
        return
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {file}")
