"""Run a script that gets Ctrl-C in a certain phase: interrupted.py MODULE:FUNCTION[#CALL] SCRIPT ARGUMENTS.

The signal is sent at the given call of the function, by default the first. MODULE is the module that calls it.
"""

import os
import runpy
import signal
import sys
from importlib import import_module
from pathlib import Path


def interrupt_at(place: str) -> None:
    function, _, call = place.partition("#")
    module_name, _, name = function.partition(":")
    module, calls = import_module(module_name), 0
    original = getattr(module, name)

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(call or 1):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    setattr(module, name, interrupted)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    interrupt_at(sys.argv[1])
    sys.argv = [str(root / sys.argv[2]), *sys.argv[3:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
