"""Studies through Hydra's multirun: `hydra/sweeper: study`.

The sweeper takes trials from the study and gives them to Hydra's launcher. A job, in this process or another one, finds
its trial by its number and reports the outcome itself: a job that is killed affects only its own trial, and the
trials that ended before the sweeper was killed are complete.

The notation of the space is that of Hydra's Optuna plugin. Its loop is not used, because it cannot prune, resume, or
end after a time.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from gpt2.checkpoint.run_folder import checkpoint_folder_of
from gpt2.cli.compose import (
    CONF,
    ROOT,
    WITHOUT_EFFECT,
    as_argument,
    compose,
    escaped,
    in_hydras_grammar,
    keyed_error,
    leaves,
    overrides_of,
    parsed,
    preset,
    to_yaml,
)
from gpt2.cli.launchers import log_submissions
from gpt2.config import OptunaConfig, StudyConfig
from gpt2.errors import UserError, one_line
from gpt2.runtime.console import ConsoleHandler, LogFile
from gpt2.runtime.files import atomic_write, exclusive_change
from gpt2.runtime.signals import Interrupted
from gpt2.validation import COUNT, Problems, out_of_bounds, validate

if TYPE_CHECKING:  # a run without a study does not wait for Optuna's import
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

    from gpt2.search.algorithms import Algorithms
    from gpt2.search.study import Study
    from gpt2.search.trial import RunningTrial

log = logging.getLogger("study")

KEY = "hydra.sweeper."
ENVIRONMENT = "GPT2_STUDY"  # carries to the jobs what no file may contain: the storage, whose URL may have a password
MOST_RUNS = 1_000  # of a sweep, each of which is checked first
WITHOUT_EFFECT_IN_STUDY = ("name", "study", "inference", "started_with")  # keys or groups


# ---------------------------------------------------------------------------------------------------------------------
# The settings in `hydra.sweeper`


def study_sweeper(overrides: list[str]) -> DictConfig | None:
    """`hydra.sweeper` of a command line that runs a study, its interpolations resolved; None without a study.

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
        raise UserError(keyed_error(error)) from error
    return sweeper


def validate_sweeper(fixed: list[str]) -> Problems:
    """Whether a command line chooses a sweeper that contradicts `hparams_search`, which chooses one."""
    values = {override.key_or_group: override.value() for override in parsed(fixed)}
    chosen, search = values.get("hydra/sweeper"), values.get("hparams_search")
    if "hydra/sweeper" not in values or chosen == "study" or (chosen == "basic" and search is None):
        return []
    remedy = f"hparams_search={search} has its own" if search else "a study is hparams_search=NAME"
    return [f"hydra/sweeper={in_hydras_grammar(chosen)}: {remedy}; leave it out"]


def settings_of(sweeper: DictConfig) -> OptunaConfig:
    values = {field.name: sweeper[field.name] for field in fields(OptunaConfig)}
    names = {key: str(sweeper[key].get("name")) for key in ("sampler", "pruner")}
    return OptunaConfig(**values | names)


def _options(algorithm: DictConfig) -> dict[str, Any]:
    return {str(key): algorithm[key] for key in algorithm if key not in ("name", "seed")}


def algorithms_of(sweeper: DictConfig, seed: int | None = None) -> "Algorithms":
    """The sampler and the pruner. The seed is an interpolation that a job cannot resolve and does not need."""
    from gpt2.search.algorithms import Algorithms

    return Algorithms(settings_of(sweeper), seed, _options(sweeper.sampler), _options(sweeper.pruner))


def validate_study(sweeper: DictConfig, launcher: str) -> Problems:
    """The problems of a study's settings, its space, sampler and pruner excepted.

    Args:
        launcher: The class of Hydra's launcher.
    """
    from gpt2.search.storage import validate_storage

    settings = settings_of(sweeper)
    problems = validate(settings, KEY)
    problems += out_of_bounds(sweeper, {"n_jobs": COUNT}, KEY)
    if sweeper.n_jobs > 1 and "BasicLauncher" in launcher:
        problems.append(f"{KEY}n_jobs: {sweeper.n_jobs} trials at a time need hydra/launcher=joblib")
    name = sweeper.study_name
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    if not re.fullmatch(r"[A-Za-z]\w*(-\w+)*", name) or name in groups:  # it becomes a group, +NAME=best
        problems.append(
            f"{KEY}study_name: {name!r} must be letters, digits, '_' and '-', a letter first, and none of "
            f"{', '.join(groups)}"
        )
    if problem := validate_storage(sweeper.storage):
        problems.append(f"{KEY}storage: {problem}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The space, in Hydra's notation


def swept_values(swept: list[Override]) -> list[list[str]]:
    """Of each sweep without a study, one override for every value.

    Raises:
        UserError: A sweep has no values, or too many.
    """
    choices, problems = list[list[str]](), list[str]()
    for override in swept:
        line, value, key = override.input_line, override.value(), override.get_key_element()
        values: list[str] = []
        if isinstance(value, IntervalSweep):
            problems.append(
                f"{line}: an interval needs hparams_search=NAME; a sweep has values, as train.beta2=0.9,0.99"
            )
        elif problem := problem_of_range(override):
            problems.append(problem)
        elif isinstance(value, Glob):
            values = value.filter(files_of_group(override.key_or_group))
            if not values:
                problems.append(f"{line}: no file of that group has such a name")
        else:
            every = override.sweep_iterator(transformer=_as_text)
            values = list(map(str, islice(every, MOST_RUNS + 1)))
        choices.append([f"{key}={text}" for text in values])
    if prod(map(len, choices)) > MOST_RUNS:
        problems.append(f"-m: more than {MOST_RUNS:,} runs; a search tries some of them, hparams_search=NAME")
    if problems:
        raise UserError(*problems)
    return choices


def files_of_group(group: str) -> list[str]:
    """The files in a group, where a composition looks for them."""
    places = (CONF, ROOT / "experiments", Path("outputs/sweeps"))
    return sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})


def with_choices_listed(override: Override) -> str:
    """A sweep whose choices are a list, `key='a b',c`: where `choice('a b',c)` is parsed, the quotes are lost."""
    if not isinstance(override.value(), ChoiceSweep):
        return str(override.input_line)
    return f"{override.get_key_element()}={','.join(map(str, override.sweep_iterator(transformer=_as_text)))}"


def _as_text(value: Any) -> str:
    """A value as it may stand in an argument; `${` in it begins an interpolation."""
    if not isinstance(value, str) or re.fullmatch(r"[\w./:-]+", value):
        return Transformer.str(value)
    return QuotedString(value, Quote.single).with_quotes()


def search_space(sweeper: DictConfig, swept: list[Override], fixed: list[str]) -> list[list[str]]:
    """The sweeps of `hydra.sweeper.params` and of the command line, without the keys that the command line fixes.

    Returns:
        Of each, one override for every choice, or for both ends of a range.

    Raises:
        UserError: The space is empty or invalid, or not one for the sampler, or the sampler or pruner is invalid.
    """
    from gpt2.search.trial import quiet_optuna

    try:
        params = parsed([f"{key}={value}" for key, value in sweeper.params.items() if value is not None])
    except HydraException as error:
        raise UserError(f"{KEY}params: {grammar_error(error)}") from error
    given = {override.key_or_group for override in [*parsed(fixed), *swept]}
    space = [override for override in params if override.key_or_group not in given] + swept
    problems = [problem for override in space if (problem := _problem_of_sweep(override))]
    if not space:
        problems.append(f"{KEY}params: nothing is left to search, the command line fixes every parameter")
    drawn = {} if problems else distributions([str(override.input_line) for override in space])[0]
    with quiet_optuna():
        problems += algorithms_of(sweeper, sweeper.sampler.get("seed")).problems(KEY, drawn)
    if problems:
        raise UserError(*problems)
    return [[f"{key}={value}" for value in _extremes(distribution)] for key, distribution in drawn.items()]


def _extremes(distribution: "BaseDistribution") -> Sequence[Any]:
    choices: Sequence[Any] | None = getattr(distribution, "choices", None)
    return choices if choices is not None else (distribution.low, distribution.high)  # type: ignore[attr-defined]


def _problem_of_sweep(override: Override) -> str | None:
    line, value = override.input_line, override.value()
    if not override.is_sweep_override():
        return f"{KEY}params: {line} is not a sweep, it has one value"
    if tags := set(getattr(value, "tags", ())) - {"log"}:
        return f"{line}: there is no tag {', '.join(sorted(map(str, tags)))}, only log"
    if isinstance(value, Glob):
        return f"{line}: a study needs the names, such as model=gpt2,gpt2_medium"
    if problem := problem_of_range(override):
        return problem
    try:
        space = distributions([str(line)])[0]
    except ValueError as error:
        return f"{line}: {one_line(error)}"
    choices = [choice for distribution in space.values() for choice in _extremes(distribution)]
    if len(set(choices)) == 1 or not space:
        return f"{line}: has one value; {override.key_or_group}=VALUE fixes it, a search needs two"
    if twice := {str(choice) for choice in choices if choices.count(choice) > 1}:
        return f"{line}: {', '.join(sorted(twice))} is there more than once"
    return None


def grammar_error(error: HydraException) -> str:
    """What is wrong with an argument that Hydra cannot parse."""
    if not isinstance(error.__cause__, TypeError | ValueError):
        return "not of the form key=value (a value with special characters needs quotes: key='a,b')"
    reason = one_line(error.__cause__)  # of a function such as choice()
    return "Hydra's functions take no null; key=null,1e-5 does" if "NoneType is incompatible" in reason else reason


def problem_of_range(override: Override) -> str | None:
    """Why `range(...)` has no value; None for any other sweep."""
    value = override.value()
    if not isinstance(value, RangeSweep):
        return None
    if value.step == 0:
        return f"{override.input_line}: the step is 0, a range needs another"
    if next(iter(value.range()), None) is None:
        return f"{override.input_line}: no number is from {value.start} to below {value.stop} in steps of {value.step}"
    return None


def distributions(overrides: list[str]) -> "tuple[dict[str, BaseDistribution], dict[str, Any]]":
    """The sweeps of a command line as Optuna's distributions, and its fixed values."""
    # Private: checked with hydra-optuna-sweeper 1.4.0rc3, see test_private_api_of_the_optuna_plugin.
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    space, fixed, _ = create_params_from_overrides([with_choices_listed(override) for override in parsed(overrides)])
    return {key: distribution for key, distribution in space.items() if key not in fixed}, fixed


def shared_settings(fixed: list[str], searched: set[str]) -> dict[str, Any]:
    """The configuration that all trials have in common. Interpolations are not resolved: some depend on the space."""
    composed = leaves(compose("train", fixed), resolve=False)
    return {
        key: value
        for key, value in composed.items()
        if key not in WITHOUT_EFFECT and {key, key.split(".")[0]}.isdisjoint({*searched, *WITHOUT_EFFECT_IN_STUDY})
    }


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


class StudySweeper(Sweeper):
    """Hydra's sweeper for `-m` with `hydra/sweeper: study`."""

    def __init__(self, **_config: Any):
        """`setup` reads the settings from the whole configuration."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        overrides = parsed([*overrides_of(config.hydra, "hydra"), *overrides_of(config.hydra)])
        sweeper = study_sweeper([str(o.input_line) for o in overrides if not o.is_sweep_override()])
        assert sweeper is not None
        self.sweeper, self.folder = sweeper, Path(config.hydra.sweep.dir)
        hide_storage(config)
        hide_storage(HydraConfig.instance().cfg)  # type: ignore[arg-type]  # jobs in other processes get this one
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        log_submissions(False)  # a trial has a line of its own

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
            os.environ[ENVIRONMENT] = json.dumps(context)
            with study_log(self.folder):
                try:
                    self._run(study)
                except Interrupted:
                    log.info(
                        f"{len(study.done())} of {study.config.n_trials} trials are done. Resume with the same command."
                    )
                    raise
                finally:
                    del os.environ[ENVIRONMENT]

    def _open(self, arguments: list[str]) -> "Study":
        from gpt2.search.algorithms import grid
        from gpt2.search.storage import file_of
        from gpt2.search.study import Study

        params = [f"{key}={value}" for key, value in self.sweeper.params.items() if value is not None]
        space, fixed = distributions([*params, *arguments])
        self.fixed = [f"{key}={value}" for key, value in fixed.items()]
        settings = settings_of(self.sweeper)
        if settings.sampler == "grid":
            settings.n_trials = min(settings.n_trials, prod(map(len, grid(space).values())))

        lost = f"{self.folder} has runs of a study that is not in the storage; move the folder away"
        folders = [path for path in self.folder.glob("*") if path.name.isdigit()]
        if folders and (file := file_of(settings.storage)) and not file.exists():  # nor shall it be made
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
        """Run trials to their ends. Returns the problem that kept any of them from reporting its own end."""
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
        except Exception as error:  # noqa: BLE001  # the launcher's, of which a process was killed
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
        space = f"\n{' ' * 8}".join(f"{key} {describe(values)}" for key, values in study.space.items())
        log.info(
            f"Study   {settings.study_name}: {settings.n_trials} trials{f', {done} of them done' if done else ''}\n"
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
        from gpt2.tracking.wandb_logger import offline_runs

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
        if offline := offline_runs(path for path in self.folder.iterdir() if path.name.isdigit()):
            log.info(f"\nW&B: {offline}")

    def _write_best(self, best: "FrozenTrial") -> str:
        """Write `best.yaml`, the best trial as a preset. Returns the command that trains it."""
        name = self.sweeper.study_name
        overrides = [*self.fixed, *(f"{key}={value}" for key, value in best.params.items())]
        choices, values = preset(overrides, without={"hparams_search", "wandb"})
        searched = {key: value for key, value in leaves(compose("train", overrides)).items() if key in best.params}
        file: dict[str, Any] = {"defaults": [{f"override /{group}": choice} for group, choice in choices.items()]}
        for key, value in {**searched, **values, "name": name}.items():
            group, _, field = key.rpartition(".")
            if group != "wandb":
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
    context = json.loads(os.environ[ENVIRONMENT])
    is_sweeper = os.getpid() == context["sweeper"]
    settings = settings_of(job.sweeper)
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
    # An interrupted worker process only leaves its trial to another one.
    return stop if isinstance(stop, UserError) else outcome.value


Plugins.instance().register(StudySweeper)
