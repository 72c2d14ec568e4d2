"""Time nanoGPT and `experiment=shakespeare_fast` from command to exit, alternating, three runs each. Writes race.json.

In a clone of https://github.com/karpathy/nanoGPT, then in this repository, with nothing else on the machine:

    python data/shakespeare_char/prepare.py
    python experiments/shakespeare_fast/race.py ../nanoGPT

nanoGPT is unmodified, with its configuration for a CPU, which has a fixed seed. race_intel.json is the race.json of
another machine, renamed.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpt2.analysis.runs import RunResult
from gpt2.runtime.device import hardware

NANOGPT = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--block_size=64"),
    *("--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000"),
    *("--dropout=0.0", "--eval_interval=500"),
)
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SEEDS = (1, 2, 3)


def seconds(folder: Path, *arguments: str) -> float:
    """Return the seconds of a command of `train.py` in a folder, startup included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "train.py", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)


def nanogpt(place: Path, folder: Path) -> dict[str, Any]:
    """Run nanoGPT, and compute its loss over the whole validation split."""
    duration = seconds(place, *NANOGPT)
    scores = folder / "nanogpt.json"
    scorer = ROOT / "experiments/shakespeare_char/nanogpt.py"
    subprocess.run([sys.executable, str(scorer), str(place), str(scores)], check=True, stdout=subprocess.DEVNULL)
    return {"program": "nanoGPT", "seed": 1337, "seconds": duration, "loss": json.loads(scores.read_text())["loss"]}


def ours(place: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Run the preset, which evaluates the whole validation split at the end."""
    text, run = (place / "data/shakespeare_char/input.txt").resolve(), folder / str(seed)
    arguments = [f"data.files=[{text}]", f"train.seed={seed}", f"hydra.run.dir={run}", "loggers=[]"]
    duration = seconds(ROOT, "experiment=shakespeare_fast", *arguments)
    return {"program": "shakespeare_fast", "seed": seed, "seconds": duration, "loss": RunResult(run).last("val/loss")}


def main() -> None:
    place = Path(sys.argv[1])
    runs = []
    with TemporaryDirectory() as folder:
        for seed in SEEDS:
            for run in (nanogpt(place, Path(folder)), ours(place, Path(folder), seed)):
                print("{program:<18}seed {seed:<6}{seconds:>6} s   {loss:.4f} nats a character".format(**run))
                runs.append(run)
    result = {"runs": runs, "torch": torch.__version__, "hardware": hardware(torch.device("cpu"))}
    (HERE / "race.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
