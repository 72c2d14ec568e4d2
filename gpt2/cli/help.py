"""Generates `--help` of a script: the comment at the top of `conf/<script>.yaml`, the groups, and a line for each key.

The line of a key holds its default, its choices and its comment in `gpt2.config`. Nothing is composed.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gpt2.config
from gpt2.config import SCHEMAS
from gpt2.runtime.repository import CONF

WIDTH, INDENT = 120, 44  # characters in a line, and before a comment
SET_BY_US = "set by"  # begins the comment of a field that no command line may set


def help_text(name: str) -> str:
    """The groups and keys of the command line that `conf/<name>.yaml` describes."""
    header, _, defaults = (CONF / f"{name}.yaml").read_text(encoding="utf-8").partition("defaults:")
    groups = [folder for folder in sorted(CONF.iterdir()) if f"- {folder.name}:" in defaults]
    choices = [files_of(group) for group in groups]
    sections = [
        [line.removeprefix("#").removeprefix(" ") for line in header.strip().splitlines()],
        ["Groups (GROUP=FILE of conf/GROUP):", *choices],
        *sections_of(SCHEMAS[name]),
        ["--cfg job prints every key as composed, --hydra-help Hydra's own flags."],
    ]
    return "\n\n".join("\n".join(section) for section in sections if len(section) > 1 or section is sections[-1])


def files_of(group: Path) -> str:
    """A group and its files, in one or several lines."""
    key = f"  {group.name}="
    lines = textwrap.wrap(" ".join(sorted(file.stem for file in group.glob("*.yaml"))), WIDTH - len(key) - 1)
    return key + f"|\n{' ' * len(key)}".join(line.replace(" ", "|") for line in lines)


STUDY = """Search hyperparameters: the same as `python train.py -m hparams_search=optuna`.

usage: python -m gpt2.main optimize [OVERRIDES]

Examples:
  python -m gpt2.main optimize experiment=quickstart hydra.sweeper.n_trials=20
  python -m gpt2.main optimize train.beta2=0.99             a value removes its key from the space
  python -m gpt2.main optimize hydra/launcher=joblib hydra.sweeper.n_jobs=2     two trials at a time

The same command resumes the study. Every group and key of train.py may be an override: python train.py --help.

hydra/sweeper/sampler=tpe|gp|cmaes|random|grid|qmc    hydra/sweeper/pruner=median|asha|hyperband|none

Keys (KEY=VALUE) and defaults, from conf/hparams_search/optuna.yaml (n_trials is hydra.sweeper.n_trials):

"""


def study_help() -> str:
    """The help of `optimize`: an introduction, and `conf/hparams_search/optuna.yaml` with its comments."""
    text = (CONF / "hparams_search" / "optuna.yaml").read_text(encoding="utf-8")
    return STUDY + text[text.index("hydra:") :].strip()


def sections_of(schema: type, prefix: str = "", title: str = "Keys (KEY=VALUE):") -> list[list[str]]:
    """The lines of a dataclass: its values under a title, then a section for each dataclass in it."""
    lines, inner, hints = [title], [], get_type_hints(schema)
    for field in fields(schema):
        hint, comment = hints[field.name], comments(schema)[field.name]
        if comment.startswith(SET_BY_US):
            continue
        if is_dataclass(hint):
            about = inspect.cleandoc(hint.__doc__ or "").splitlines()[0]
            inner += sections_of(hint, f"{prefix}{field.name}.", f"{field.name}: {about}")  # type: ignore[arg-type]
        else:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            lines += lines_of(f"  {prefix}{field.name}={as_typed(default)}", choices_of(hint), comment)
    return [lines, *inner]


def lines_of(key: str, choices: str, comment: str) -> list[str]:
    texts = textwrap.wrap("; ".join(filter(None, [choices, comment])), WIDTH - INDENT) or [""]
    if len(key) >= INDENT - 1:
        return [key, *(" " * INDENT + text for text in texts)]
    return [f"{key:<{INDENT}}{texts[0]}".rstrip(), *(" " * INDENT + text for text in texts[1:])]


def as_typed(default: Any) -> str:
    """A default as a command line would set it. (`hydra_syntax` needs Hydra, which --help does not import.)"""
    if isinstance(default, list):
        return f"[{','.join(map(as_typed, default))}]"
    if isinstance(default, str):
        return default if re.fullmatch(r"[\w./:-]+", default) else f'"{default}"'
    return "null" if default is None else str(default).lower()


def choices_of(hint: Any) -> str:
    """The values of `Literal[...]`, or the type of an optional field; empty for types that the default shows."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    options = [option for option in get_args(hint) if option is not NoneType]
    if NoneType in get_args(hint):
        return " or ".join(choices_of(option) or option.__name__ for option in options)
    return ""


@cache
def comments(schema: type) -> dict[str, str]:
    """The comment of each field of a dataclass of `gpt2.config`, from its line or else from the lines above."""
    source = inspect.getsource(gpt2.config)
    lines, result = source.splitlines(), {}
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for field in classes[schema.__name__].body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            behind = [line for line in lines[field.lineno - 1 : field.end_lineno] if "  # " in line]
            above = takewhile(lambda line: line.strip().startswith("#"), reversed(lines[: field.lineno - 1]))
            earlier = " ".join(line.strip(" #") for line in reversed(list(above)))
            result[field.target.id] = behind[0].rpartition("  # ")[2] if behind else earlier
    return result
