"""A few faults of each kind. `python -m tests.stress` injects all, and prints the same table."""

import pytest

from tests import warm
from tests.conftest import ROOT, Workspace


@pytest.mark.slow
def test_no_fault_loses_or_changes_a_run(workspace: Workspace):
    done = warm.run(["-m", "tests.stress", "--small"], ROOT, workspace.environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
