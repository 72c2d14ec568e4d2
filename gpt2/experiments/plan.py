"""The plan of a recorded study: its runs, and their validation before any of them starts."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.analysis.runs import COLUMNS, SEED, RunResult
from gpt2.cli.complete import LOADING_KEYS, resolve
from gpt2.cli.compose import KEYS_WITHOUT_EFFECT, compose, composition_error, hydra_syntax
from gpt2.cli.preflight import validate_command_line, with_values
from gpt2.config import StudyPlan, TrainRun
from gpt2.errors import UserError, one_line
from gpt2.runtime.plain_values import flat, from_plain
from gpt2.runtime.repository import ROOT
from gpt2.tracking.tracker import DIVERGED, FINISHED

PLAN = "study.yaml"
RUNS = Path("outputs/studies")
ENDED = (FINISHED, DIVERGED)  # states of runs that are not run again
# Settings in which an existing run may differ from its plan: they do not change training, or follow from the tokenizer.
HYPERPARAMETER_STUDY = ("study.name", "study.trial", "study.claim")
NOT_PLANNED = {*KEYS_WITHOUT_EFFECT, *LOADING_KEYS, *HYPERPARAMETER_STUDY, "started_with", "model.vocab_size"}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a recorded study."""

    study: str
    variant: str
    values: dict[str, Any] = field(hash=False)  # swept values and the seed, by key

    @property
    def name(self) -> str:
        words = [f"{key.rpartition('.')[2]}={hydra_syntax(value)}" for key, value in self.values.items()]
        return " ".join([self.variant, *words])

    @property
    def folder(self) -> Path:
        return RUNS / self.study / re.sub(r"[^\w=.+-]+", ",", self.name)

    @property
    def is_done(self) -> bool:
        result = RunResult(self.folder)
        return result.problem is None and result.state in ENDED

    @property
    def overrides(self) -> list[str]:
        values = (f"{key}={hydra_syntax(value)}" for key, value in self.values.items())
        return [f"+{self.study}={self.variant}", *values]

    @property
    def arguments(self) -> list[str]:
        """The arguments of `train.py`."""
        return [*self.overrides, "train.auto_resume=true", f"hydra.run.dir='{self.folder}'"]


def planned_runs(plan: StudyPlan, study: str) -> list[PlannedRun]:
    """Return all runs, ordered by seed: an unfinished study soon has results for every setting."""
    return [
        PlannedRun(study, variant, {**dict(zip(plan.sweep, values, strict=True)), SEED: seed})
        for seed in plan.seeds
        for variant in plan.variants
        for values in itertools.product(*plan.sweep.values())
    ]


def column_key(plan: StudyPlan) -> str:
    """Return the key of the columns of the table: `x`, or the first swept key if `x` is a result."""
    return plan.x if plan.x not in COLUMNS else next(iter(plan.sweep), "variant")


def read_plan(folder: Path) -> StudyPlan:
    """Read the plan of a study.

    Raises:
        UserError: The folder has no plan, or it is not a `StudyPlan`, or it plans no run or the same run twice.
    """
    path, problems = folder / PLAN, list[str]()
    if not path.is_file():
        problem = f"has no {PLAN}" if folder.is_dir() else "does not exist"
        raise UserError(f"study: {folder} {problem}; experiments/learning_rate is an example")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig) or not loaded:
        raise UserError(f"{path}: expected `key: value` lines, such as variants: [a, b]")
    plan = from_plain(StudyPlan, OmegaConf.to_container(loaded), f"{path}: ")
    assert isinstance(plan, StudyPlan)
    if plan.metric not in COLUMNS:
        problems.append(f"{path}: metric: {plan.metric!r} is none of {', '.join(COLUMNS)}")
    if not plan.variants or not plan.seeds or not all(plan.sweep.values()):
        problems.append(f"{path}: variants, seeds and each key of sweep need at least one value")
    runs = planned_runs(plan, folder.resolve().name)
    if len({run.folder for run in runs}) < len(runs):
        problems.append(f"{path}: a run is planned twice")
    if problems:
        raise UserError(*problems)
    return plan


def validated_runs(plan: StudyPlan, folder: Path) -> dict[PlannedRun, TrainRun]:
    """Return all runs of a plan with their configurations.

    Raises:
        UserError: The plan, the command line of a run, or a run that exists already has problems.
    """
    path = folder / PLAN
    problems = [
        f"{path}: variants: there is no {name}.yaml beside it"
        for name in plan.variants
        if not (folder / f"{name}.yaml").is_file()
    ]
    if (parent := folder.resolve().parent) not in (ROOT / "experiments", Path("outputs/sweeps").resolve()):
        problems.append(f"study: {folder} is in {parent}; presets are found in experiments/ and outputs/sweeps/")
    if problems:
        raise UserError(*dict.fromkeys(problems))
    runs = planned_runs(plan, folder.resolve().name)
    configs: dict[PlannedRun, TrainRun] = {}
    for variant in plan.variants:
        own = [run for run in runs if run.variant == variant]
        problems += _validate_runs(folder / f"{variant}.yaml", own, configs)
    if problems := problems or [f"{path}: {problem}" for problem in _validate_axes(plan, configs)]:
        raise UserError(*dict.fromkeys(problems))
    return {run: configs[run] for run in runs}


def _validate_runs(variant: Path, runs: list[PlannedRun], configs: dict[PlannedRun, TrainRun]) -> list[str]:
    """Return the problems of the runs of one variant, and add the configurations of valid runs to `configs`."""
    try:
        composed = compose("train", runs[0].overrides[:1])
    except Exception as error:  # noqa: BLE001  # Hydra's or OmegaConf's
        return [f"{variant}: {composition_error(error)}"]
    changes: dict[str, list[PlannedRun]] = {}
    first: dict[str, str] = {}  # key: a problem; value: the first run with this problem
    for run in runs:
        changed = with_values(composed, run.overrides[1:])
        if changed is None:
            path = variant.with_name(PLAN)
            return [f"{path}: sweep: {problem}" for problem in validate_command_line("train", run.overrides)]
        try:
            config = resolve("train", changed, run.overrides)
        except UserError as error:
            first = {**dict.fromkeys(error.problems, run.name), **first}
        else:
            assert isinstance(config, TrainRun)
            configs[run] = config
            for change in _changed_settings(run, config):
                changes.setdefault(change, []).append(run)
    restarted = (
        f"{runs[0].folder}{f' and {len(runs) - 1} more' if len(runs) > 1 else ''}: started with {change}; "
        f"move {RUNS / runs[0].study} away"
        for change, runs in changes.items()
    )
    return [*(f"{name}: {problem}" for problem, name in first.items()), *restarted]


def _changed_settings(run: PlannedRun, config: TrainRun) -> Iterator[str]:
    """Yield the settings of an existing run that differ from a plan that has changed since."""
    result = RunResult(run.folder)
    saved = {} if result.problem else result.requested  # a damaged run counts as missing
    planned = flat(asdict(config)) if saved else {}
    for key in sorted(saved.keys() & planned.keys() - NOT_PLANNED):
        if saved[key] != planned[key]:
            yield f"{key}={saved[key]}, the study now has {planned[key]}"


def _validate_axes(plan: StudyPlan, configs: dict[PlannedRun, TrainRun]) -> list[str]:
    """Return the problems of `x`, `lines` and `panels`: unknown keys, or keys that do not distinguish all settings."""
    settings = {run: flat(asdict(config)) for run, config in configs.items()}
    known, problems = {"variant", *next(iter(settings.values()))}, []
    for name, key in (("x", plan.x), ("lines", plan.lines), ("panels", plan.panels)):
        if key == SEED:
            problems.append(f"{name}: results are means over the seeds, so {SEED} is no key to draw by")
        elif key and key not in known and not (name == "x" and key in COLUMNS):
            problems.append(f"{name}: there is no {key} to draw by; use variant or a key such as train.learning_rate")
    if not problems:
        axes = tuple(filter(None, (plan.panels, plan.lines, column_key(plan))))
        cells = {repr([{**values, "variant": run.variant}[key] for key in axes]) for run, values in settings.items()}
        if len(cells) * len(plan.seeds) < len(settings):
            problems.append(f"{' and '.join(axes)} do not distinguish all runs; sweep one key, or use lines: variant")
    return problems
