"""The command line: composition by Hydra, validation before a run, resuming, sweeps, messages.

Only this package imports hydra.
"""

import sys
from pathlib import Path
from types import TracebackType

from gpt2.runtime.waiting import end_waiting, waiting_for

SCRIPTS = ("train.py", "evaluate.py", "generate.py", "main.py")


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print no traceback after Ctrl-C during the imports that follow, before `exit_on_signals` is called."""
    end_waiting()
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report
if Path(sys.argv[0]).name in SCRIPTS:  # the imports take a second, or several from a cold disk
    waiting_for("starting")
