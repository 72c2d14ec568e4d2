"""The plan of a recorded study: which runs it asks for, and what is wrong with it before any of them begins."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2.analysis.runs import COLUMNS, SEED, RunResult, flat
from gpt2.cli.complete import resolve
from gpt2.cli.compose import ROOT, WITHOUT_PART, compose, composition_error, in_hydras_grammar
from gpt2.cli.preflight import validate_command_line, with_values
from gpt2.config import StudyPlan, TrainRun
from gpt2.errors import UserError

PLAN = "study.yaml"
RUNS = Path("outputs/studies")
# What of a run's configuration no plan decides; the size of the vocabulary is the tokenizer's.
NOT_OF_A_PLAN = WITHOUT_PART | {"started_with", "study.name", "study.trial", "study.claim", "model.vocab_size"}


@dataclass(frozen=True)
class Point:
    """One run of a study."""

    study: str
    variant: str
    values: dict[str, Any] = field(hash=False)  # of the sweep, and the seed

    @property
    def name(self) -> str:
        words = [f"{key.rpartition('.')[2]}={in_hydras_grammar(value)}" for key, value in self.values.items()]
        return " ".join([self.variant, *words])

    @property
    def folder(self) -> Path:
        return RUNS / self.study / re.sub(r"[^\w=.+-]+", ",", self.name)

    @property
    def overrides(self) -> list[str]:
        values = (f"{key}={in_hydras_grammar(value)}" for key, value in self.values.items())
        return [f"+{self.study}={self.variant}", *values]

    @property
    def arguments(self) -> list[str]:
        """Of `train.py`."""
        return [*self.overrides, "train.auto_resume=true", f"hydra.run.dir='{self.folder}'"]


def points_of(plan: StudyPlan, study: str) -> list[Point]:
    """All runs, seed by seed, so that an unfinished study has something of everything."""
    return [
        Point(study, variant, {**dict(zip(plan.sweep, values, strict=True)), SEED: seed})
        for seed in plan.seeds
        for variant in plan.variants
        for values in itertools.product(*plan.sweep.values())
    ]


def key_of_columns(plan: StudyPlan) -> str:
    """What the columns of the table stand for: `x`, or if that is a figure, what is swept."""
    return plan.x if plan.x not in COLUMNS else next(iter(plan.sweep), "variant")


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
        if not isinstance(loaded, dict):
            raise UserError(f"{path}: `key: value` lines are wanted, such as variants: [a, b]")
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyPlan), _with_numbers(loaded)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: {composition_error(error)}") from error
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


def validate_plan(plan: StudyPlan, folder: Path) -> list[str]:
    """All that is wrong with a plan, with the command line of any run, or with what lies in its folder."""
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
    points = points_of(plan, folder.resolve().name)
    if len({point.folder for point in points}) < len(points):
        found.append(f"{path}: the same run is asked for twice")
    if found:
        return found
    settings: dict[Point, dict[str, Any]] = {}
    for variant in plan.variants:
        found += _faults_of_runs(folder / f"{variant}.yaml", [p for p in points if p.variant == variant], settings)
    return found or _faults_of_picture(plan, path, settings)


def _faults_of_runs(variant: Path, points: list[Point], settings: dict[Point, dict[str, Any]]) -> list[str]:
    """What is wrong with the runs of one variant; the configurations of the others are added to `settings`."""
    try:
        composed = compose("train", points[0].overrides[:1])
    except Exception as error:  # noqa: BLE001  # Hydra's or OmegaConf's
        return [f"{variant}: {composition_error(error)}"]
    found: list[str] = []
    for point in points:
        changed = with_values(composed, point.overrides[1:])
        if changed is None:
            return [
                f"{variant.with_name(PLAN)}: sweep: {fault}"
                for fault in validate_command_line("train", point.overrides)
            ]
        try:
            config = resolve("train", changed, point.overrides)
        except UserError as error:
            found += [f"{point.name}: {fault}" for fault in error.problems]
            continue
        assert isinstance(config, TrainRun)
        settings[point] = flat(asdict(config))
        found += _faults_of_folder(point, settings[point])
    return found


def _faults_of_folder(point: Point, wanted: dict[str, Any]) -> Iterator[str]:
    """What of the run in a folder is not what the plan says by now."""
    saved = RunResult(point.folder).config
    for key in sorted(saved.keys() & wanted.keys() - NOT_OF_A_PLAN):
        if saved[key] != wanted[key]:
            yield (
                f"{point.folder}: was begun with {key}={saved[key]}, the study says {wanted[key]} by now; "
                f"move {RUNS / point.study} away"
            )


def _faults_of_picture(plan: StudyPlan, path: Path, settings: dict[Point, dict[str, Any]]) -> list[str]:
    """Whether a row and a column of the table say which runs they are of."""
    known = {"variant", *COLUMNS, *next(iter(settings.values()))}
    found = [
        f"{path}: {name}: there is no {key} to draw by; variant or a key such as train.learning_rate would do"
        for name, key in (("x", plan.x), ("lines", plan.lines))
        if key not in known or (name == "lines" and key in COLUMNS)
    ]
    if found:
        return found
    cells: dict[str, str] = {}
    for point, values in settings.items():
        where = repr([{**values, "variant": point.variant}[key] for key in (plan.lines, key_of_columns(plan))])
        what = repr([point.variant, [value for key, value in point.values.items() if key != SEED]])
        if cells.setdefault(where, what) != what:
            return [
                f"{path}: lines={plan.lines} and {key_of_columns(plan)} do not tell {what} from {cells[where]}; "
                f"sweep one key, or make variants of the others"
            ]
    return []
