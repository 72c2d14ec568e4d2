"""The cost of a recorded study: FLOPs by formula, time extrapolated from its runs so far or from a measured step."""

from collections.abc import Hashable, Mapping
from math import nan
from shutil import disk_usage

import torch

from gpt2.analysis.runs import RunResult
from gpt2.analysis.tables import as_text
from gpt2.cli.messages import planned_computation, planned_work
from gpt2.config import TrainRun
from gpt2.experiments.plan import ENDED, PlannedRun
from gpt2.runtime.console import time_left
from gpt2.runtime.device import keep_freed_memory, requested_precision
from gpt2.runtime.files import in_bytes
from gpt2.training.cost import Work, optimizer_bytes, time_step

SECONDS_BESIDE = 4.0  # per run, outside training: imports, opening the data, the last checkpoint


def kind_of(work: Work) -> Hashable:
    """Return what the speed of a run depends on. Runs of one kind are equally fast."""
    train = work.train
    return work.flops_per_step, train.optimizer, requested_precision(train), train.gradient_checkpointing


class StudyCost:
    """The cost of the runs of a study, and how much of it is left. `update` reads the progress of a run."""

    def __init__(self, configs: Mapping[PlannedRun, TrainRun]):
        self.configs = configs
        self.works = {run: planned_work(config) for run, config in configs.items()}
        self.kinds = {run: kind_of(work) for run, work in self.works.items()}
        self.steps = {run: config.train.max_steps for run, config in configs.items()}
        known = {run: steps * self.works[run].flops_per_step for run, steps in self.steps.items() if steps}
        usual = sum(known.values()) / len(known) if known else 1.0  # if the number of steps follows from the data
        self.flops = {run: known.get(run, usual) for run in configs}
        self.left = dict(self.flops)
        self.spent = dict.fromkeys(configs, (0.0, 0.0))  # FLOPs and seconds so far
        self.measured: dict[Hashable, float] = {}  # seconds per FLOP, by kind
        for run in configs:
            self.update(run)

    def update(self, run: PlannedRun) -> None:
        result, steps = RunResult(run.folder), self.steps[run]
        if result.problem:
            return
        is_done = result.state in ENDED
        share = min(1.0, (result.last("step") or 0) / steps) if steps else float(is_done)
        self.spent[run] = share * self.flops[run], result.last("seconds") or 0.0
        self.left[run] = 0.0 if is_done else max(1 - share, 1e-3) * self.flops[run]  # not 0 before it has saved

    @property
    def share_done(self) -> float:
        return 1 - sum(self.left.values()) / sum(self.flops.values())

    @property
    def ended(self) -> int:
        return sum(not left for left in self.left.values())

    def seconds_per_flop(self, kind: Hashable) -> float:
        """Return the seconds per FLOP of runs of this kind; else as measured; else of all runs; else NaN."""
        alike = [spent for run, spent in self.spent.items() if self.kinds[run] == kind]
        for spents in (alike, [(1.0, self.measured.get(kind, 0.0))], self.spent.values()):
            flops, seconds = map(sum, zip(*spents, strict=True))
            if flops and seconds:
                return seconds / flops
        return nan

    def seconds_left(self, jobs: int, variant: str | None = None) -> float:
        """Return the seconds for the missing runs of all variants or of one; NaN if no speed is known."""
        speeds = {kind: self.seconds_per_flop(kind) for kind in {*self.kinds.values()}}
        needed = []
        for run, flops in self.left.items():
            if flops and variant in (None, run.variant):
                limit = self.configs[run].train.max_training_hours * 3600 - self.spent[run][1]
                needed.append(min(speeds[self.kinds[run]] * flops, max(0.0, limit)) + SECONDS_BESIDE)
        return max(sum(needed) / jobs, max(needed, default=0.0))

    @property
    def unknown(self) -> dict[Hashable, PlannedRun]:
        """One missing run of each kind whose speed is unknown."""
        known = {*self.measured, *(self.kinds[run] for run, (_, seconds) in self.spent.items() if seconds)}
        return {kind: run for run, kind in self.kinds.items() if self.left[run] and kind not in known}

    def measure(self, threads: int) -> None:
        """Time a step of each kind of runs whose speed is unknown, one after the other."""
        keep_freed_memory()  # as train.py does
        torch.set_num_threads(threads)
        for kind, run in self.unknown.items():
            work = self.works[run]
            timing = time_step(work, planned_computation(work, self.steps[run]))
            self.measured[kind] = timing.step / work.flops_per_step if timing else nan

    def plan(self, jobs: int) -> str:
        """Return the cost of the missing runs as text, by variant and in total."""
        head = ["variant", "runs", "done", "tokens left", "FLOPs left", "time left"]
        variants = dict.fromkeys(run.variant for run in self.works)
        missing = [run for run, left in self.left.items() if left]
        how = "by a step measured alone, without evaluations" if self.measured else "by the runs so far"
        return (
            f"{as_text([head, *map(self._row, [*variants, None])])}\n\n"
            f"Time    about {time_left(self.seconds_left(jobs))} for the missing runs, {jobs} at a time, {how}\n"
            f"Disk    at most {in_bytes(sum(map(self._bytes, missing)))} of checkpoints; "
            f"{in_bytes(disk_usage('.').free)} are free here"
        )

    def _row(self, variant: str | None) -> list[str]:
        runs = [run for run in self.works if variant in (None, run.variant)]
        left = {run: flops if self.steps[run] else nan for run in runs if (flops := self.left[run])}
        works = {run: self.works[run] for run in left}
        tokens = sum(flops / works[run].flops_per_step * works[run].tokens_per_step for run, flops in left.items())
        figures = [f"{tokens:,.0f}".replace("nan", "n/a"), f"{sum(left.values()):.2g}".replace("nan", "n/a")]
        counts = [str(len(runs)), str(len(runs) - len(left))]
        return [variant or "all", *counts, *figures, time_left(self.seconds_left(1, variant))]

    def _bytes(self, run: PlannedRun) -> int:
        """Return the size of the checkpoints that a run keeps: the newest ones and the best one."""
        config, model = self.configs[run].train, self.works[run].model
        return (config.keep_checkpoints + 1) * (4 * model.num_parameters() + optimizer_bytes(model, config))
