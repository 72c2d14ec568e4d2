"""Recorded studies: `python -m gpt2.main study experiments/<study>` runs what is missing and writes the results.

The folder has `study.yaml` (a `StudyPlan`), its variants as presets, and a `README.md` in which the table and pictures
between two markers are generated. The folder of each run in `outputs/studies/<study>/` follows from its settings, so
the same command resumes the study.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpt2.analysis.runs import COLUMNS, RunResult
from gpt2.cli.compose import ROOT
from gpt2.errors import ResourceError, UserError
from gpt2.experiments.plan import RUNS, PlannedRun, planned_runs, read_plan, validate_plan
from gpt2.runtime.console import ConsoleHandler, time_left
from gpt2.runtime.files import writable_folder
from gpt2.tracking.tracker import DIVERGED, FINISHED
from gpt2.tracking.wandb_logger import lacking

log = logging.getLogger(__name__)


def run_study(folder: Path, jobs: int | None) -> None:
    """Run what a study lacks; if it is complete then, write its results.

    Args:
        jobs: Runs at a time; 0 runs nothing, None is one per core on a CPU and one on a GPU.

    Raises:
        UserError: The study has problems.
        ResourceError: Some runs failed. Nothing was written.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()])
    study = RecordedStudy(folder)
    for run in study.runs:
        if problem := RunResult(run.folder).problem:
            print(f"{problem}; this run counts as missing", file=sys.stderr)
    with writable_folder(folder, "study"):
        pass  # checked before the runs
    problems = study.run(default_jobs() if jobs is None else jobs) if jobs != 0 else []
    missing = sum(not is_done(run) for run in study.runs)
    if missing:
        log.info(f"\n{missing} of {len(study.runs)} runs are missing: {folder} is not changed.")
    else:
        study.write()
    if jobs != 0 and (runs := lacking(run.folder for run in study.runs)):
        log.info(f"\nW&B lacks {runs}")
    if problems:
        raise ResourceError(*problems)


def default_jobs() -> int:
    """One per core, because small models do not use a second thread; one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


class RecordedStudy:
    """A folder with a plan, and the runs of the plan."""

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: The folder has no plan, or the plan has problems.
        """
        self.folder, self.name = folder, folder.resolve().name
        self.plan = read_plan(folder)
        if problems := validate_plan(self.plan, folder):
            raise UserError(*dict.fromkeys(problems))
        self.runs = planned_runs(self.plan, self.name)

    def run(self, jobs: int) -> list[str]:
        """Run what is not done, `jobs` at a time. Returns the problems of runs that failed."""
        missing = [run for run in self.runs if not is_done(run)]
        done = len(self.runs) - len(missing)
        log.info(f"Study   {self.name}: {len(self.runs)} runs" + (f", {done} of them done" if done else ""))
        log.info(f"In      {RUNS / self.name}, {jobs} at a time\n")
        started, problems = time.monotonic(), []
        running: list[RunProcess] = []
        try:
            while missing or running:
                while missing and len(running) < jobs:
                    running.append(RunProcess(missing.pop(0), jobs))
                for process in [process for process in running if process.has_ended()]:
                    running.remove(process)
                    problem = process.problem()
                    problems += [problem] if problem else []
                    left = len(missing) + len(running)
                    ended = len(self.runs) - left
                    clock = f"{time_left((time.monotonic() - started) / (ended - done) * left)} left" if left else ""
                    line = f"{ended:>4} of {len(self.runs)}  {problem or self.line(process.run)}  {clock}"
                    log.info(line.rstrip())
                time.sleep(0.2)
        except (KeyboardInterrupt, SystemExit):
            log.info(f"{sum(map(is_done, self.runs))} of {len(self.runs)} runs are done. Resume with the same command.")
            raise
        finally:
            for process in running:
                process.end()
        return problems

    def line(self, planned: PlannedRun) -> str:
        """How a run ended, in one line."""
        run, column = RunResult(planned.folder), COLUMNS[self.plan.metric]
        value = column.of(run)
        result = run.state if value is None or run.state != FINISHED else f"{column.header} {column.shown(value)}"
        return f"{planned.name:<44} {result}  {time_left(run.last('seconds'))}"

    def write(self) -> None:
        """Write results, table and pictures, and log how they compare with the recorded ones.

        Raises:
            UserError: The folder cannot be written to.
        """
        from gpt2.experiments.results import Results  # here, because it imports matplotlib

        results = Results(self.name, self.plan, self.runs)
        comparison = results.compare_with_recorded(self.folder)
        try:
            files = ", ".join(results.write(self.folder))
        except OSError as error:
            raise UserError(f"cannot write {error.filename or self.folder}: {error.strerror}") from error
        log.info("\n".join(["", results.table(), "", *comparison, f"Written to {self.folder}: {files}"]))


class RunProcess:
    """A process of `train.py` for one run."""

    def __init__(self, run: PlannedRun, jobs: int):
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.run, self.errors = run, tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with this object
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *run.arguments],
            env={"OMP_NUM_THREADS": threads, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Let it save its state and end."""
        self.process.terminate()
        self.process.wait()

    def problem(self) -> str | None:
        """Why the run failed: the last line of its errors. Divergence is a result."""
        if is_done(self.run):
            return None
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [RunResult(self.run.folder).problem or "no error message"]
        return f"{self.run.name}: exit code {self.process.returncode}, {lines[-1].removeprefix('error: ')}"


def is_done(run: PlannedRun) -> bool:
    result = RunResult(run.folder)
    return result.problem is None and result.state in (FINISHED, DIVERGED)
