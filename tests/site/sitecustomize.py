"""Python runs this file when it starts with this folder on PYTHONPATH: it prepares the scripts that tests start."""

import runpy
from pathlib import Path

TESTS = Path(__file__).parents[1]
runpy.run_path(str(TESTS / "fault_injection.py"))["enable"]()
runpy.run_path(str(TESTS / "no_sync.py"))["skip_disk_sync"]()
