"""A study through Hydra's multirun: `hydra/sweeper: study`.

The sweeper asks the study for trials and has Hydra's launcher run them; each job, here or in another process, finds its
trial by its number and tells the study itself how it went. So a job that is killed loses itself and nothing else, and
a sweeper that is killed loses no finished job.

The syntax of the space is that of Hydra's own Optuna plugin. Its loop is not used: it has no pruner, no resuming and
no time limit.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gpt2.checkpoint.run_folder import checkpoint_folder_of
from gpt2.cli.compose import CONF, WITHOUT_PART, as_argument, compose, composition_error, leaves, parsed, preset
from gpt2.cli.launchers import show_submissions
from gpt2.config import OptunaConfig, StudyConfig
from gpt2.errors import UserError
from gpt2.runtime.console import ConsoleHandler, LogFile
from gpt2.runtime.files import atomic_write
from gpt2.runtime.signals import Interrupted
from gpt2.validation import Problems, validate

if TYPE_CHECKING:  # Optuna takes its time, and a run without a study has no use for it
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

    from gpt2.search.study import Study
    from gpt2.search.trial import RunningTrial

log = logging.getLogger("study")

KEY = "hydra.sweeper."
ENVIRONMENT = "GPT2_STUDY"  # what jobs must know and no file may: the storage, for its password; and the deadline
INSTANTIATED = ("optuna.samplers.*", "optuna.pruners.*")
GRID = "optuna.samplers.GridSampler"
WITHOUT_PART_IN_STUDY = ("name", "study", "inference", "started_with")  # keys or groups


# ---------------------------------------------------------------------------------------------------------------------
# What `hydra.sweeper` says


def study_sweeper(overrides: list[str]) -> DictConfig | None:
    """`hydra.sweeper` of a command line that begins a study, its interpolations resolved; None if it begins none.

    Raises:
        UserError: It cannot be composed.
    """
    try:
        composed = compose("train", overrides, with_hydra=True)
        sweeper = composed.hydra.sweeper
        if sweeper.get("_target_") != StudyConfig._target_:
            return None
        if sweeper.storage is None:
            sweeper.storage = f"sqlite:///{Path(composed.hydra.sweep.dir).absolute()}/study.db"
        OmegaConf.resolve(sweeper)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(composition_error(error)) from error
    return sweeper


def study_of(sweeper: DictConfig) -> OptunaConfig:
    """The study that a sweeper's configuration describes, but for its sampler and pruner."""
    same = {field.name for field in fields(OptunaConfig)} & {field.name for field in fields(StudyConfig)}
    return OptunaConfig(**{name: sweeper[name] for name in same - {"sampler", "pruner"}})


def validate_study(sweeper: DictConfig, launcher: str) -> Problems:
    """What is wrong with a study, apart from its space."""
    from gpt2.search.storage import validate_storage
    from gpt2.search.trial import optuna_is_quiet

    found = validate(study_of(sweeper), KEY)
    if sweeper.n_jobs < 1:
        found.append(f"{KEY}n_jobs: {sweeper.n_jobs} is not a whole number of at least 1")
    is_one_by_one = "BasicLauncher" in launcher
    if sweeper.n_jobs > 1 and is_one_by_one:
        found.append(f"{KEY}n_jobs: {sweeper.n_jobs} trials at a time need hydra/launcher=joblib")
    name = sweeper.study_name
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    if not re.fullmatch(r"[A-Za-z]\w*(-\w+)*", name) or name in groups:  # it becomes a group, +NAME=best
        found.append(
            f"{KEY}study_name: {name!r} must be letters, digits, '_' and '-', a letter first, and none of "
            f"{', '.join(groups)}"
        )
    if fault := validate_storage(sweeper.storage):
        found.append(f"{KEY}storage: {fault}")
    for key, make in (("sampler", lambda: sampler_factory(sweeper, {})(0)), ("pruner", lambda: make_pruner(sweeper))):
        try:
            with optuna_is_quiet():
                make()
        except Exception as error:  # noqa: BLE001  # Optuna's, or Hydra's of a setting that there is not
            found.append(f"{KEY}{key}: {_last_line(error)}")
    return found


def _last_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split())


def make_pruner(sweeper: DictConfig) -> "BasePruner":
    return instantiate(sweeper.pruner, _execution_whitelist_=INSTANTIATED)


def sampler_factory(sweeper: DictConfig, space: "dict[str, BaseDistribution]") -> "Callable[[int], BaseSampler]":
    """What makes the sampler that draws trial number N."""
    from gpt2.search.study import seed_of_trial

    make = instantiate(sweeper.sampler, _partial_=True, _execution_whitelist_=INSTANTIATED)
    target, seed = sweeper.sampler._target_, sweeper.sampler.get("seed")
    grid = {"search_space": grid_of(space)} if target == GRID else {}

    def of_trial(number: int) -> "BaseSampler":
        if seed is None:
            return make(**grid)
        return make(seed=seed_of_trial(seed, number, target), **grid)

    return of_trial


def grid_of(space: "dict[str, BaseDistribution]") -> dict[str, list[Any]]:
    from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl  # private, hence the exact pin

    return {key: list(OptunaSweeperImpl._to_grid_sampler_choices(values)) for key, values in space.items()}


def what_trials_share(fixed: list[str], searched: set[str]) -> dict[str, Any]:
    """The values that all trials of a study have, with interpolations as they stand: some follow what is searched."""
    composed = leaves(compose("train", fixed), resolved=False)
    return {
        key: value
        for key, value in composed.items()
        if key not in WITHOUT_PART and {key, key.split(".")[0]}.isdisjoint({*searched, *WITHOUT_PART_IN_STUDY})
    }


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


class StudySweeper(Sweeper):
    """What Hydra calls for `-m` with `hydra/sweeper: study`."""

    def __init__(self, **_config: Any):
        """Of a configuration that `setup` sees whole."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        overrides = parsed([*config.hydra.overrides.hydra, *config.hydra.overrides.task])
        sweeper = study_sweeper([str(o.input_line) for o in overrides if not o.is_sweep_override()])
        assert sweeper is not None
        self.sweeper, self.folder = sweeper, Path(config.hydra.sweep.dir)
        hide_storage(config)
        hide_storage(HydraConfig.instance().cfg)  # type: ignore[arg-type]  # which a job in another process gets too
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

        show_submissions(False)  # a trial has a line of its own

    def sweep(self, arguments: list[str]) -> None:
        """Run what the study lacks.

        Raises:
            UserError: The study cannot be opened, is another one, or no trial gave a value.
        """
        from gpt2.search.storage import failures_in_a_line
        from gpt2.search.trial import optuna_is_quiet

        with optuna_is_quiet(), failures_in_a_line(self.sweeper.storage):
            study = self._open(arguments)
            told = {"storage": study.config.storage, "deadline": study.deadline, "sweeper": os.getpid()}
            os.environ[ENVIRONMENT] = json.dumps(told)
            with study_log(self.folder):
                try:
                    self._run(study)
                except Interrupted:
                    done = f"{len(study.done())} of {study.config.n_trials} trials are done"
                    log.info(f"{done}. The same command goes on.")
                    raise
                finally:
                    del os.environ[ENVIRONMENT]

    def _open(self, arguments: list[str]) -> "Study":
        from hydra_plugins.hydra_optuna_sweeper import _impl as plugin  # private, hence the exact pin

        from gpt2.search.study import Study

        params = [f"{key}={value}" for key, value in self.sweeper.params.items() if value is not None]
        space, fixed, _ = plugin.create_params_from_overrides([*params, *arguments])
        space = {key: distribution for key, distribution in space.items() if key not in fixed}
        self.fixed = [f"{key}={value}" for key, value in fixed.items()]
        config = study_of(self.sweeper)
        if self.sweeper.sampler._target_ == GRID:
            config.n_trials = min(config.n_trials, prod(map(len, grid_of(space).values())))

        folders = [path for path in self.folder.glob("*") if path.name.isdigit()]
        study = Study(
            config,
            space,
            sampler_factory(self.sweeper, space),
            make_pruner(self.sweeper),
            self.folder,
            run_folder=lambda number: self.folder / str(number),
            fixed=what_trials_share(self.fixed, set(space)),
        )
        if folders and not study.optuna.get_trials(deepcopy=False):
            raise UserError(f"{self.folder} holds runs of a study that its storage does not know; move one away")
        return study

    def _run(self, study: "Study") -> None:
        self._announce(study)
        if len(study.done()) < study.config.n_trials:
            import gpt2.train  # noqa: F401  # before a trial is taken, which should not die while this is loaded
        with study:
            while trials := study.claim(self.sweeper.n_jobs):
                study.settle(trials, self._launch(study, trials))
        self._conclude(study)

    def _launch(self, study: "Study", trials: "list[Trial]") -> str | None:
        """Run trials to their ends. Returns what kept any of them from telling it themselves."""
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
            returns = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
        except Exception as error:  # noqa: BLE001  # the launcher's: a process of it was killed
            return f"{type(error).__name__}: {_last_line(error)}"[:300]
        problem = None
        for returned in returns:
            if returned.status != JobStatus.COMPLETED:
                problem = f"{type(returned._return_value).__name__}: {returned._return_value}"
            elif isinstance(returned.return_value, UserError):
                raise returned.return_value
        return problem

    def _announce(self, study: "Study") -> None:
        config, done = study.config, len(study.done())
        log.info(
            f"Study   {config.study_name}: {config.n_trials} trials" + (f", {done} of them done" if done else "") + "\n"
            f"By      {_name(self.sweeper.sampler)}, {_name(self.sweeper.pruner)}\n"
            f"Among   {study.shown_space(separator=chr(10) + ' ' * 8)}\n"
            f"In      {self.folder}, each trial in a folder of its number\n"
        )

    def _conclude(self, study: "Study") -> None:
        """Write what was found, and say where and how to go on with it.

        Raises:
            StudyFailure: There is nothing.
        """
        from gpt2.search import report as study_report
        from gpt2.tracking.wandb_logger import offline_runs

        if study.best() is None:
            study_report.write(study.optuna, self.folder)
        best = study.best_or_failure()
        name, in_full = self._write_best(best)
        is_found = self.folder.absolute() == Path("outputs/sweeps", name).absolute()  # where presets are looked for
        again = f"python train.py +{name}=best" if is_found else in_full
        study_report.write(
            study.optuna, self.folder, f"```bash\n{again}\n```\n\nor, in full,\n\n```bash\n{in_full}\n```"
        )
        files = ", ".join(sorted(path.name for path in self.folder.glob("*.png")))
        run = self.folder / str(best.number)
        is_here = checkpoint_folder_of(run) is not None  # or with a process that keeps its sweep somewhere else
        where = f"and the best trial's checkpoints in {best.number}/" if is_here else "the best trial was run elsewhere"
        write = f"Write with it:  python generate.py {as_argument('checkpoint', str(run))}"
        log.info(
            f"\n{study_report.summary(study.optuna)}\n\n"
            f"Everything is in {self.folder}:\n"
            f"  study.md (all trials in a table), trials.csv, {files}\n"
            f"  best.yaml, {where}\n\n"
            f"Train the best one again, longer, otherwise:  {again}" + (f"\n{write}" if is_here else "")
        )
        if told := offline_runs(path for path in self.folder.iterdir() if path.name.isdigit()):
            log.info(f"\nW&B: {told}")

    def _write_best(self, best: "FrozenTrial") -> tuple[str, str]:
        """Write `best.yaml`. Returns the name of the study, and the command that is the same."""
        name = self.sweeper.study_name
        overrides = [*self.fixed, *(f"{key}={value}" for key, value in best.params.items())]
        choices, values = preset(overrides, without={"hparams_search", "wandb"})
        searched = {key: value for key, value in best.params.items() if "." in key}
        values = {**searched, **{key: v for key, v in values.items() if not key.startswith("wandb.")}, "name": name}
        comment = f"Trial {best.number} of the study {name}: validation loss {best.value:.4f}"
        with atomic_write(self.folder / "best.yaml") as file:
            file.write(preset_file(f"{comment}\npython train.py +{name}=best", choices, values).encode())
        return name, " ".join(["python train.py", *(as_argument(*item) for item in {**choices, **values}.items())])


def preset_file(comment: str, choices: dict[str, str], values: dict[str, Any]) -> str:
    """A file of `conf/`, or beside it, that chooses those groups and sets those values."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    defaults = {"defaults": [{f"override /{group}": choice} for group, choice in choices.items()]} if choices else {}
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return f"# @package _global_\n\n{head}{yaml.safe_dump({**defaults, **nested}, sort_keys=False)}"


def _name(config: DictConfig) -> str:
    return str(config._target_).rpartition(".")[2]


def hide_storage(config: DictConfig) -> None:
    """Take the storage out of what Hydra hands to jobs and writes into their folders: its URL may hold a password."""
    overrides = [text for text in config.hydra.overrides.hydra if not text.lstrip("+").startswith(f"{KEY}storage")]
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweeper.storage = None
        config.hydra.overrides.hydra = [*overrides, f"{KEY}storage=null"]


@contextmanager
def study_log(folder: Path) -> Iterator[None]:
    """Have what a study says on the terminal, and with the time in `study.log`."""
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
    """Run a job of a study, going on from the checkpoint of its trial if it has one; the study is told how it went.

    Returns its loss; or why no other trial should begin.
    """
    from gpt2.search.storage import open_storage
    from gpt2.search.trial import RunningTrial, optuna_is_quiet

    job = HydraConfig.get()
    told = json.loads(os.environ[ENVIRONMENT])
    config, number = study_of(job.sweeper), composed.study.trial
    config.storage = told["storage"]
    with optuna_is_quiet():
        trial = RunningTrial(
            number,
            open_storage(config.storage),
            config,
            make_pruner(job.sweeper),
            checkpoints=lambda number: Path(job.sweep.dir) / str(number) / composed.train.checkpoint_dir,
            claim=composed.study.claim,
            deadline=told["deadline"],
            ends_with_parent=os.getpid() != told["sweeper"],
        )
        composed.resume, composed.train.auto_resume = job.runtime.output_dir, True
        outcome = trial.run(lambda: run(trial))
    if outcome.reason:
        text = f"{outcome.ending.value}: {outcome.reason}\n{outcome.traceback or ''}"
        logging.getLogger("gpt2").info("How this trial ended: %s", text.rstrip())
    if trial.is_orphaned():  # nobody takes what this would return, and its process would wait for more to do
        logging.shutdown()
        os._exit(1)
    if os.getpid() == told["sweeper"] and not isinstance(outcome.stops_study, UserError | None):
        raise outcome.stops_study
    # In a process of its own, one that was asked to end has only left its trial to another one.
    return outcome.stops_study if isinstance(outcome.stops_study, UserError) else outcome.value


Plugins.instance().register(StudySweeper)
