"""What a recorded study costs: FLOPs by formula, time by what its runs took so far or by a measured step."""

from collections.abc import Hashable, Mapping
from datetime import timedelta
from math import isnan, nan
from shutil import disk_usage

import torch

from gpt2.analysis.runs import RunResult
from gpt2.analysis.tables import as_text
from gpt2.cli.messages import planned_computation, planned_work
from gpt2.config import TrainRun
from gpt2.experiments.plan import ENDED, PlannedRun
from gpt2.runtime.device import keep_freed_memory, requested_precision
from gpt2.runtime.files import in_bytes
from gpt2.training.cost import Work, optimizer_bytes, time_step

SECONDS_BESIDE = 4.0  # per run, outside training: imports, prepared data, the last checkpoint


def kind_of(work: Work) -> Hashable:
    """What the speed of a run depends on; runs of one kind are equally fast."""
    train = work.train
    return work.flops_per_step, train.optimizer, requested_precision(train), train.gradient_checkpointing


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss, also below an hour."""
    return "n/a" if isnan(seconds) else str(timedelta(seconds=round(seconds)))


class StudyCost:
    """What the runs of a study cost, and how much of it is left. `update` reads how far a run is."""

    def __init__(self, configs: Mapping[PlannedRun, TrainRun]):
        self.configs = configs
        self.works = {run: planned_work(config) for run, config in configs.items()}
        self.kinds = {run: kind_of(work) for run, work in self.works.items()}
        self.steps = {run: config.train.max_steps for run, config in configs.items()}
        known = {run: steps * self.works[run].flops_per_step for run, steps in self.steps.items() if steps}
        usual = sum(known.values()) / len(known) if known else 1.0  # for runs whose steps follow from their data
        self.flops = {run: known.get(run, usual) for run in configs}
        self.left = dict(self.flops)
        self.spent = dict.fromkeys(configs, (0.0, 0.0))  # FLOPs and the seconds that they took
        self.measured: dict[Hashable, float] = {}  # seconds a FLOP, by kind
        for run in configs:
            self.update(run)

    def update(self, run: PlannedRun) -> None:
        result, steps = RunResult(run.folder), self.steps[run]
        if result.problem:
            return
        is_done = result.state in ENDED
        share = min(1.0, (result.last("step") or 0) / steps) if steps else float(is_done)
        self.spent[run] = share * self.flops[run], result.last("seconds") or 0.0
        self.left[run] = 0.0 if is_done else max(1 - share, 1e-3) * self.flops[run]  # it still saves

    @property
    def share_done(self) -> float:
        return 1 - sum(self.left.values()) / sum(self.flops.values())

    @property
    def ended(self) -> int:
        return sum(not left for left in self.left.values())

    def seconds_per_flop(self, kind: Hashable) -> float:
        """Seconds per FLOP of the runs so far of this kind; else as measured; else of all runs so far; else NaN."""
        alike = [spent for run, spent in self.spent.items() if self.kinds[run] == kind]
        for spents in (alike, [(1.0, self.measured.get(kind, 0.0))], self.spent.values()):
            flops, seconds = map(sum, zip(*spents, strict=True))
            if flops and seconds:
                return seconds / flops
        return nan

    def seconds_left(self, jobs: int, variant: str | None = None) -> float:
        """What the missing runs need, all or those of a variant; NaN if nothing is known yet."""
        speeds = {kind: self.seconds_per_flop(kind) for kind in {*self.kinds.values()}}
        left = {run: flops for run, flops in self.left.items() if flops and variant in (None, run.variant)}
        taken = [
            min(speeds[self.kinds[run]] * flops, self._most_seconds(run)) + SECONDS_BESIDE
            for run, flops in left.items()
        ]
        return max(sum(taken) / jobs, max(taken, default=0.0))

    def _most_seconds(self, run: PlannedRun) -> float:
        return max(0.0, self.configs[run].train.max_training_hours * 3600 - self.spent[run][1])

    @property
    def unknown(self) -> dict[Hashable, PlannedRun]:
        """One missing run of each kind whose speed is unknown."""
        known = {*self.measured, *(self.kinds[run] for run, (_, seconds) in self.spent.items() if seconds)}
        return {kind: run for run, kind in self.kinds.items() if self.left[run] and kind not in known}

    def measure(self, threads: int) -> None:
        """Time a step of each unknown kind of runs, alone on this machine."""
        keep_freed_memory()  # as a run does
        torch.set_num_threads(threads)
        for kind, run in self.unknown.items():
            work = self.works[run]
            timing = time_step(work, planned_computation(work, self.steps[run]))
            self.measured[kind] = timing.step / work.flops_per_step if timing else nan

    def plan(self, jobs: int) -> str:
        """What the missing runs cost, by variant and together."""
        variants = list(dict.fromkeys(run.variant for run in self.works))
        rows = [
            ["variant", "runs", "done", "tokens left", "FLOPs left", "time left"],
            *map(self._row, [*variants, None]),
        ]
        missing = [run for run, left in self.left.items() if left]
        how = "by a step measured alone, without evaluations" if self.measured else "by the runs so far"
        return "\n".join(
            [
                as_text(rows),
                "",
                f"Time    about {hours(self.seconds_left(jobs))} for what is missing, {jobs} at a time, {how}",
                f"Disk    at most {in_bytes(sum(map(self._bytes, missing)))} of checkpoints; "
                f"{in_bytes(disk_usage('.').free)} are free here",
            ]
        )

    def _row(self, variant: str | None) -> list[str]:
        runs = [run for run in self.works if variant in (None, run.variant)]
        left = {run: flops if self.steps[run] else nan for run in runs if (flops := self.left[run])}
        tokens = sum(
            flops * self.works[run].tokens_per_step / self.works[run].flops_per_step for run, flops in left.items()
        )
        figures = [f"{tokens:,.0f}", f"{sum(left.values()):.2g}", hours(self.seconds_left(1, variant))]
        return [
            variant or "all",
            str(len(runs)),
            str(len(runs) - len(left)),
            *(figure.replace("nan", "n/a") for figure in figures),
        ]

    def _bytes(self, run: PlannedRun) -> int:
        """The checkpoints that remain of a run: those that are kept, and the best one."""
        config, model = self.configs[run].train, self.works[run].model
        return (config.keep_checkpoints + 1) * (4 * model.num_parameters() + optimizer_bytes(model, config))
