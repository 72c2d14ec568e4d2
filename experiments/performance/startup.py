"""Start-up times: from the start of a process to a line of its output, or to its exit.

Measures a bare Python, `import torch`, `train.py --help`, a mistake on the command line, and a training of one step
with prepared data. Run: python experiments/performance/startup.py [--repetitions 5] [--json startup.json]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from gpt2.analysis.tables import as_text, from_to
from gpt2.benchmarks.common import circumstances, headline, interleaved, spread, write_json

TRAIN = str(Path(__file__).resolve().parents[2] / "train.py")
FIRST_STEP = re.compile(r"\s*step 1/")
TEXT = "".join(f"def function_{i}(argument):\n    return argument + {i * i}\n\n\n" for i in range(2000))
ONE_STEP = [
    *("data=text", "data.files=[corpus.txt]", "data.tokenizer=bytes", "model=gpt2_nano", "wandb=off"),
    *("train.max_steps=1", "train.eval_batches=1", "inference.max_new_tokens=8"),
]


def run(arguments, folder, exit_code=0, line=None):
    """Time a Python process. Return the seconds to its exit, and to the first line of output that matches `line`.

    Raises:
        RuntimeError: The process has another exit code, or prints no such line.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    began, to_line, output = time.perf_counter(), None, []
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams) as process:
        for text in process.stdout:
            if to_line is None and line is not None and line.match(text):
                to_line = time.perf_counter() - began
            output.append(text)
    to_exit = time.perf_counter() - began

    if process.returncode != exit_code or (line is not None and to_line is None):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {''.join(output)[-2000:]}")
    return to_exit, to_line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="a file for all measurements")
    arguments = parser.parse_args()

    about = circumstances(torch.device("cpu"))
    print(f"seconds, medians of {arguments.repetitions}\n{headline(about)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
        turns = {
            "python -c pass": partial(run, ["-c", "pass"], folder),
            "python -c 'import torch'": partial(run, ["-c", "import torch"], folder),
            "train.py --help": partial(run, [TRAIN, "--help"], folder),
            "train.py, a mistake": partial(run, [TRAIN, "train.batch_size=0"], folder, exit_code=2),
            "train.py, one step": partial(run, [TRAIN, *ONE_STEP], folder, line=FIRST_STEP),
        }
        for turn in turns.values():  # fills the kernel's file cache and prepares the data
            turn()
        times = interleaved(list(turns.values()), arguments.repetitions, "Starting")

    rows = []
    for what, each in zip(turns, times, strict=True):
        to_exit, to_line = zip(*each, strict=True)
        if to_line[0] is not None:
            rows.append({"what": f"{what}: to its line", **spread("seconds", to_line)})
            what = f"{what}: to the end"
        rows.append({"what": what, **spread("seconds", to_exit)})
    cells = [[row["what"], f"{row['seconds']:.2f}", from_to(row["seconds_of_each"], 2)] for row in rows]
    print(f"\n{as_text([['', 'seconds', 'from - to'], *cells])}")
    write_json(arguments.json, {"benchmark": "startup", "config": vars(arguments), **about, "results": rows})


if __name__ == "__main__":
    main()
