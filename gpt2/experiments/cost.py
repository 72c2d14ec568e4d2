"""What a recorded study costs: FLOPs by formula, hours by what its runs took so far or by a measured step."""

from collections.abc import Mapping
from math import isnan, nan
from shutil import disk_usage

import torch

from gpt2.analysis.runs import RunResult
from gpt2.analysis.tables import as_text
from gpt2.cli.messages import planned_computation, planned_work
from gpt2.config import TrainRun
from gpt2.experiments.plan import PlannedRun
from gpt2.runtime.console import time_left
from gpt2.runtime.device import keep_freed_memory
from gpt2.runtime.files import in_bytes
from gpt2.training.cost import time_step

SECONDS_BESIDE = 4.0  # of a run beside training: imports, prepared data, the last checkpoint


class StudyCost:
    """What the runs of a study cost, and how much of it is left. `update` reads how far a run is."""

    def __init__(self, configs: Mapping[PlannedRun, TrainRun]):
        self.configs = configs
        self.works = {run: planned_work(config) for run, config in configs.items()}
        self.steps = {run: config.train.max_steps for run, config in configs.items()}
        known = {run: steps * self.works[run].flops_per_step for run, steps in self.steps.items() if steps}
        usual = sum(known.values()) / len(known) if known else 1.0  # for runs whose steps follow from their data
        self.flops = {run: known.get(run, usual) for run in configs}
        self.left = dict(self.flops)
        self.spent = dict.fromkeys(configs, (0.0, 0.0))  # FLOPs and the seconds that they took
        self.measured: dict[float, float] = {}  # seconds a FLOP, by the FLOPs of a step
        for run in configs:
            self.update(run)

    def update(self, run: PlannedRun) -> None:
        result, steps, is_done = RunResult(run.folder), self.steps[run], run.is_done
        if result.problem:
            return
        share = min(1.0, (result.last("step") or 0) / steps) if steps else float(is_done)
        self.spent[run] = share * self.flops[run], result.last("seconds") or 0.0
        self.left[run] = 0.0 if is_done else max(1 - share, 1e-3) * self.flops[run]  # it still saves

    @property
    def share_done(self) -> float:
        return 1 - sum(self.left.values()) / sum(self.flops.values())

    @property
    def ended(self) -> int:
        return sum(not left for left in self.left.values())

    def seconds_per_flop(self, step: float) -> float:
        """Of the runs so far whose steps have as many FLOPs; else as measured; else of all runs so far; else NaN."""
        alike = [spent for run, spent in self.spent.items() if self.works[run].flops_per_step == step]
        for spents in (alike, [(1.0, self.measured.get(step, 0.0))], self.spent.values()):
            flops, seconds = map(sum, zip(*spents, strict=True))
            if flops and seconds:
                return seconds / flops
        return nan

    def seconds_left(self, jobs: int, variant: str | None = None) -> float:
        """What the missing runs need, all or those of a variant; NaN if nothing is known yet."""
        speeds = {step: self.seconds_per_flop(step) for step in {work.flops_per_step for work in self.works.values()}}
        left = {run: flops for run, flops in self.left.items() if flops and variant in (None, run.variant)}
        taken = [speeds[self.works[run].flops_per_step] * flops + SECONDS_BESIDE for run, flops in left.items()]
        return max(sum(taken) / jobs, max(taken, default=0.0))

    def measure(self, threads: int) -> None:
        """Time the steps of missing runs of which none alike was made yet, alone on this machine."""
        keep_freed_memory()  # as a run does
        torch.set_num_threads(threads)
        timed = {self.works[run].flops_per_step for run, (_, seconds) in self.spent.items() if seconds}
        for run, work in self.works.items():
            if self.left[run] and (step := work.flops_per_step) not in {*timed, *self.measured}:
                timing = time_step(work, planned_computation(work, self.steps[run]))
                self.measured[step] = timing.step / step if timing else nan

    def plan(self, jobs: int) -> str:
        """What the runs cost, by variant and together, and how long the missing ones take."""
        variants = list(dict.fromkeys(run.variant for run in self.works))
        rows = [["variant", "runs", "done", "tokens", "FLOPs", "hours left"], *map(self._row, [*variants, None])]
        missing = [run for run, left in self.left.items() if left]
        how = "by a step measured alone, without evaluations" if self.measured else "by the runs so far"
        return "\n".join(
            [
                as_text(rows),
                "",
                f"Time    about {time_left(self.seconds_left(jobs))} for what is missing, {jobs} at a time, {how}",
                f"Disk    at most {in_bytes(sum(map(self._bytes, missing)))} of checkpoints; "
                f"{in_bytes(disk_usage('.').free)} are free here",
            ]
        )

    def _row(self, variant: str | None) -> list[str]:
        runs = [run for run in self.works if variant in (None, run.variant)]
        tokens = sum((self.steps[run] or nan) * self.works[run].tokens_per_step for run in runs)
        flops = sum(self.flops[run] for run in runs) if not isnan(tokens) else nan
        done, hours = sum(not self.left[run] for run in runs), self.seconds_left(1, variant) / 3600
        figures = [f"{tokens:,}", f"{flops:.2g}", f"{hours:.2f}"]
        return [variant or "all", str(len(runs)), str(done), *(figure.replace("nan", "n/a") for figure in figures)]

    def _bytes(self, run: PlannedRun) -> int:
        """The checkpoints that remain of a run: those that are kept, and the best one. AdamW has two averages."""
        config, weights = self.configs[run].train, self.works[run].model.num_parameters()
        return (config.keep_checkpoints + 1) * 4 * weights * (2 if config.optimizer == "muon" else 3)
