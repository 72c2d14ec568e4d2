"""The command line: composition by Hydra, validation before a run, resuming, sweeps, messages.

Only this package imports hydra.
"""

import sys
from types import TracebackType


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """No traceback for Ctrl-C during the imports that follow, before `exit_on_signals`."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report
