"""Command lines of commands without a configuration: a subcommand, paths, and options."""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from gpt2.errors import UserError, without_password

# The commands of `python -m gpt2.main`.
COMMANDS = {
    "train": "train a model: train.py",
    "evaluate": "score trained models on a corpus or on tasks: evaluate.py",
    "generate": "generate text with a trained model: generate.py",
    "optimize": "search hyperparameters: train.py -m hparams_search=optuna",
    "benchmark": "measure speed: benchmark generation|training|data",
    "doctor": "examine this machine: what it has, whether it computes right, how fast: device=cuda json=FILE",
    "compare": "compare runs in a table and a plot: compare RUN ...",
    "study": "run the missing runs of a recorded study and write its results: experiments/STUDY [jobs=N] [--plan]",
    "export": "write a trained model as a Hugging Face folder: checkpoint=RUN_OR_FILE to=FOLDER push=OWNER/NAME",
}


def take_subcommand(kind: str, usage: str, choices: dict[str, str]) -> str:
    """Remove a subcommand from the command line and return it. If it is none of the choices, list them and exit."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in choices:
        del sys.argv[1]
        return word
    wants_help = word in ("-h", "--help")
    if word and not wants_help:
        print(f"error: there is no {kind} {without_password(word)}", file=sys.stderr)
    lines = (f"  {choice:<10} {purpose}" for choice, purpose in choices.items())
    print("\n".join([f"usage: {usage}", "", *lines]), file=sys.stdout if wants_help else sys.stderr)
    sys.exit(0 if wants_help else 2)


def split_arguments(command: Callable[[], None]) -> tuple[list[str], dict[str, str]]:
    """Split the command line into paths, and options by name.

    Args:
        command: A function whose docstring is the text of `--help`. The indented lines that begin with `name=` or
            `--name` describe the options.

    Raises:
        UserError: There are unknown options.
    """
    usage = inspect.getdoc(command) or ""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
        sys.exit(0)
    known = re.findall(r"^ +(\w+=|--\w+)", usage, flags=re.MULTILINE)
    paths, options, problems = [], {}, []
    for word in sys.argv[1:]:
        name, sign, value = word.partition("=")
        if name + sign in known:
            options[name.removeprefix("--")] = value
        elif word.startswith("-") or (sign and name.isidentifier() and not Path(word).exists()):
            problems.append(f"{word}: there is no such option; there are {', '.join(known)}")
        else:
            paths.append(word)
    if problems:
        raise UserError(*problems)
    return paths, options
