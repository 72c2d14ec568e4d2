"""Command lines of commands without a configuration: a subcommand, places (files or folders), options, flags."""

import sys
from pathlib import Path

from gpt2.errors import UserError


def take_word(kind: str, usage: str, choices: dict[str, str]) -> str:
    """Take a subcommand off the command line. If it is none of the choices, list them and exit."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in choices:
        del sys.argv[1]
        return word
    wants_help = word in ("-h", "--help")
    if word and not wants_help:
        print(f"error: there is no {kind} {word}", file=sys.stderr)
    lines = (f"  {choice:<10} {purpose}" for choice, purpose in choices.items())
    print("\n".join([f"usage: {usage}", "", *lines]), file=sys.stdout if wants_help else sys.stderr)
    sys.exit(0 if wants_help else 2)


def take_arguments(
    usage: str, about: str, options: dict[str, str], flags: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Split the command line into places, and options by name: `name=value`, or `--name` for a flag.

    Raises:
        UserError: There are unknown options.
    """
    flags = flags or {}
    if {"-h", "--help"} & set(sys.argv[1:]):
        names = {**{f"{name}=...": text for name, text in options.items()}, **{f"--{n}": t for n, t in flags.items()}}
        lines = (f"  {name:<12} {text}" for name, text in names.items())
        print("\n".join([f"usage: python -m gpt2.main {usage}", "", f"{about}.", "", *lines]))
        sys.exit(0)
    places, chosen, problems = [], {}, []
    for word in sys.argv[1:]:
        name, is_option, value = word.partition("=")
        if (name in options and is_option) or (word.startswith("--") and word[2:] in flags):
            chosen[name.removeprefix("--")] = value
        elif word.startswith("-") or (is_option and name.isidentifier() and not Path(word).exists()):
            known = ", ".join([*(f"{name}=..." for name in options), *(f"--{name}" for name in flags)])
            problems.append(f"{word}: there is no such option; there are {known}")
        else:
            places.append(word)
    if problems:
        raise UserError(*problems)
    return places, chosen
