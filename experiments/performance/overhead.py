"""The overhead of `Trainer.train` over its bare steps: loading, logging, metrics, W&B, evaluation and checkpoints.

Alternates between `Trainer.train` and bare steps on batches in memory, and compares the time of a step.
Run: python experiments/performance/overhead.py [--steps 30] [OVERRIDES of `benchmark training`]
"""

import argparse
import logging
import tempfile
import time
from contextlib import chdir
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf

from gpt2.benchmarks.common import circumstances, headline, interleaved, spread, write_json
from gpt2.benchmarks.contestants import Workload, precisions
from gpt2.cli.compose import compose
from gpt2.config import TrainRun, WandbConfig
from gpt2.tracking.loggers import LoggedRun, start_loggers
from gpt2.tracking.tracker import FINISHED, Ended, Tracker
from gpt2.training.callbacks import Callback, TrackerLog

NEVER = 10**9
INTERVALS = {"log_every": 10, "eval_every": NEVER, "save_every": NEVER, "keep_checkpoints": 1, "eval_batches": 1}


class TimedLoader:
    """A DataLoader that sums up the time spent waiting for its batches."""

    def __init__(self, loader):
        self.loader, self.seconds = loader, 0.0

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class StepTimes(Callback):
    """Records when each step ended, and the total time spent waiting for batches until then."""

    def on_train_start(self, trainer):
        self.ends, self.waits = [], []

    def on_step_end(self, trainer):
        self.ends.append(time.perf_counter())
        self.waits.append(trainer.train_loader.seconds)


def train(trainer, steps):
    """Train for `steps` more steps. The first one starts the loader's workers and is not timed."""
    times = next(callback for callback in trainer.callbacks if isinstance(callback, StepTimes))
    trainer.config.max_steps = trainer.progress.step + steps
    began = time.perf_counter()
    trainer.train()
    seconds = times.ends[-1] - times.ends[0]
    return {
        "step": seconds / (steps - 1),
        "waiting": (times.waits[-1] - times.waits[0]) / seconds,
        "first step": times.ends[0] - began,
        "evaluation and checkpoints": time.perf_counter() - times.ends[-1],
    }


def train_bare(trainer, workload, steps):
    """Return the seconds a step takes without loading, logging, evaluation and checkpoints."""
    began = time.perf_counter()
    for number in range(steps):
        step_loss, _ = trainer.train_step(workload.batches[number % len(workload.batches)])
    step_loss.item()  # waits for the device
    return (time.perf_counter() - began) / steps


def compare(config, steps, folder):
    """Train both ways, interleaved, in `folder`. Return the record for the JSON file."""
    workload = Workload(config, folder, config.warmup + (config.repetitions + 1) * steps)
    about = circumstances(workload.device)
    print(headline(about), flush=True)
    precision = precisions(config, workload.device)[0].name

    wandb = start_loggers(
        TrainRun(wandb=WandbConfig(mode="offline")), LoggedRun("overhead", group="benchmark", job_type="train")
    )
    train_config = replace(config.train, precision=precision, mixed_precision=True)
    callbacks = [TrackerLog(Tracker(folder, wandb)), StepTimes()]
    full = workload.trainer(replace(train_config, **INTERVALS), callbacks=callbacks)
    full.train_loader = TimedLoader(full.train_loader)
    bare = workload.trainer(train_config)
    train_bare(bare, workload, config.warmup)
    train(full, max(2, config.warmup))
    turns = [lambda: train_bare(bare, workload, steps), lambda: train(full, steps)]
    alone, whole = interleaved(turns, config.repetitions, "Overhead")
    wandb.finish(Ended(FINISHED), None)

    in_train = [turn["step"] for turn in whole]
    result = {
        "precision": precision,
        "steps": steps,
        **spread("bare_step_seconds", alone),
        **spread("train_step_seconds", in_train),
        "overhead": median(in_train) / median(alone) - 1,
        "overhead_of_each": [mine / other - 1 for mine, other in zip(in_train, alone, strict=True)],
        "waiting_for_data": median(turn["waiting"] for turn in whole),
        "once_a_run_seconds": {
            key: median(t[key] for t in whole) for key in ("first step", "evaluation and checkpoints")
        },
    }
    return {"benchmark": "overhead", "config": asdict(config), **about, "overhead": result}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of each way in a repetition")
    parser.add_argument("overrides", nargs="*", help="such as model=gpt2_mini train.batch_size=4 json=overhead.json")
    arguments = parser.parse_intermixed_args()
    config = OmegaConf.to_object(compose("benchmark_training", arguments.overrides))

    with tempfile.TemporaryDirectory() as name, chdir(name):  # W&B writes to the current folder
        logging.basicConfig(filename="train.log", level=logging.INFO)
        record = compare(config, arguments.steps, Path(name))
    result, once = record["overhead"], record["overhead"]["once_a_run_seconds"]
    print(
        f"overhead of Trainer.train, {result['steps']} steps, {result['precision']}, W&B offline: "
        f"{result['overhead']:+.1%} ({min(result['overhead_of_each']):+.1%} - {max(result['overhead_of_each']):+.1%}), "
        f"{result['train_step_seconds'] * 1e3:,.1f} ms a step, bare {result['bare_step_seconds'] * 1e3:,.1f} ms; "
        f"{result['waiting_for_data']:.2%} of it waiting for data\n"
        f"once a run: {', '.join(f'{what} {seconds * 1e3:,.0f} ms' for what, seconds in once.items())}"
    )
    write_json(config.json, record)


if __name__ == "__main__":
    main()
