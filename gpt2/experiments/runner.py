"""A recorded study: `python -m gpt2.main study experiments/<study>` runs what is missing, and writes what was found.

The folder has `study.yaml` (a `StudyPlan`), its variants as presets, and a `README.md` with the question and the
answer; between two marks in it, table and pictures are ours. Runs lie in `outputs/studies/<study>/`, each under a
name that follows from what it is, so the same command goes on with them.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from gpt2.analysis.runs import COLUMNS, RunResult
from gpt2.cli.compose import ROOT
from gpt2.errors import ResourceError, UserError
from gpt2.experiments.plan import RUNS, Point, points_of, read_plan, validate_plan
from gpt2.runtime.console import ConsoleHandler, time_left
from gpt2.runtime.files import LOCK, is_locked
from gpt2.tracking.tracker import DIVERGED, FINISHED
from gpt2.tracking.wandb_logger import offline_runs

log = logging.getLogger(__name__)


def run(folder: Path, jobs: int | None) -> None:
    """Run what a study lacks, and write what was found.

    Args:
        jobs: Runs at a time; 0 runs nothing, None is one a core on a CPU, one on a GPU.

    Raises:
        UserError: The study has faults.
        MachineError: Some runs came to no end. Nothing was written.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()])
    study = RecordedStudy(folder)
    problems = study.run(default_jobs() if jobs is None else jobs) if jobs != 0 else []
    missing = sum(not is_done(point) for point in study.points)
    if missing:
        log.info(f"\n{missing} of {len(study.points)} runs are missing: {folder} is left as it is.")
    else:
        study.write()
    if jobs != 0 and (told := offline_runs(point.folder for point in study.points)):
        log.info(f"\nW&B: {told}")
    if problems:
        raise ResourceError(*problems)


def default_jobs() -> int:
    """One a core: small models only wait for a second thread. On a GPU, one."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


class RecordedStudy:
    """A folder with a plan, and the runs that it asks for."""

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: The folder has no plan, or one with faults in it; all of them are told.
        """
        self.folder, self.name = folder, folder.resolve().name
        self.plan = read_plan(folder)
        if found := validate_plan(self.plan, folder):
            raise UserError(*dict.fromkeys(found))
        self.points = points_of(self.plan, self.name)

    def run(self, jobs: int) -> list[str]:
        """Run what is not finished, some at a time. Returns what went wrong.

        Runs that another process is at are left to it, and waited for.
        """
        missing = [point for point in self.points if not is_done(point)]
        done = len(self.points) - len(missing)
        log.info(f"Study   {self.name}: {len(self.points)} runs" + (f", {done} of them done" if done else ""))
        log.info(f"In      {RUNS / self.name}, {jobs} at a time\n")
        began, problems = time.monotonic(), []
        running: dict[Point, Running] = {}
        try:
            while missing or running:
                free = (point for point in list(missing) if not is_locked(point.folder / LOCK))
                for point in islice(free, jobs - len(running)):
                    missing.remove(point)
                    if not is_done(point):  # another process may have done it by now
                        running[point] = Running(point, jobs)
                for point in [p for p, process in running.items() if process.has_ended()]:
                    process = running.pop(point)
                    if not is_done(point) and is_locked(point.folder / LOCK):  # another process was faster
                        missing.append(point)
                        continue
                    problem = process.problem()
                    left = len(missing) + len(running)
                    mine = len(self.points) - done - left
                    clock = f"{time_left((time.monotonic() - began) / mine * left)} left" if left else ""
                    log.info(f"{done + mine:>4} of {len(self.points)}  {problem or self.told(point)}  {clock}".rstrip())
                    problems += [problem] if problem else []
                time.sleep(0.2)
        except (KeyboardInterrupt, SystemExit):
            log.info(f"{sum(map(is_done, self.points))} of {len(self.points)} runs are done. The same command goes on.")
            raise
        finally:
            for process in running.values():
                process.end()
        return problems

    def told(self, point: Point) -> str:
        """How a run ended, in a line."""
        run = RunResult(point.folder)
        column = COLUMNS[self.plan.metric]
        value = column.of(run)
        shown = run.state if value is None or run.state != FINISHED else f"{column.header} {column.shown(value)}"
        return f"{point.name:<44} {shown}  {time_left(run.last('seconds'))}"

    def write(self) -> None:
        """Write results, table and pictures, and tell how they compare with the recorded ones.

        Raises:
            UserError: The folder cannot be written to.
        """
        from gpt2.experiments.results import Results  # here, for it brings matplotlib

        results = Results(self.name, self.plan, self.points)
        beside = results.beside_recorded(self.folder)
        try:
            files = ", ".join(results.write(self.folder))
        except OSError as error:
            raise UserError(f"cannot write {error.filename or self.folder}: {error.strerror}") from error
        log.info(f"\n{results.table()}\n" + (f"\n{beside}" if beside else "") + f"\nWritten to {self.folder}: {files}")


class Running:
    """A run under way, in a process of its own."""

    def __init__(self, point: Point, jobs: int):
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.point, self.errors = point, tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with this object
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *point.arguments],
            env={"OMP_NUM_THREADS": threads, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Have it save and end."""
        self.process.terminate()
        self.process.wait()

    def problem(self) -> str | None:
        """What went wrong, by the last line that it left; divergence is a result, and no problem."""
        if is_done(self.point):
            return None
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or ["without a word"]
        return f"{self.point.name}: exit code {self.process.returncode}, {lines[-1].removeprefix('error: ')}"


def is_done(point: Point) -> bool:
    return RunResult(point.folder).state in (FINISHED, DIVERGED)
