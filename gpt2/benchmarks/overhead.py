"""What a training costs beside its steps: waiting for data, and all that `Trainer.train` does around them."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from gpt2.benchmarks.common import Row, interleaved, spread
from gpt2.benchmarks.contestants import Workload, in_precision, precisions
from gpt2.config import TrainingBenchmark
from gpt2.runtime.signals import Interrupted
from gpt2.tracking.tracker import FINISHED, Ended, ExternalLogger, Tracker
from gpt2.tracking.wandb_logger import start_wandb
from gpt2.train import Trainer

NEVER = 10**9
ONCE = ("first_batch", "evaluation", "save")  # what happens once a run


def waiting(trainer: Trainer, workload: Workload, steps: int) -> Row:
    """The share of time that a trainer waits for its own loader, over steps after the first, which starts it."""
    feed = trainer._steps_of_epoch()
    began = time.perf_counter()
    trainer.train_step(next(feed))
    workload.wait_for_device()
    first_seconds, waits = time.perf_counter() - began, []
    began = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        micro_batches = next(feed)
        waits.append(time.perf_counter() - asked)
        trainer.train_step(micro_batches)
    workload.wait_for_device()
    whole = time.perf_counter() - began
    return {
        "waiting_for_data": sum(waits) / whole,
        "waiting_seconds_of_each": waits,
        "seconds_of_all": whole,
        "first_step_with_loader_seconds": first_seconds,
        "workers": trainer.train_loader.num_workers,
    }


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Have the trainer's lines formatted and written, as in a run, but not shown."""
    logger, handler = logging.getLogger("gpt2.train"), logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
        handler.close()


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """A function that adds how long each call takes."""

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


class SingleDevice:
    """A run that goes on by so many steps each time: `Trainer.train`, its files in a folder, its loader started anew.

    What happens once a run is timed by itself: the first batch, for which the loader starts, the evaluation at the end
    and the checkpoint after it.
    """

    def __init__(self, workload: Workload, precision: str, folder: Path, external: ExternalLogger):
        config = workload.config.train
        rhythm = {"log_every": 10, "eval_every": NEVER, "save_every": NEVER, "keep_checkpoints": 1, "eval_batches": 1}
        self.workload = workload
        self.trainer = workload.trainer(in_precision(config, precision, **rhythm))
        self.trainer.tracker = Tracker(folder, external)
        self.once: dict[str, list[float]] = {key: [] for key in ONCE}
        trainer: Any = self.trainer
        trainer._evaluate = timed(trainer._evaluate, self.once["evaluation"])
        trainer._save = timed(trainer._save, self.once["save"])
        self._feed = trainer._steps_of_epoch
        trainer._steps_of_epoch = self._steps_of_epoch

    def _steps_of_epoch(self) -> Iterator[Any]:
        steps = self._feed()
        began = time.perf_counter()
        for number, micro_batches in enumerate(steps):
            if number == 0:
                self.once["first_batch"].append(time.perf_counter() - began)
            yield micro_batches

    def run(self, steps: int) -> dict[str, float]:
        """Seconds a step, without and with what happens once."""
        for seconds in self.once.values():
            seconds.clear()
        self.trainer.config.max_steps = self.trainer.progress.step + steps
        began = time.perf_counter()
        self.trainer.train()
        if self.trainer.interrupted_by is not None:  # it only remembers a signal, and ends well
            raise Interrupted.by(self.trainer.interrupted_by)
        self.workload.wait_for_device()
        whole = time.perf_counter() - began
        save = sum(self.once["save"])  # that of the best lies within the evaluation
        evaluation = sum(self.once["evaluation"])
        in_evaluation = sum(self.once["save"][:-1])
        once = {"first_batch": sum(self.once["first_batch"]), "evaluation": evaluation - in_evaluation, "save": save}
        return {"step": (whole - sum(once.values())) / steps, "with_all": whole / steps, **once}


def overhead(config: TrainingBenchmark, precision: str | None = None) -> Row:
    """`Trainer.train` against its bare steps on batches in memory, in turn."""
    steps = config.overhead_steps
    with tempfile.TemporaryDirectory() as name, log_to_file(Path(name) / "train.log"), chdir(name):  # W&B's files too
        needed = config.warmup + (config.repetitions + 1) * steps
        workload = Workload(config, Path(name), needed)
        chosen = precision or precisions(config, workload.device)[0].name
        external = start_wandb(config.wandb, name="overhead", group="benchmark", job_type="train")
        whole = SingleDevice(workload, chosen, Path(name), external)
        bare = workload.trainer(in_precision(config.train, chosen))

        def steps_alone(count: int = steps) -> dict[str, float]:
            began = time.perf_counter()
            for number in range(count):
                done = bare.train_step(workload.batches[number % len(workload.batches)])
            assert done is not None
            done[0].item()
            workload.wait_for_device()
            return {"step": (time.perf_counter() - began) / count}

        steps_alone(config.warmup)
        whole.run(config.warmup)
        alone, full = interleaved([steps_alone, lambda: whole.run(steps)], config.repetitions, "Overhead")
        external.finish(Ended(FINISHED), None)
    bare_seconds, full_seconds = ([turn["step"] for turn in turns] for turns in (alone, full))
    return {
        "precision": chosen,
        "steps": steps,
        "wandb": config.wandb.mode,
        **spread("bare_step_seconds", bare_seconds),
        **spread("train_step_seconds", full_seconds),
        "overhead": median(full_seconds) / median(bare_seconds) - 1,
        "overhead_of_each": [mine / other - 1 for mine, other in zip(full_seconds, bare_seconds, strict=True)],
        "once_a_run_seconds": {key: median(turn[key] for turn in full) for key in ONCE},
        "overhead_with_all": median(turn["with_all"] for turn in full) / median(bare_seconds) - 1,
    }


def told(found: Row) -> str:
    """The overhead in a few lines."""
    bare, full = (found[key] for key in ("bare_step_seconds", "train_step_seconds"))
    each, once = found["overhead_of_each"], found["once_a_run_seconds"]
    return (
        f"overhead of Trainer.train, {found['steps']} steps, {found['precision']}, wandb={found['wandb']}: "
        f"{found['overhead']:+.1%} ({min(each):+.1%} - {max(each):+.1%}), "
        f"{full * 1e3:,.1f} ms a step, bare {bare * 1e3:,.1f} ms\n"
        f"beside it once: {once['first_batch'] * 1e3:,.0f} ms to the first batch, {once['evaluation'] * 1e3:,.0f} ms "
        f"to evaluate a batch, {once['save'] * 1e3:,.0f} ms to save; with them {found['overhead_with_all']:+.1%}"
    )
