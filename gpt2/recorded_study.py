"""A recorded study: `python -m gpt2.main study experiments/<study>` runs what is missing, and writes what was found.

The folder has `study.yaml` (a `StudyPlan`), its variants as presets, and a `README.md` with the question and the
answer; between two marks in it, table and pictures are ours. Runs lie in `outputs/studies/<study>/`, each under a
name that follows from what it is, so the same command goes on with them.
"""

import itertools
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.command_line import with_values
from gpt2.composition import ROOT, WITHOUT_PART, compose, explain, resolve
from gpt2.config import MachineError, StudyPlan, TrainRun, UserError
from gpt2.console import ConsoleHandler, time_left
from gpt2.run_folder import LOCK, is_held
from gpt2.runs import COLUMNS, RunResult, flat
from gpt2.tracking import DIVERGED, FINISHED

log = logging.getLogger(__name__)

PLAN, SEED = "study.yaml", "train.seed"
RUNS = Path("outputs/studies")
NOT_OF_A_PLAN = WITHOUT_PART | {"started_with", "choices", "study.name", "study.trial", "study.claim"}


@dataclass(frozen=True)
class Point:
    """One run of a study."""

    study: str
    variant: str
    values: dict[str, Any] = field(hash=False)  # of the sweep, and the seed

    @property
    def name(self) -> str:
        words = [f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in self.values.items()]
        return " ".join([self.variant, *words])

    @property
    def folder(self) -> Path:
        return RUNS / self.study / self.name.replace(" ", ",")

    @property
    def overrides(self) -> list[str]:
        return [f"+{self.study}={self.variant}", *(f"{key}={_plain(value)}" for key, value in self.values.items())]

    @property
    def arguments(self) -> list[str]:
        """Of `train.py`."""
        return [*self.overrides, "train.auto_resume=true", f"hydra.run.dir='{self.folder}'"]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class RecordedStudy:
    """A folder with a plan, and the runs that it asks for."""

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: The folder has no plan, or one with faults in it; all of them are told.
        """
        self.folder, self.name = folder, folder.resolve().name
        self.plan = read_plan(folder)
        self.points = list(self._points())
        if found := [*plan_faults(self.plan, folder), *self._faults_of_runs()]:
            raise UserError(*dict.fromkeys(found))

    def _points(self) -> Iterator[Point]:
        """Seed by seed, so that an unfinished study has something of everything."""
        for seed in self.plan.seeds:
            for variant in self.plan.variants:
                for values in itertools.product(*self.plan.sweep.values()):
                    swept = dict(zip(self.plan.sweep, values, strict=True))
                    yield Point(self.name, variant, {**swept, SEED: seed})

    def _faults_of_runs(self) -> Iterator[str]:
        """What is wrong with the command line of any run, or with what lies in its folder."""
        for variant, points in itertools.groupby(sorted(self.points, key=lambda p: p.variant), lambda p: p.variant):
            chosen = f"+{self.name}={variant}"
            try:
                composed = compose("train", [chosen])
            except Exception as error:  # noqa: BLE001  # Hydra's or OmegaConf's
                yield f"{self.folder / variant}.yaml: {explain(error)}"
                continue
            for point in points:
                changed = with_values(composed, point.overrides[1:])
                if changed is None:
                    yield f"{self.folder / PLAN}: sweep: {' '.join(point.overrides[1:])} does not fit"
                    continue
                try:
                    config = resolve("train", changed, point.overrides)
                except UserError as error:
                    yield from (f"{point.name}: {fault}" for fault in error.faults)
                    continue
                assert isinstance(config, TrainRun)
                yield from _faults_of_folder(point, config)

    # Running

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
                for point in [p for p in missing if not is_held(p.folder / LOCK)][: jobs - len(running)]:
                    missing.remove(point)
                    if not is_done(point):  # another process may have done it by now
                        running[point] = Running(point, jobs)
                for point in [p for p, process in running.items() if process.has_ended()]:
                    problem = running.pop(point).problem()
                    left = len(missing) + len(running)
                    mine = len(self.points) - done - left
                    clock = f"{time_left((time.monotonic() - began) / mine * left)} left" if left else ""
                    log.info(f"{done + mine:>4} of {len(self.points)}  {problem or self.told(point)}  {clock}".rstrip())
                    problems += [problem] if problem else []
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.end()
        return problems

    def told(self, point: Point) -> str:
        run = RunResult(point.folder)
        column = COLUMNS[self.plan.metric]
        value = column.of(run)
        shown = run.state if value is None or run.state != FINISHED else f"{column.header} {column.shown(value)}"
        return f"{point.name:<44} {shown}  {time_left(run.last('seconds'))}"


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


def read_plan(folder: Path) -> StudyPlan:
    """The plan of a study.

    Raises:
        UserError: There is none, or it is not of the form of `StudyPlan`.
    """
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"study: {folder} has no {PLAN}; see experiments/learning_rate for one")
    try:
        loaded = yaml.safe_load(path.read_bytes())
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyPlan), _with_numbers(loaded)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {explain(error)}") from error
    assert isinstance(plan, StudyPlan)
    return plan


def _with_numbers(loaded: Any) -> Any:
    """YAML 1.1 takes 1e-3 for a text; Hydra's command line, and whoever writes it, take it for a number."""
    if isinstance(loaded, dict):
        return {key: _with_numbers(value) for key, value in loaded.items()}
    if isinstance(loaded, list):
        return [_with_numbers(value) for value in loaded]
    try:
        return float(loaded) if isinstance(loaded, str) else loaded
    except ValueError:
        return loaded


def plan_faults(plan: StudyPlan, folder: Path) -> list[str]:
    """What is wrong with a plan by itself."""
    path = folder / PLAN
    found = [
        f"{path}: variants: there is no {name}.yaml beside it"
        for name in plan.variants
        if not (folder / f"{name}.yaml").is_file()
    ]
    if (where := folder.resolve().parent) not in (ROOT / "experiments", Path("outputs/sweeps").resolve()):
        found.append(f"study: {folder} lies in {where}; presets are looked for in experiments/ and outputs/sweeps/")
    if plan.metric not in COLUMNS:
        found.append(f"{path}: metric: there is no {plan.metric}; there are {', '.join(COLUMNS)}")
    if not plan.variants or not plan.seeds or not all(plan.sweep.values()):
        found.append(f"{path}: variants, seeds and each key of sweep need at least one value")
    return found


def _faults_of_folder(point: Point, config: TrainRun) -> Iterator[str]:
    """What of the run in a folder is not what the plan says by now."""
    saved = RunResult(point.folder).config
    wanted = flat(asdict(config))
    for key in saved.keys() & wanted.keys() - NOT_OF_A_PLAN:
        if saved[key] != wanted[key]:
            yield (
                f"{point.folder}: was begun with {key}={saved[key]}, the study says {wanted[key]} by now; "
                f"move {RUNS / point.study} away"
            )


def run(folder: Path, jobs: int | None) -> None:
    """Run what a study lacks, and write what was found.

    Raises:
        UserError: The study has faults.
        MachineError: Some runs came to no end; the results are those of the others.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[ConsoleHandler()])
    study = RecordedStudy(folder)
    problems = study.run(default_jobs() if jobs is None else jobs) if jobs != 0 else []
    from gpt2.study_results import Results  # here, for it brings matplotlib

    missing = sum(not is_done(point) for point in study.points)
    if missing:
        log.info(f"\n{missing} of {len(study.points)} runs are missing: {folder} is left as it is.")
    else:
        results = Results(study.name, study.plan, study.points)
        beside = results.beside_recorded(folder)
        files = ", ".join(results.write(folder))
        log.info(f"\n{results.table()}\n" + (f"\n{beside}" if beside else "") + f"\nWritten to {folder}: {files}")
    if problems:
        raise MachineError(*problems)


def default_jobs() -> int:
    """One a core: small models only wait for a second thread. On a GPU, one."""
    import torch

    return 1 if torch.cuda.is_available() else os.cpu_count() or 1
