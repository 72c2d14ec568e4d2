"""How long it takes until something happens: processes from their start to a line of output or to their end."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gpt2.benchmarks.common import Row, circumstances, from_to, headline, interleaved, spread, table, write_json
from gpt2.cli.compose import ROOT
from gpt2.config import StartupBenchmark

FIRST_STEP = re.compile(r"\s*step 1/")
TEXT = "".join(f"def function_{i}(argument):\n    return argument + {i * i}\n\n\n" for i in range(2000))
TRAINING = [
    *("data=text", "data.files=[corpus.txt]", "data.tokenizer=bytes", "model=gpt2_nano", "wandb=off"),
    *("train.max_steps=1", "train.eval_batches=1", "inference.max_new_tokens=8"),
]


@dataclass
class Times:
    end: float  # seconds from start to exit
    line: float | None = None  # to the line that was waited for


def run(arguments: list[str], folder: Path, exit_code: int = 0, line: re.Pattern[str] | None = None) -> Times:
    """Time a Python process in a folder of its own.

    Raises:
        RuntimeError: It ended otherwise than it should, or without the line.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    began, seen, said = time.perf_counter(), None, []
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for text in process.stdout or ():
            if seen is None and line is not None and line.match(text):
                seen = time.perf_counter() - began
            said.append(text)
    end = time.perf_counter() - began
    if process.returncode != exit_code or (line is not None and seen is None):
        raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}: {''.join(said)[-2000:]}")
    return Times(end, seen)


def turns_in(folder: Path) -> dict[str, Callable[[], Times]]:
    """What is timed, by name."""
    script = str(ROOT / "train.py")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return {
        "python -c pass": partial(run, ["-c", "pass"], folder),
        "python -c 'import torch'": partial(run, ["-c", "import torch"], folder),
        "train.py --help": partial(run, [script, "--help"], folder),
        "train.py, a mistake": partial(run, [script, "train.batch_size=0"], folder, exit_code=2),
        "train.py, one step": partial(run, [script, *TRAINING], folder, line=FIRST_STEP),
    }


def startup(config: StartupBenchmark) -> None:
    """Print a table, and write it all to `config.json`."""
    found = circumstances(torch.device("cpu"), ("torch",))
    print(f"processes from their start, medians of {config.repetitions}\n{headline(found, ('torch',))}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        turns = turns_in(Path(name))
        for turn in turns.values():  # files into the kernel's cache, the corpus into ours
            turn()
        times = dict(zip(turns, interleaved(list(turns.values()), config.repetitions, "Starting"), strict=True))
    rows: list[Row] = []
    for name, each in times.items():
        lines = [time.line for time in each if time.line is not None]
        if lines:
            rows.append({"what": f"{name}: to its line", **spread("seconds", lines)})
            name = f"{name}: to the end"
        rows.append({"what": name, **spread("seconds", [time.end for time in each])})
    cells = [(row["what"], f"{row['seconds']:.2f}", from_to(row["seconds_of_each"], 2)) for row in rows]
    print(f"\n{table(('', 'seconds', 'from - to'), cells)}\n")
    print("one step: gpt2_nano on a text of bytes that is prepared already; its end is after evaluation and saving")
    write_json(config, "startup", {**found, "results": rows})
