"""Patterns in settings: names of files with wildcards, and regular expressions."""

import os
import re
from collections.abc import Iterator
from glob import escape, iglob
from math import prod
from os.path import isfile
from pathlib import Path

import regex

from gpt2.errors import one_line

MAX_REPETITIONS = 10_000  # in a regular expression


def as_pattern(name: str) -> str:
    """Escape the parts of a pattern that are names of existing folders or files: `draft[1]` in `draft[1]/*.txt`."""
    path, parts = Path(), []
    for part in Path(name).parts:
        path /= part
        parts.append(escape(part) if part.strip("*") and os.path.lexists(path) else part)
    return str(Path(*parts))


def files_matching(pattern: str) -> Iterator[str]:
    """Yield the files and folders that match a pattern; `**` matches any number of folders. See also `as_pattern`."""
    return iglob(as_pattern(pattern), recursive=True) if pattern else iter(())


def no_file(pattern: str) -> str | None:
    """Say why a pattern matches no file; None if it matches one."""
    if any(map(isfile, files_matching(pattern))):  # stops at the first: a folder may hold a hundred thousand files
        return None
    paths = list(files_matching(pattern))
    if not paths:
        hint = "; write $HOME instead of ~" if pattern.startswith("~") else ""
        return f"no file matches {pattern!r} (looked from {Path.cwd()}){hint}"
    if Path(paths[0]).is_dir():
        like = "*.bin" if any(Path(paths[0]).glob("*.bin")) else "**/*.txt"
        return f"{paths[0]!r} is a folder; name its files, such as {str(Path(paths[0], like))!r}"
    return f"{paths[0]!r} is a pipe, a socket, a device or a broken link; name a file"


def no_expression(pattern: str) -> str | None:
    """Say why a text is not a regular expression for both `re` and the library `regex`; None if it is one.

    `re` rejects the additions of `regex`, such as recursion, which can exhaust the memory.
    """
    times = (max(1, int(number)) for number in re.findall(r"\{\s*(\d{1,9})", pattern))
    if prod(times) > MAX_REPETITIONS:  # `regex` compiles one copy for each repetition
        return f"repetitions such as {{9}} may multiply to {MAX_REPETITIONS:,} at most"
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        return one_line(error)
    return None
