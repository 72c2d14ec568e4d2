"""Studies through Hydra's multirun: `hydra/sweeper: study`.

The sweeper takes trials from the study and gives them to Hydra's launcher. A job, in this process or another one, finds
its trial by its number and reports the outcome itself: a job that is killed affects only its own trial, and the
trials that ended before the sweeper was killed are complete.

The loop of Hydra's Optuna plugin is not used, because it cannot prune, resume, or end after a time.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from gpt2.checkpoint.run_folder import checkpoint_folder_of
from gpt2.cli.compose import as_argument, escaped, overrides_of, preset, to_yaml, without_sweeps
from gpt2.cli.launchers import jobs_save_first, log_submissions
from gpt2.cli.search_space import KEY, algorithms_of, distributions, shared_settings, study_settings, study_sweeper
from gpt2.errors import UserError, counted, one_line
from gpt2.runtime.console import ConsoleHandler, LogFile
from gpt2.runtime.files import atomic_write, exclusive_change
from gpt2.runtime.signals import Interrupted

if TYPE_CHECKING:  # a run without a study does not wait for Optuna's import
    from optuna.trial import FrozenTrial, Trial

    from gpt2.search.study import Study
    from gpt2.search.trial import RunningTrial

log = logging.getLogger("study")

# The environment variable through which jobs get the storage. No file has it, because its URL may have a password.
STUDY_VARIABLE = "GPT2_STUDY"


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


class StudySweeper(Sweeper):
    """Hydra's sweeper for `-m` with `hydra/sweeper: study`."""

    def __init__(self, **_config: Any):
        """Ignores the settings, which `setup` reads from the whole configuration."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        sweeper = study_sweeper(without_sweeps([*overrides_of(config.hydra, "hydra"), *overrides_of(config.hydra)]))
        assert sweeper is not None
        self.sweeper, self.folder = sweeper, Path(config.hydra.sweep.dir)
        hide_storage(config)
        hide_storage(HydraConfig.instance().cfg)  # type: ignore[arg-type]  # jobs in other processes get this one
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        log_submissions(False)  # each trial has its own line

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that the study lacks.

        Raises:
            UserError: The study cannot be opened, has other settings, or no trial gave a value.
        """
        from gpt2.search.storage import storage_errors
        from gpt2.search.trial import quiet_optuna

        with quiet_optuna(), storage_errors(self.sweeper.storage):
            study = self._open(arguments)
            context = {"storage": study.config.storage, "deadline": study.deadline, "sweeper": os.getpid()}
            os.environ[STUDY_VARIABLE] = json.dumps(context)
            with study_log(self.folder):
                try:
                    self._run(study)
                except Interrupted:
                    log.info(
                        f"{len(study.done())} of {study.config.n_trials} trials are done. Resume with the same command."
                    )
                    raise
                finally:
                    del os.environ[STUDY_VARIABLE]

    def _open(self, arguments: list[str]) -> "Study":
        from gpt2.search.algorithms import grid
        from gpt2.search.storage import file_of
        from gpt2.search.study import Study

        params = [f"{key}={value}" for key, value in self.sweeper.params.items() if value is not None]
        space, fixed = distributions([*params, *arguments])
        self.fixed = [f"{key}={value}" for key, value in fixed.items()]
        settings = study_settings(self.sweeper)
        if settings.sampler == "grid":
            settings.n_trials = min(settings.n_trials, prod(map(len, grid(space).values())))

        lost = f"{self.folder} has runs of a study that is not in the storage; move the folder away"
        folders = [path for path in self.folder.glob("*") if path.name.isdigit()]
        if folders and (file := file_of(settings.storage)) and not file.exists():  # `Study` would create it
            raise UserError(lost)
        study = Study(
            settings,
            space,
            algorithms_of(self.sweeper, self.sweeper.sampler.get("seed")),
            run_folder=lambda number: self.folder / str(number),
            fixed=shared_settings(self.fixed, set(space)),
        )
        if folders and not study.optuna.get_trials(deepcopy=False):
            raise UserError(lost)
        return study

    def _run(self, study: "Study") -> None:
        self._announce(study)
        if len(study.done()) < study.config.n_trials:
            import gpt2.train  # noqa: F401  # before a trial is claimed: a kill during this import costs no trial
        with study:
            while trials := study.claim(self.sweeper.n_jobs):
                study.settle(trials, self._launch(study, trials))
        self._conclude(study)

    def _launch(self, study: "Study", trials: "list[Trial]") -> str | None:
        """Run trials. Returns why one of them could not report how it ended; None if all could."""
        jobs = [
            (
                *(f"{key}={value}" for key, value in trial.params.items()),
                *self.fixed,
                f"study.name='{self.sweeper.study_name}'",
                f"study.trial={trial.number}",
                f"study.claim='{study.claims[trial.number]}'",
                f"hydra.sweep.subdir={trial.number}",
            )
            for trial in trials
        ]
        try:
            with jobs_save_first(self.launcher, self.folder):
                returns = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        except Exception as error:  # noqa: BLE001  # the launcher's: one of its processes was killed
            return f"{type(error).__name__}: {one_line(error.__cause__ or error)}"[:300]
        problem = None
        for returned in returns:
            if returned.status != JobStatus.COMPLETED:
                problem = f"{type(returned._return_value).__name__}: {returned._return_value}"
            elif isinstance(returned.return_value, UserError):
                raise returned.return_value
        return problem

    def _announce(self, study: "Study") -> None:
        from gpt2.search.study import describe

        settings, done = study.config, len(study.done())
        trials = counted(settings.n_trials, "trial")
        space = f"\n{' ' * 8}".join(f"{key} {describe(values)}" for key, values in study.space.items())
        log.info(
            f"Study   {settings.study_name}: {trials}{f', {done} of them done' if done else ''}\n"
            f"With    sampler {settings.sampler}, pruner {settings.pruner}\n"
            f"Space   {space}\n"
            f"In      {self.folder}, one folder for each trial\n"
        )

    def _conclude(self, study: "Study") -> None:
        """Write the report and `best.yaml`, and log where they are and how to continue.

        Raises:
            StudyFailure: No trial gave a value.
        """
        from gpt2.search import report
        from gpt2.tracking.wandb_runs import lacking

        report.write(study.optuna, self.folder)
        with exclusive_change(self.folder):
            best = study.best_or_failure()
            again = self._write_best(best)
        files = ", ".join(sorted(path.name for path in self.folder.glob("*.png")))
        run = self.folder / str(best.number)
        is_here = checkpoint_folder_of(run) is not None  # or in the sweep folder of another process
        where = f"and the best trial's checkpoints in {best.number}/" if is_here else "the best trial was run elsewhere"
        generate = f"Generate:  python generate.py {as_argument('checkpoint', str(run))}"
        log.info(
            f"\n{report.summary(study.optuna)}\n\n"
            f"Everything is in {self.folder}:\n"
            f"  study.md (all trials in a table), trials.csv, {files}\n"
            f"  best.yaml, {where}\n\n"
            f"Train the best trial again:  {again}" + (f"\n{generate}" if is_here else "")
        )
        if line := lacking((path for path in self.folder.iterdir() if path.name.isdigit()), "trial"):
            log.info(f"\n{line}")

    def _write_best(self, best: "FrozenTrial") -> str:
        """Write `best.yaml`, the best trial as a preset. Returns the command that trains it."""
        name = self.sweeper.study_name
        overrides = [*self.fixed, *(f"{key}={value}" for key, value in best.params.items())]
        choices, values = preset(overrides, searched=set(best.params))
        file: dict[str, Any] = {"defaults": [{f"override /{group}": choice} for group, choice in choices.items()]}
        for key, value in {**values, "name": name}.items():
            group, _, field = key.rpartition(".")
            if (group or key) not in ("loggers", "wandb", "mlflow"):
                (file.setdefault(group, {}) if group else file)[field] = value
        command = f"python train.py +{name}=best"
        comment = f"# Trial {best.number} of the study {name}: validation loss {best.value:.4f}\n# {command}\n"
        with atomic_write(self.folder / "best.yaml") as output:
            output.write(f"# @package _global_\n\n{comment}{to_yaml(file)}".encode())
        is_found = self.folder.absolute() == Path("outputs/sweeps", name).absolute()  # on Hydra's search path
        return command if is_found else f"{command}, with best.yaml in outputs/sweeps/{name}/"


def hide_storage(config: DictConfig) -> None:
    """Remove the storage from what Hydra gives to jobs and writes to their folders: its URL may contain a password."""
    overrides = [
        text for text in overrides_of(config.hydra, "hydra") if not text.lstrip("+").startswith(f"{KEY}storage")
    ]
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweeper.storage = None
        config.hydra.overrides.hydra = [*overrides, f"{KEY}storage=null"]


@contextmanager
def study_log(folder: Path) -> Iterator[None]:
    """Log the study to the terminal, and with time and process id to `study.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    console, file = ConsoleHandler(), LogFile(str(folder / "study.log"))
    file.setFormatter(logging.Formatter("%(asctime)s %(process)d: %(message)s"))
    log.handlers, log.propagate = [console, file], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = [], True
        file.close()


# ---------------------------------------------------------------------------------------------------------------------
# A job


def run_trial(composed: DictConfig, run: "Callable[[RunningTrial], float | None]") -> Any:
    """Run the trial of a job, resuming from its checkpoint if there is one, and report the outcome to the study.

    Returns the loss, or the UserError that stops the study. Hydra passes both to the sweeper.
    """
    from gpt2.search.storage import open_storage
    from gpt2.search.trial import RunningTrial, quiet_optuna

    job = HydraConfig.get()
    context = json.loads(os.environ[STUDY_VARIABLE])
    is_sweeper = os.getpid() == context["sweeper"]
    settings = study_settings(job.sweeper)
    settings.storage = context["storage"]
    with quiet_optuna():
        trial = RunningTrial(
            composed.study.trial,
            open_storage(settings.storage),
            settings,
            algorithms_of(job.sweeper).pruner(),
            checkpoints=lambda number: Path(job.sweep.dir) / str(number) / composed.train.checkpoint_dir,
            claim=composed.study.claim,
            deadline=context["deadline"],
            ends_with_parent=not is_sweeper,
        )
        composed.resume, composed.train.auto_resume = escaped(job.runtime.output_dir), True
        outcome = trial.run(lambda: run(trial))
    if outcome.reason:
        text = f"{outcome.ending.run_state}: {outcome.reason}\n{outcome.traceback or ''}"
        logging.getLogger("gpt2").info("Trial ended: %s", text.rstrip())
    if trial.is_orphaned():  # no sweeper reads the return value, and the worker process would wait for more work
        logging.shutdown()
        os._exit(1)
    stop = outcome.stops_study
    if is_sweeper and not isinstance(stop, UserError | None):
        raise stop
    # An interruption of a worker process does not stop the study: another process resumes the trial.
    return stop if isinstance(stop, UserError) else outcome.value


Plugins.instance().register(StudySweeper)
