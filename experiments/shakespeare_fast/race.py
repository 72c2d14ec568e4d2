"""Time nanoGPT and `experiment=shakespeare_fast` from command to exit, alternating, three runs each. Writes race.json.

Both estimate their loss from 20 batches. The loss over the whole split is computed afterwards, and not timed.

In a clone of https://github.com/karpathy/nanoGPT, then in this repository, with nothing else on the machine:

    python data/shakespeare_char/prepare.py
    python experiments/shakespeare_fast/race.py ../nanoGPT

nanoGPT is unmodified, with its configuration for a CPU, which has a fixed seed. The recorded race.json has two series;
race_avx2.json is from a CPU without bf16.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpt2.runtime.device import hardware

NANOGPT = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--block_size=64"),
    *("--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000"),
    *("--dropout=0.0", "--eval_interval=500"),
)
# Like nanoGPT, estimate the loss from 20 batches, and write no text (a token at least).
AS_NANOGPT = ("train.eval_batches=20", "inference.max_new_tokens=1", "loggers=[]")
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SEEDS = (1, 2, 3)


def run(folder: Path, script: str, *arguments: str) -> float:
    """Run a script in a folder. Returns its seconds, startup included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, script, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)


def nanogpt(place: Path, folder: Path) -> dict[str, Any]:
    """Train nanoGPT, then compute its loss over the whole validation split."""
    duration, scores = run(place, "train.py", *NANOGPT), folder / "nanogpt.json"
    run(ROOT, "experiments/shakespeare_char/nanogpt.py", str(place), str(scores))
    return {"program": "nanoGPT", "seed": 1337, "seconds": duration, "loss": json.loads(scores.read_text())["loss"]}


def ours(place: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Train with the preset, then compute the loss over the whole validation split."""
    text, trained = (place / "data/shakespeare_char/input.txt").resolve(), folder / str(seed)
    arguments = [f"data.files=[{text}]", f"train.seed={seed}", f"hydra.run.dir={trained}", *AS_NANOGPT]
    duration = run(ROOT, "train.py", "experiment=shakespeare_fast", *arguments)
    run(ROOT, "evaluate.py", f"checkpoint={trained}", "split=validation", "loggers=[]")
    scores = json.loads((trained / "evaluation.json").read_text())
    return {"program": "shakespeare_fast", "seed": seed, "seconds": duration, "loss": scores["loss"]}


def main() -> None:
    place = Path(sys.argv[1])
    runs = []
    with TemporaryDirectory() as folder:
        for seed in SEEDS:
            for result in (nanogpt(place, Path(folder)), ours(place, Path(folder), seed)):
                print("{program:<18}seed {seed:<6}{seconds:>6} s   {loss:.4f} nats a character".format(**result))
                runs.append(result)
    record = {"runs": runs, "torch": torch.__version__, "hardware": hardware(torch.device("cpu"))}
    (HERE / "race.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
