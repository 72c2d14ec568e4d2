"""Sweeps: the runs of `-m` without a study. A run that fails does not end the others.

A job returns the error that ended its run instead of raising it. So every launcher continues, and the sweeper gets the
errors and names the failed runs at the end.
"""

import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from gpt2.cli.compose import leaves
from gpt2.cli.hydra_private import BasicSweeper
from gpt2.cli.launchers import jobs_save_first, uses_submitit, wait_for_all_jobs
from gpt2.cli.search_space import with_choices_listed
from gpt2.errors import ResourceError, UserError, machine_error, one_line, shortened, without_secrets
from gpt2.runtime.files import LOCK, is_locked, writable_folder
from gpt2.runtime.signals import Interrupted
from gpt2.tracking.tracker import ABOUT, FINISHED, RUNNING, read_about, record_failure

Overrides = Sequence[str]


class LostRun(ResourceError):
    """The process of a run ended without recording why."""

    @classmethod
    def by(cls, error: Exception) -> "LostRun":
        return cls(f"its process ended; {machine_error(error) or one_line(error).partition('. ')[0][:300]}")


class RunSweeper(BasicSweeper):
    """Hydra's sweeper for `-m` without a study; at its end it names the runs that failed."""

    config: DictConfig  # `setup` sets this and the next two
    hydra_context: HydraContext
    launcher: Launcher
    start_marker: Path  # written when this sweep starts; older files are of an earlier sweep in the same folder

    def sweep(self, arguments: list[str]) -> None:
        """Run every combination.

        Raises:
            UserError: Two runs would write to the same folder, or some failed.
        """
        size = self.max_batch_size
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"hydra.sweeper.max_batch_size: {size} is not a whole number of at least 1")
        parse = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides
        overrides = parse([with_choices_listed(override) for override in parse([*self._parse_config(), *arguments])])
        batches = self.split_arguments(overrides, size)
        jobs = [job for batch in batches for job in batch]
        folder = Path(self.config.hydra.sweep.dir)  # resolved here, so that all jobs get the same random suffix
        self._refuse_folders(jobs)
        folder.mkdir(parents=True, exist_ok=True)
        self.start_marker = folder / "multirun.yaml"
        OmegaConf.save(self.config, self.start_marker)
        ends: list[Any] = []
        try:
            for batch in batches:
                ends += self._launch(batch, len(ends))
        finally:
            if [*folder.iterdir()] == [self.start_marker]:  # no run started
                self.start_marker.unlink()
        failed = {number: end for number, end in enumerate(ends) if isinstance(end, UserError)}
        if len(jobs) - len(failed) > 1:
            print(f"\nCompare:  python -m gpt2.main compare {shlex.quote(os.path.relpath(folder))}", flush=True)
        if not failed:
            return
        lines, has_no_terminal = list[str](), uses_submitit(self.config.hydra.launcher)
        swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
        for n, error in failed.items():
            if has_no_terminal or isinstance(error, LostRun):  # the run itself has printed other errors
                lines += named(error, n, jobs[n], swept).problems
            if isinstance(error, LostRun):
                with suppress(OSError):
                    record_failure(self._folder_of(jobs[n], n), error)
        codes = {error.exit_code for error in failed.values()}
        code = codes.pop() if len(codes) == 1 else 1
        raise _with_code(UserError(*lines, f"{len(failed)} of {len(jobs)} runs failed: {_reasons(failed)}"), code)

    def _refuse_folders(self, jobs: Sequence[Overrides]) -> None:
        if leaves(self.config.hydra.sweep, resolve=False)["subdir"] == "${hydra.job.num}":
            return
        numbers: dict[Path, int] = {}
        for number, overrides in enumerate(jobs):
            folder = self._folder_of(overrides, number)
            if (first := numbers.setdefault(folder.resolve(), number)) != number:
                raise UserError(
                    f"hydra.sweep.subdir: runs {first} and {number} would both write to {folder}, "
                    "each needs its own folder, such as '${hydra.job.num}'"
                )
            with writable_folder(folder, "hydra.sweep.subdir"):
                pass

    def _folder_of(self, overrides: Overrides, number: int) -> Path:
        """The run folder of a job."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.num, composed.hydra.job.id = number, str(number)
        return Path(composed.hydra.sweep.dir, str(composed.hydra.sweep.subdir))

    def _launch(self, jobs: Sequence[Overrides], first: int) -> list[Any]:
        """Run jobs. Returns how each ended: the UserError that ended it, or else its loss.

        If the process of a job is killed, joblib gives up all jobs. Those that had not started are launched again.
        """
        try:
            with wait_for_all_jobs(), jobs_save_first(self.launcher, self.start_marker.parent):
                return [_end_of(job) for job in self.launcher.launch(jobs, initial_job_idx=first)]
        except Exception as error:
            folders = [self._folder_of(overrides, first + n) for n, overrides in enumerate(jobs)]
            started = max((n for n, folder in enumerate(folders, start=1) if self._wrote(folder / LOCK)), default=0)
            if not started and isinstance(error, OSError):
                raise
            if not started:  # the launcher rejects its settings
                raise UserError(f"hydra.launcher: no run can start: {shortened(one_line(error), 300)}") from error
            lost = LostRun.by(error)
        ends = [self._end_in(folder, lost) for folder in folders[:started]]
        return ends + (self._launch(jobs[started:], first + started) if jobs[started:] else [])

    def _wrote(self, file: Path) -> bool:
        """Whether this sweep wrote a file, and not an earlier sweep in the same folder."""
        return file.exists() and file.stat().st_mtime_ns >= self.start_marker.stat().st_mtime_ns

    def _end_in(self, folder: Path, lost: UserError) -> UserError | None:
        """How the run in a folder ended; `lost` if it was killed, None if it is finished."""
        while is_locked(folder / LOCK):
            time.sleep(0.2)
        about = read_about(folder)
        state = about.get("state", RUNNING)
        if state == FINISHED:
            return None
        if state == RUNNING or not self._wrote(folder / ABOUT):
            return lost
        return _with_code(UserError(about.get("reason") or state), about.get("exit_code", 1))


def _end_of(job: JobReturn) -> Any:
    if job.status == JobStatus.COMPLETED and isinstance(interruption := job.return_value, Interrupted):
        return _with_code(UserError("interrupted"), int(str(interruption.code)))
    if job.status == JobStatus.COMPLETED:
        return job.return_value
    return LostRun.by(job._return_value)


def named(error: UserError, number: int, overrides: Overrides, swept: set[str]) -> UserError:
    """The error of a run, with the number of the run and its values of the keys that are swept."""
    name = name_of_run(number, overrides, swept)
    return _with_code(UserError(*(f"{name}: {problem}" for problem in error.problems)), error.exit_code)


def name_of_run(number: int, overrides: Overrides, swept: set[str]) -> str:
    values = " ".join(text for text in overrides if text.lstrip("+").partition("=")[0] in swept)
    return f"run {number}" + (f" ({shortened(without_secrets(values), 200)})" if values else "")


def _reasons(failed: dict[int, UserError]) -> str:
    """The numbers of the failed runs by reason: `0, 2 (why); 1 (why)`."""
    numbers: dict[str, list[str]] = {}
    for number, error in failed.items():
        numbers.setdefault(shortened(error.problems[0].partition(";")[0], 120), []).append(str(number))
    return "; ".join(f"{', '.join(runs)} ({reason})" for reason, runs in numbers.items())


def _with_code(error: UserError, code: int) -> UserError:
    error.exit_code = code
    return error


Plugins.instance().register(RunSweeper)
