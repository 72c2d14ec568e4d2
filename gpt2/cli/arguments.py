"""Command lines that are not Hydra's: a word, places and options."""

import sys
from pathlib import Path

from gpt2.errors import UserError


def take_word(kind: str, usage: str, choices: dict[str, str]) -> str:
    """Take the next word of the command line, a choice of that kind; or else list them, and leave."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in choices:
        del sys.argv[1]
        return word
    asked = word in ("-h", "--help")
    if word and not asked:
        print(f"error: there is no {kind} {word}", file=sys.stderr)
    lines = (f"  {choice:<10} {purpose}" for choice, purpose in choices.items())
    print("\n".join([f"usage: {usage}", "", *lines]), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)


def take_arguments(
    usage: str, about: str, options: dict[str, str], flags: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Split the command line into places, and options by name; a flag, `--name`, is an option too.

    Raises:
        UserError: It has an option that there is not.
    """
    flags = flags or {}
    if {"-h", "--help"} & set(sys.argv[1:]):
        names = {**{f"{name}=...": text for name, text in options.items()}, **{f"--{n}": t for n, t in flags.items()}}
        lines = (f"  {name:<12} {text}" for name, text in names.items())
        print("\n".join([f"usage: python -m gpt2.main {usage}", "", f"{about}.", "", *lines]))
        sys.exit(0)
    places, chosen, found = [], {}, []
    for word in sys.argv[1:]:
        name, is_option, value = word.partition("=")
        if (name in options and is_option) or (word.startswith("--") and word[2:] in flags):
            chosen[name.removeprefix("--")] = value
        elif word.startswith("-") or (is_option and name.isidentifier() and not Path(word).exists()):
            known = ", ".join([*(f"{name}=..." for name in options), *(f"--{name}" for name in flags)])
            found.append(f"{word}: there is no such option; there are {known}")
        else:
            places.append(word)
    if found:
        raise UserError(*found)
    return places, chosen
