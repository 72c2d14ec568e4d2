"""How a command ends after an expected error: one line for each problem on standard error, and an exit code."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpt2.errors import LostRankError, UserError, machine_error
from gpt2.runtime.console import printable
from gpt2.runtime.dist_env import report_to_torchrun
from gpt2.runtime.signals import reraise_interruption

SECONDS_AFTER_FIRST_RANK = 1.0  # the rank that caused the error must end first: torchrun reports that one


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print expected errors as lines and exit with their code; exit quietly on Ctrl-C and a closed pipe."""
    try:
        with reraise_interruption():
            yield
    except UserError as error:
        print_problems(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        discard_stdout()
        sys.exit(0)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        problem = machine_error(error)
        if problem is None:
            report_to_torchrun(error)
            raise
        print_problems(UserError(problem))
        discard_stdout()
        sys.exit(1)


def print_problems(error: UserError) -> None:
    """Print one line for each problem; under torchrun with the rank, and into torchrun's report."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    lines = [f"{rank}{problem}" for problem in error.problems]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if type(error) is LostRankError:  # the cause is in another rank
        time.sleep(SECONDS_AFTER_FIRST_RANK)
        return
    try:  # raised here, because torchrun's report shows the traceback, and this one is short
        raise UserError(*map(printable, lines)) from None
    except UserError as short:
        report_to_torchrun(short)


def discard_stdout() -> None:
    """Discard what is buffered for standard output: Python would fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
