"""The table of results: one row for each kind of fault."""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.stress.warm import Ended, Place


@dataclass
class Row:
    """One line of the table. `found` must be empty."""

    fault: str
    injected: int
    counted: str
    found: list[str]  # what went wrong
    remark: str = ""


def complain(place: Place, ended: Ended, expected: set[int]) -> Iterator[str]:
    """Yield a complaint if a process ended with an unexpected exit code or a traceback."""
    if ended.code not in expected or "Traceback" in ended.output:
        message = ended.output[ended.output.find("Traceback") :] if "Traceback" in ended.output else ended.output[-500:]
        yield f"{place.folder}: exit code {ended.code}, {message}"
