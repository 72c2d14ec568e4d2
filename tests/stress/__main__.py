"""Inject many kinds of faults into runs: `python -m tests.stress`. Prints a table, and fails if a fault did damage.

`--small` injects a few of each kind, as the tests do; names of experiments select them.
"""

import argparse
import logging
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.stress.disks import damages, full_disks
from tests.stress.hostile import hostile_files
from tests.stress.interruptions import kills, kills_at_every_call, signals
from tests.stress.numbers import not_finite
from tests.stress.studies import deaths, shared_studies, sweeper_kills
from tests.stress.table import Row

EXPERIMENTS: dict[str, tuple[Callable[[int, Path, random.Random], list[Row]], int, int]] = {
    # number of faults, and with --small
    "kills": (kills, 200, 2),
    "calls": (kills_at_every_call, 1000, 0),
    "signals": (signals, 30, 1),
    "damages": (damages, 500, 35),
    "disks": (full_disks, 10, 2),
    "hostile": (hostile_files, 11, 11),
    "numbers": (not_finite, 12, 2),
    "studies": (sweeper_kills, 50, 0),  # tests/test_optimize.py kills one
    "shared": (shared_studies, 50, 0),  # tests/search/test_storage.py has four workers of one study
    "deaths": (deaths, 8, 0),  # tests/cli/test_sweeper.py has the most severe ones
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []], help=", ".join(EXPERIMENTS))
    parser.add_argument("--small", action="store_true", help="a few faults of each kind")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="seed of the run to repeat")
    options = parser.parse_args()
    logging.disable()  # they would warn about every fault
    print(f"{platform.machine()}, Python {platform.python_version()}, seed {options.seed}\n")
    print(f"{'fault':<58}{'injected':>8}  {'':<38}{'found':>5}  remark")
    wrong = 0
    for name in options.experiments or EXPERIMENTS:
        experiment, count, few = EXPERIMENTS[name]
        if options.small and not few:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = experiment(few if options.small else count, Path(folder) / name, random.Random(options.seed))
        rows[0].remark = f"{rows[0].remark}  {time.monotonic() - began:.0f} s".strip()
        for row in rows:
            show(row)
            wrong += len(row.found)
    sys.exit(min(wrong, 1))


def show(row: Row) -> None:
    print(f"{row.fault:<58}{row.injected:>8}  {row.counted:<38}{len(row.found):>5}  {row.remark}", flush=True)
    for found in row.found:
        print(f"    {found}", flush=True)


if __name__ == "__main__":
    main()
