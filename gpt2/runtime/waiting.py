"""A line on a terminal that says what a script is waiting for, until it prints something. Imports nothing slow."""

import os
import sys
from multiprocessing import parent_process

_shown = ""


def waiting_for(what: str) -> None:
    """Show the line if all output goes to a terminal and this is the main process of rank 0."""
    global _shown
    is_first = parent_process() is None and os.environ.get("RANK", "0") == "0"
    if is_first and all(stream and stream.isatty() for stream in (sys.__stdout__, sys.__stderr__)):
        end_waiting()
        _shown = f"{what} ..."
        _write(_shown)


def end_waiting() -> None:
    """Remove the line."""
    global _shown
    if _shown:
        _write(f"\r{' ' * len(_shown)}\r")
        _shown = ""


def _write(text: str) -> None:
    sys.__stderr__.write(text)  # type: ignore[union-attr]
    sys.__stderr__.flush()  # type: ignore[union-attr]
