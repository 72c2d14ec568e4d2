"""`python -m gpt2.main doctor [device=cuda] [json=FILE]`."""

import sys

from gpt2.cli.script import script
from gpt2.config import DoctorRun


@script("doctor")
def doctor(config: DoctorRun) -> None:
    from gpt2.doctor.run import examine  # here: it imports torch

    sys.exit(examine(config))


if __name__ == "__main__":
    doctor()
