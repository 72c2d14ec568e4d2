"""Run all checks, print a row when each ends, and write the JSON file."""

import tempfile
import time
from pathlib import Path

import torch

from gpt2.benchmarks.common import circumstances, write_json
from gpt2.config import DoctorRun
from gpt2.doctor import correctness, environment, speed
from gpt2.doctor.report import WRONG, Checks, Machine, Row, as_lines, run_checks, summary
from gpt2.errors import UserError
from gpt2.runtime.device import choose_device, keep_freed_memory

CHECKS: Checks = {
    "What is here:": environment.CHECKS,
    "Does it compute right:": correctness.CHECKS,
    "How fast is it:": speed.CHECKS,
}


def examine(config: DoctorRun, checks: Checks = CHECKS) -> int:
    """Print the rows and write the file `config.json`. Return the exit code: 1 if anything is WRONG, else 0.

    After an interruption, the file contains the rows so far.

    Raises:
        UserError: There is no such device.
    """
    try:
        device = choose_device(config.device)
    except UserError as error:
        why = f"; {environment.why_no_cuda()}" if "cuda" in config.device and not torch.cuda.is_available() else ""
        raise UserError(f"{error}{why}") from error
    keep_freed_memory()  # as train.py does
    rows: list[Row] = []
    began, is_complete = time.perf_counter(), False
    try:
        with tempfile.TemporaryDirectory() as folder:
            for row in run_checks(Machine(device, Path(folder)), checks):
                if not rows or row.part != rows[-1].part:
                    print(f"\n{row.part}" if rows else row.part)
                print(as_lines(row), flush=True)
                rows.append(row)
        is_complete = True
    finally:
        seconds = time.perf_counter() - began
        ending = "" if is_complete else "interrupted after "
        print(f"\n{ending}{summary(rows)}, in {seconds:.0f} s", flush=True)
        if command := next((row.figures["command"] for row in rows if "command" in row.figures), None):
            print(f"\nTo train here:  {command}", flush=True)
        record = {"rows": [vars(row) for row in rows], "seconds": seconds, "complete": is_complete}
        write_json(config.json, {"command": "doctor", **circumstances(device), **record})
    return 1 if any(row.status == WRONG for row in rows) else 0
