"""The rows of the table of results: the fault, how often it was injected, and what went wrong."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.stress.warm import Ended, Place


@dataclass
class Row:
    """One line of the table. What was counted must be zero."""

    fault: str
    injected: int
    counted: str
    found: list[str]  # what went wrong
    remark: str = ""


def complain(place: Place, ended: Ended, expected: set[int]) -> Iterator[str]:
    """What is wrong with the way a process ended."""
    if ended.code not in expected or "Traceback" in ended.output:
        message = ended.output[ended.output.find("Traceback") :] if "Traceback" in ended.output else ended.output[-500:]
        yield f"{place.folder}: exit code {ended.code}, {message}"
