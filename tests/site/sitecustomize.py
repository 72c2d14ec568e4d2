"""Python runs this file when it starts with this folder on PYTHONPATH: it enables `tests/fault_injection.py`."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("fault_injection", Path(__file__).parents[1] / "fault_injection.py")
fault_injection = module_from_spec(spec)
spec.loader.exec_module(fault_injection)
fault_injection.enable()
