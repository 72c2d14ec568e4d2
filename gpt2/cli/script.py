"""`@script` makes a function of a configuration into a command line. `--help` is answered before Hydra is imported."""

import gc
import sys
from collections.abc import Callable
from typing import Any

from gpt2.cli.error_lines import errors_as_lines
from gpt2.cli.help import help_text
from gpt2.runtime.console import protect_output
from gpt2.runtime.dist_env import exit_without_finalization, silence_unless_main
from gpt2.runtime.signals import exit_on_signals


def script(name: str) -> Callable[[Callable[..., Any]], Callable[[], None]]:
    """Make a function of a checked configuration into the command line that `conf/<name>.yaml` describes.

    Expected errors are printed as lines.
    """

    def decorate(task: Callable[..., Any]) -> Callable[[], None]:
        def main() -> None:
            gc.disable()  # a tenth of the time to a run or an error; imports and compositions leave nothing to free
            exit_on_signals(also_by_ctrl_c=name != "generate")  # in generate.py, Ctrl-C ends a text and not the program
            protect_output()
            with exit_without_finalization(), errors_as_lines():
                silence_unless_main()
                if {"-h", "--help"} & {*sys.argv[1:]}:
                    print(help_text(name))
                    return
                from gpt2.cli.command import run_command_line

                run_command_line(name, task, sys.argv[1:])

        return main

    return decorate
