"""A little of every fault. `python -m tests.stress` does all of it, and prints the same table."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_no_fault_loses_or_changes_a_run():
    done = subprocess.run([sys.executable, "-m", "tests.stress", "--small"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
