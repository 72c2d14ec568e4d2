"""Recorded studies: `python -m gpt2.main study experiments/<study>` runs the missing runs and writes the results.

The folder of a study has `study.yaml` (a `StudyPlan`), a preset for each variant, and a `README.md` with a generated
part. The settings of a run determine its folder in `outputs/studies/<study>/`, so the same command resumes the study.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from rich.progress import BarColumn, TextColumn

from gpt2.analysis.runs import COLUMNS, RunResult
from gpt2.config import TrainRun
from gpt2.errors import ResourceError, UserError, counted
from gpt2.experiments.plan import RUNS, PlannedRun, read_plan, validated_runs
from gpt2.runtime.console import ConsoleHandler, LiveProgress, time_left
from gpt2.runtime.files import run_lock, writable_folder
from gpt2.runtime.repository import ROOT
from gpt2.tracking.tracker import FINISHED
from gpt2.tracking.wandb_runs import lacking

log = logging.getLogger(__name__)

NICE = 10  # the niceness of runs: programs usually have 0, and 19 is the lowest priority
SECONDS_BETWEEN_UPDATES = 2.0  # an update of the progress reads the folders of runs


def run_study(folder: Path, jobs: int | None, threads: int | None = None, variants: list[str] | None = None) -> None:
    """Run the missing runs of a study, and write its results if it is complete.

    Args:
        jobs: Runs at a time; 0: run none; None: one per core on a CPU, one on a GPU.
        threads: Threads of each run; None: cores / jobs.
        variants: Only run these variants, and write no results. None: all variants.

    Raises:
        UserError: The study has problems, another process runs it, or `jobs` is 0 and runs are missing.
        ResourceError: Runs failed, for printed reasons. No results were written.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()])
    if jobs != 0:
        validate_place(folder)
    study = RecordedStudy(folder, variants)
    for run in study.runs:
        if problem := RunResult(run.folder).problem:
            print(f"{problem}; this run counts as missing", file=sys.stderr)
    with writable_folder(folder, "study", advice="make it writable, or copy the study to outputs/sweeps/"):
        pass  # a problem is reported before the runs and not after them
    if not variants:
        from gpt2.experiments.results import validate_recorded  # here, because it imports matplotlib

        validate_recorded(folder)
    failed = study.run(default_jobs() if jobs is None else jobs, threads) if jobs != 0 else 0
    missing = sum(not run.is_done for run in study.runs)
    if jobs == 0 and missing:
        raise UserError(
            f"jobs=0: {missing} of {counted(len(study.runs), 'run')} are missing, so no results are written"
        )
    if missing:
        log.info(f"{missing} of {len(study.runs)} runs are missing: {folder} is not changed.")
    elif variants:
        done = f"All {len(study.runs)} runs of {', '.join(variants)} are done"
        log.info(f"{done}. Without variants= the study writes its results.")
    else:
        study.write()
    if jobs != 0 and (line := lacking((run.folder for run in study.runs), "run")):
        log.info(f"\n{line}")
    if failed:
        raise ResourceError(f"{failed} of {counted(len(study.runs), 'run')} failed; the same command tries them again")


def print_plan(folder: Path, jobs: int | None, threads: int | None, variants: list[str] | None = None) -> None:
    """Print the cost of the missing runs of a study on this machine. Nothing is written.

    Raises:
        UserError: The study has problems.
    """
    validate_place(folder)
    study = RecordedStudy(folder, variants)
    from gpt2.experiments.cost import StudyCost  # here, because it imports torch

    jobs = jobs or default_jobs()
    threads = threads or default_threads(jobs)
    print(study.header(jobs, threads), flush=True)
    cost = StudyCost(study.configs)
    if cost.unknown:
        print(f"Measuring the speed of {counted(len(cost.unknown), 'kind')} of runs\n", flush=True)
        cost.measure(threads)
    print(cost.plan(jobs))


def validate_place(folder: Path) -> None:
    """Check that the runs of a study can be written.

    Raises:
        UserError: They cannot.
    """
    with writable_folder(RUNS / folder.resolve().name, "study", advice="run the command in another folder"):
        pass


def default_jobs() -> int:
    """Return the number of cores, because small models gain little from a second thread; 1 on a GPU."""
    import torch

    from gpt2.runtime.device import available_cores  # here, because it imports torch

    return 1 if torch.cuda.is_available() else available_cores()


def default_threads(jobs: int) -> int:
    """Return `OMP_NUM_THREADS`, or the number of cores divided by the runs at a time."""
    from gpt2.runtime.device import available_cores  # here, because it imports torch

    requested = os.environ.get("OMP_NUM_THREADS", "")
    return int(requested) if requested.isdecimal() and int(requested) else max(1, available_cores() // jobs)


class RecordedStudy:
    """A folder of `experiments/` with a plan, and the runs of the plan."""

    def __init__(self, folder: Path, variants: list[str] | None = None):
        """
        Args:
            variants: Only these variants; None: all.

        Raises:
            UserError: The folder has no plan, the plan has problems, or it has no such variant.
        """
        self.folder, self.name = folder, folder.resolve().name
        self.plan = read_plan(folder)
        if unknown := set(variants or ()) - set(self.plan.variants):
            raise UserError(f"variants: {min(unknown)} is none of {', '.join(self.plan.variants)}")
        chosen = variants or self.plan.variants
        self.configs = {run: c for run, c in validated_runs(self.plan, folder).items() if run.variant in chosen}
        self.runs = list(self.configs)

    def header(self, jobs: int, threads: int) -> str:
        done = sum(run.is_done for run in self.runs)
        return (
            f"Study   {self.name}: {counted(len(self.runs), 'run')}{f', {done} of them done' if done else ''}\n"
            f"In      {RUNS / self.name}, {jobs} at a time, {counted(threads, 'thread')} each, "
            f"at a low priority (nice {NICE})\n"
        )

    def run(self, jobs: int, threads: int | None = None) -> int:
        """Run the missing runs, `jobs` at a time, and print why runs failed. Return the number of failed runs.

        Raises:
            RunLockedError: Another process runs the study.
        """
        threads, missing = threads or default_threads(jobs), [run for run in self.runs if not run.is_done]
        (RUNS / self.name).mkdir(parents=True, exist_ok=True)
        failed, running = 0, list[RunProcess]()
        progress = StudyProgress(self.configs, jobs)
        with run_lock(RUNS / self.name), progress.bar:
            log.info(self.header(jobs, threads))
            if not missing:
                return 0
            try:
                progress.measure(threads)
                while missing or running:
                    while missing and len(running) < jobs:
                        running.append(RunProcess(missing.pop(0), threads))
                    progress.show([process.run for process in running])
                    for process in [process for process in running if process.has_ended()]:
                        running.remove(process)
                        if problem := process.problem():
                            failed += 1
                            print(f"error: {problem}", file=sys.stderr)
                        line = f"{process.run.name:<44} failed" if problem else self.line(process.run)
                        progress.count(process.run, line)
                    time.sleep(0.2)
            except (KeyboardInterrupt, SystemExit):
                done = sum(run.is_done for run in self.runs)
                log.info(f"{done} of {len(self.runs)} runs are done. Resume with the same command.")
                raise
            finally:
                for process in running:
                    process.process.terminate()  # it writes a checkpoint before it ends
                for process in running:
                    process.process.wait()
        log.info("")
        return failed

    def line(self, planned: PlannedRun) -> str:
        """Return a line that says how a run ended."""
        run, column = RunResult(planned.folder), COLUMNS[self.plan.metric]
        result = f"{column.header} {column.text(run)}" if run.state == FINISHED else run.state
        return f"{planned.name:<44} {result}  {time_left(run.last('seconds'))}"

    def write(self) -> None:
        """Write results, table and picture, and log how they compare with the recorded ones.

        Raises:
            UserError: The folder cannot be written to.
        """
        from gpt2.experiments.results import Results, recorded  # here, because it imports matplotlib

        results = Results(self.folder, self.plan, recorded(self.plan, self.runs))
        comparison = results.compare_with_recorded()
        log.info("\n".join([results.table(), "", *comparison, results.write()]))


class StudyProgress:
    """The progress of a study by the FLOPs of its runs: a bar on a terminal, and a line for each run that ends."""

    def __init__(self, configs: dict[PlannedRun, TrainRun], jobs: int):
        from gpt2.experiments.cost import StudyCost  # here, because it imports torch

        self.cost, self.jobs, self.next_update = StudyCost(configs), jobs, 0.0
        self.ended = self.cost.ended  # runs whose process has ended; `cost` counts a run when it has written its result
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}"))
        self.bar = LiveProgress(*columns)
        self.task = self.bar.add_task("", total=1.0, left="")

    def measure(self, threads: int) -> None:
        """Time a step of each kind of runs, because small models need more seconds per FLOP than large ones.

        On a GPU nothing is timed, because this process would keep a part of its memory.
        """
        import torch

        if len(self.cost.unknown) > 1 and not torch.cuda.is_available():
            log.info(f"Measuring the speed of {counted(len(self.cost.unknown), 'kind')} of runs")
            self.cost.measure(threads)

    def show(self, running: list[PlannedRun]) -> None:
        """Update the bar, at most every `SECONDS_BETWEEN_UPDATES`."""
        if time.monotonic() > self.next_update:
            for run in running:
                self.cost.update(run)
            share, left = self.cost.share_done, time_left(self.cost.seconds_left(self.jobs))
            count = f"{self.cost.ended} of {len(self.cost.left)} runs, {len(running)} running"
            self.bar.update(self.task, completed=share, description=count, left=f"{share:.0%}  {left} left")
            self.next_update = time.monotonic() + SECONDS_BETWEEN_UPDATES

    def count(self, run: PlannedRun, line: str) -> None:
        """Log how a run ended."""
        self.cost.update(run)
        self.cost.left[run] = 0.0  # even if the run failed
        self.ended += 1
        ended, runs = self.ended, len(self.cost.left)
        clock = f"{time_left(self.cost.seconds_left(self.jobs))} left" if ended < runs else ""
        log.info(f"{ended:>4} of {runs}  {line}  {clock}".rstrip())


class RunProcess:
    """A process of `train.py` for one run, at a low priority, so that it does not slow down interactive work."""

    def __init__(self, run: PlannedRun, threads: int):
        self.run, self.errors = run, tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with this object
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *run.arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )
        with suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, self.process.pid, max(NICE, os.getpriority(os.PRIO_PROCESS, 0)))

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def problem(self) -> str | None:
        """Return why the run failed: the last line of its errors. None if it is done; a diverged run is done."""
        if self.run.is_done:
            return None
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [RunResult(self.run.folder).problem or "no error message"]
        return f"{self.run.name}: exit code {self.process.returncode}, {lines[-1].removeprefix('error: ')}"
