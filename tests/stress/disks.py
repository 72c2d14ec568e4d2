"""Full disks and damaged files."""

import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.errors import UserError
from tests.stress.table import Row, complain
from tests.stress.warm import SMALL, Place, Result


class Damage:
    """The ways to damage a checkpoint, each starting from its intact content."""

    def __init__(self, path: Path, others: list[Path], random: random.Random):
        self.path, self.others, self.random = path, others, random
        self.good = path.read_bytes()
        stored = checkpoint._read_header(path)[1].values()
        self.alike = [
            (a, b)
            for a, b in permutations(stored, 2)
            if a.end - a.begin == b.end - b.begin and self.good[a.begin : a.end] != self.good[b.begin : b.end]
        ]
        self.kinds: list[Callable[[], None]] = [
            *(self.flip, self.cut, self.exchange_tensors, self.exchange_files, self.zeros, self.longer, self.delete)
        ]

    def mend(self) -> None:
        self.path.write_bytes(self.good)

    def flip(self) -> None:
        position = self.random.randrange(len(self.good))
        changed = bytes([self.good[position] ^ 1 << self.random.randrange(8)])
        self.path.write_bytes(self.good[:position] + changed + self.good[position + 1 :])

    def cut(self) -> None:
        length = len(self.good)
        self.path.write_bytes(self.good[: self.random.choice([0, 1, self.random.randrange(length), length - 1])])

    def exchange_tensors(self) -> None:
        a, b = self.random.choice(self.alike)
        changed = bytearray(self.good)
        changed[a.begin : a.end], changed[b.begin : b.end] = self.good[b.begin : b.end], self.good[a.begin : a.end]
        self.path.write_bytes(changed)

    def exchange_files(self) -> None:
        shutil.copy(self.random.choice(self.others), self.path)

    def zeros(self) -> None:
        start = self.random.randrange(len(self.good) - 64)
        if any(self.good[start : start + 64]):
            self.path.write_bytes(self.good[:start] + bytes(64) + self.good[start + 64 :])
        else:
            self.flip()

    def longer(self) -> None:
        self.path.write_bytes(self.good + bytes(self.random.randint(1, 100)))

    def delete(self) -> None:
        self.path.unlink()


def damages(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Damage checkpoints: flipped bit, cut, exchanged, gone. Each must be detected, and the previous one used."""
    place = Place(folder / "damaged")
    options = ["train.keep_checkpoints=3", "train.max_steps=12", "train.eval_every=4"]
    accepted = list(complain(place, place.run("train.py", *SMALL, *options), {0}))
    checkpoints = place.checkpoints()
    for name in (run_folder.LAST, run_folder.BEST):
        (checkpoints / name).unlink()
    newest, before, oldest = run_folder.newest_first(checkpoints)
    damage = Damage(newest, [before, oldest], random)
    not_back: list[str] = []
    for number in range(count):
        kind = damage.kinds[number % len(damage.kinds)]
        kind()
        message = f"{number}: {kind.__name__}"
        try:
            taken = run_folder.first_intact(run_folder.newest_first(checkpoints))
        except UserError as error:
            taken = None
            not_back.append(str(error))
        if taken == newest:
            accepted.append(message)
        elif taken != before:
            not_back.append(f"{message}: {taken}")
        if newest.exists() and kind != damage.exchange_files and is_read(newest):
            accepted.append(f"{message}, under its own name")
        damage.mend()
    newest.write_bytes(damage.good[:-1])
    resumed = place.run("train.py", *SMALL, *options)
    not_back += complain(place, resumed, {0})
    if f"{newest.name} is damaged" not in resumed.output or "Resuming after step 8" not in resumed.output:
        not_back.append(f"train.py does not report it: {resumed.output}")
    return [
        Row("checkpoint flipped, cut, exchanged, zeroed, longer, gone", count, "accepted", accepted),
        Row("", count, "not fallen back from", not_back),
    ]


def is_read(path: Path) -> bool:
    try:
        checkpoint.read_tensors(path)
    except UserError:
        return False
    return True


def full_disks(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Limit the size of files, during preparation, logging and saving."""
    reference = Place(folder / "straight")
    lost = list(complain(reference, reference.run("train.py", *SMALL), {0}))
    expected, last = Result.of(reference), reference.checkpoints() / run_folder.LAST
    begun = Place(folder / "begun")
    lost += complain(begun, begun.run("train.py", *SMALL, "train.max_steps=9", "train.auto_resume=false"), {0})
    size, message, messages = last.stat().st_size, 0, set()
    for number in range(count):
        limit = int(100 * (0.95 * size / 100) ** (number / max(1, count - 1)))
        place = Place(folder / f"limit {limit}")
        has_begun = number % 2 == 1
        if has_begun:  # the disk is full during a run, else from its start
            shutil.copytree(begun.folder, place.folder, dirs_exist_ok=True)
        command = ["resume=latest", "train.max_steps=40"] if has_begun else SMALL
        before = place.newest_step()

        def fill(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        ended = place.run("train.py", *command, before=fill)
        if ended.code == -signal.SIGXFSZ or ended.code == 0 or "Traceback" in ended.output:
            lost.append(f"limit {limit}: exit code {ended.code}, {ended.output[-500:]}")
        found = re.findall(r"error: (File too large.*)", ended.output) or [ended.output]
        message += "File too large" in ended.output or len(ended.output) >= limit
        messages |= {found[0][:60]}
        if place.newest_step() < before:
            lost.append(f"limit {limit}: step {place.newest_step()} after {before}")
        lost += complain(place, place.run("train.py", *command), {0})
        if not has_begun:
            lost += [f"limit {limit}: {name} differs" for name in Result.of(place).differences(expected)]
        lost += [f"limit {limit}: {path} is left" for path in place.leftovers()]
        shutil.rmtree(place.folder)
    if message < count:
        lost.append(f"only {message} of {count} were reported: {messages}")
    return [Row("disk full (ulimit -f)", count, "runs lost", lost, "each resumes once there is space")]
