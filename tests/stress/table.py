"""The rows of the table of results: the fault, how often it was injected, and the failures."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.stress.warm import Ended, Place


@dataclass
class Row:
    """A row of the table. The count must be zero."""

    fault: str
    injected: int
    counted: str
    found: list[str]  # descriptions of the failures
    remark: str = ""


def complain(place: Place, ended: Ended, expected: set[int]) -> Iterator[str]:
    """The problems of the end of a process."""
    if ended.code not in expected or "Traceback" in ended.output:
        message = ended.output[ended.output.find("Traceback") :] if "Traceback" in ended.output else ended.output[-500:]
        yield f"{place.folder}: exit code {ended.code}, {message}"
