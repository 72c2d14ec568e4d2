"""What may go wrong with a run, done to it on purpose.

Each experiment returns rows of a table: what was done, how often, and what of it went wrong.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2 import checkpoint, run_folder
from gpt2.config import UserError
from gpt2.nonfinite import broken
from gpt2.pretrained import open_model
from gpt2.tracking import read_metrics
from tests.conftest import ROOT
from tests.stress.warm import SMALL, Ended, Place, Result

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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
        told = ended.output[ended.output.find("Traceback") :] if "Traceback" in ended.output else ended.output[-500:]
        yield f"{place.folder}: exit code {ended.code}, {told}"


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


def kills(count: int, folder: Path, random: random.Random) -> list[Row]:
    """SIGKILL at random moments, the same command again after each, until runs have finished and `count` is reached."""
    reference = Place(folder / "straight")
    ended = reference.run("train.py", *SMALL)
    lost, longest = list(complain(reference, ended, {0})), ended.seconds
    leftovers: list[str] = []
    killed = runs = 0
    while killed < count:
        runs += 1
        place = Place(folder / f"run {runs}")
        before = kills_of_this = 0
        while True:
            process = place.start("train.py", *SMALL)
            may_end = kills_of_this >= 12 or killed >= count
            if not may_end:
                time.sleep(random.uniform(0.05, longest))
                os.kill(process, signal.SIGKILL)
            ended = place.wait(process)
            if ended.code == 0 and not may_end:
                longest *= 0.9  # it was faster than the first, which prepared the data, or the machine was busy
            try:
                step = place.newest_step()
            except UserError as error:
                lost.append(str(error))
                break
            if step < before:
                lost.append(f"{place.folder}: step {step} after step {before}")
            before = step
            if ended.code != -signal.SIGKILL:
                lost += complain(place, ended, {0})
                lost += [
                    f"{place.folder}: {name} differs" for name in Result.of(place).differences(Result.of(reference))
                ]
                leftovers += map(str, place.leftovers())
                shutil.rmtree(place.folder)
                break
            killed += 1
            kills_of_this += 1
    return [
        Row("SIGKILL at a random moment", killed, "runs lost or different", lost, f"{runs} runs"),
        Row("", runs, "files left behind", leftovers, "after the next start"),
    ]


CALLS = ("write", "fsync", "rename", "link", "unlink")


def kills_at_every_call(count: int, folder: Path, random: random.Random) -> list[Row]:
    """SIGKILL at every system call of a save that changes the disk, or at `count` of them, by strace."""
    fault = "SIGKILL at each write, flush and rename of a save"
    if shutil.which("strace") is None:
        return [Row(fault, 0, "runs lost", [], "skipped: there is no strace here")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def save(run: Path, *prefix: str) -> int:
        command = [*prefix, sys.executable, "-m", "tests.stress.one_save", str(run)]
        return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode

    original = folder / "original"
    original.mkdir(parents=True)
    lost = [] if save(original) == 0 else ["the save without a fault failed"]
    step = 1
    traced, trace = folder / "traced", folder / "trace"
    shutil.copytree(original, traced)
    strace = ("strace", "-f", "-qq", "--seccomp-bpf")
    save(traced, *strace, "-y", "-o", str(trace), "-e", f"trace={','.join(CALLS)}")
    lines = [line.split(maxsplit=1) for line in trace.read_text(errors="replace").splitlines()]
    main_thread = next(thread for thread, call in lines if str(traced) in call)
    seen = dict.fromkeys(CALLS, 0)
    points: list[tuple[str, int]] = []
    for thread, call in lines:
        kind = call.split("(")[0]
        if thread == main_thread and kind in seen:
            seen[kind] += 1
            if str(traced) in call:
                points.append((kind, seen[kind]))
    chosen = sorted(random.sample(points, min(count, len(points))), key=points.index)
    leftovers: list[str] = []
    for kind, number in chosen:
        run = folder / f"{kind} {number}"
        shutil.copytree(original, run)
        save(run, *strace, "-o", "/dev/null", "-e", f"trace={kind}", "-e", f"inject={kind}:signal=KILL:when={number}")
        try:
            newest = run_folder.intact(run_folder.newest_first(run / "checkpoints"))
            is_there = newest is not None and checkpoint.read_record(newest)["progress"]["step"] in (step, step + 1)
        except UserError as error:
            is_there, newest = False, None
            lost.append(str(error))
        if not is_there:
            lost.append(f"killed at {kind} {number}: {newest}")
        if save(run):
            lost.append(f"killed at {kind} {number}: does not go on")
        steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if "val/loss" in record]
        if steps != sorted(set(steps)):
            lost.append(f"killed at {kind} {number}: evaluations of steps {steps}")
        leftovers += [str(path) for path in run.rglob(".*")]
        shutil.rmtree(run)
    told = f"{len(points)} such calls in a save"
    return [
        Row(fault, len(chosen), "runs lost", lost, told),
        Row("", len(chosen), "files left behind", leftovers, "after the next start"),
    ]


def signals(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Runs that are interrupted one to five times by a mix of signals, in six configurations."""
    kinds = [
        ["train.accumulation_steps=2"],
        ["train.accumulation_steps=1", "train.eval_every=5"],
        ["train.accumulation_steps=3", "train.num_workers=2"],
        ["train.accumulation_steps=1", "train.num_workers=2", "train.log_every=3"],
        ["train.accumulation_steps=2", "train.precision=bf16", "train.save_every=1"],
        ["train.batch_size=1", "train.accumulation_steps=4", "train.eval_every=1", "train.log_every=7"],
    ][: max(1, min(6, count))]
    references = []
    different: list[str] = []
    late: list[str] = []
    for number, options in enumerate(kinds):
        place = Place(folder / f"straight {number}")
        began = time.monotonic()
        different += complain(place, place.run("train.py", *SMALL, *options), {0})
        references.append((Result.of(place), time.monotonic() - began))
    slowest, sent = 0.0, 0
    for number in range(count):
        options, (reference, usual) = kinds[number % len(kinds)], references[number % len(kinds)]
        place = Place(folder / f"interrupted {number}")
        for _ in range(random.randint(1, 5)):
            process = place.start("train.py", *SMALL, *options)
            kind = random.choice((*SIGNALS, signal.SIGKILL))
            place.wait_until_it_hears(process)
            time.sleep(random.uniform(0, usual))
            os.kill(process, kind)
            ended = place.wait(process)
            sent += 1
            if kind != signal.SIGKILL:
                slowest = max(slowest, ended.seconds)
                different += complain(place, ended, {0, 128 + kind})
                if ended.seconds > 10:
                    late.append(f"{place.folder}: {ended.seconds:.1f} s after {kind.name}")
        different += complain(place, place.run("train.py", *SMALL, *options), {0})
        different += [f"{place.folder}: {name} differs" for name in Result.of(place).differences(reference)]
        shutil.rmtree(place.folder)
    return [
        Row(
            "run interrupted 1 to 5 times", count, "differing bits", different, f"{sent} signals: INT, TERM, USR1, KILL"
        ),
        Row("", sent, "not ended within 10 s", late, f"slowest {slowest:.1f} s"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def damages(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Checkpoints with a flipped bit, cut, exchanged or gone, each to be seen and the one before it to be taken."""
    place = Place(folder / "damaged")
    options = ["train.keep_checkpoints=3", "train.max_steps=12", "train.eval_every=4"]
    accepted = list(complain(place, place.run("train.py", *SMALL, *options), {0}))
    folder = place.checkpoints()
    numbered = [path for path in run_folder.newest_first(folder) if run_folder.step_of(path)]
    newest, before, oldest = numbered
    for name in (run_folder.LAST, run_folder.BEST):
        (folder / name).unlink()
    content = newest.read_bytes()
    _, stored = checkpoint._read_header(newest)
    sizes: dict[int, list[checkpoint.Stored]] = {}
    for tensor in stored.values():
        sizes.setdefault(tensor.end - tensor.begin, []).append(tensor)
    alike = [
        (a, b)
        for group in sizes.values()
        for a in group
        for b in group
        if content[a.begin : a.end] != content[b.begin : b.end]
    ]

    def flip() -> None:
        position = random.randrange(len(content))
        changed = bytes([content[position] ^ 1 << random.randrange(8)])
        newest.write_bytes(content[:position] + changed + content[position + 1 :])

    def cut() -> None:
        newest.write_bytes(content[: random.choice([0, 1, random.randrange(len(content)), len(content) - 1])])

    def exchange_tensors() -> None:
        a, b = random.choice(alike)
        changed = bytearray(content)
        changed[a.begin : a.end], changed[b.begin : b.end] = content[b.begin : b.end], content[a.begin : a.end]
        newest.write_bytes(changed)

    def exchange_files() -> None:
        shutil.copy(random.choice([before, oldest]), newest)

    def zeros() -> None:
        start = random.randrange(len(content) - 64)
        if any(content[start : start + 64]):
            newest.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
        else:
            flip()

    def longer() -> None:
        newest.write_bytes(content + bytes(random.randint(1, 100)))

    kinds: list[Callable[[], None]] = [flip, cut, exchange_tensors, exchange_files, zeros, longer, newest.unlink]
    not_back: list[str] = []
    for number in range(count):
        damage = kinds[number % len(kinds)]
        damage()
        try:
            taken = run_folder.intact(run_folder.newest_first(folder))
        except UserError as error:
            taken = None
            not_back.append(str(error))
        if taken == newest:
            accepted.append(f"{number}: {getattr(damage, '__name__', damage)}")
        elif taken != before:
            not_back.append(f"{number}: {taken}")
        if newest.exists():
            try:
                checkpoint.read_tensors(newest)
                if damage is not exchange_files:
                    accepted.append(f"{number}: {getattr(damage, '__name__', damage)}, as it is named")
            except UserError:
                pass
        newest.write_bytes(content)
    newest.write_bytes(content[:-1])
    resumed = place.run("train.py", *SMALL, *options)
    not_back += complain(place, resumed, {0})
    if f"{newest.name} is damaged" not in resumed.output or "Going on after step 8" not in resumed.output:
        not_back.append(f"train.py does not tell: {resumed.output}")
    return [
        Row("checkpoint flipped, cut, exchanged, zeroed, longer, gone", count, "accepted", accepted),
        Row("", count, "not fallen back from", not_back),
    ]


def full_disks(count: int, folder: Path, random: random.Random) -> list[Row]:
    """No room for more than so many bytes a file: while preparing, logging, saving."""
    reference = Place(folder / "straight")
    lost = list(complain(reference, reference.run("train.py", *SMALL), {0}))
    expected, last = Result.of(reference), reference.checkpoints() / run_folder.LAST
    begun = Place(folder / "begun")
    lost += complain(begun, begun.run("train.py", *SMALL, "train.max_steps=9", "train.auto_resume=false"), {0})
    size, told, messages = last.stat().st_size, 0, set()
    for number in range(count):
        limit = int(100 * (0.95 * size / 100) ** (number / max(1, count - 1)))
        place = Place(folder / f"limit {limit}")
        has_begun = number % 2 == 1
        if has_begun:  # the disk is full in the midst of a run, else from its beginning
            shutil.copytree(begun.folder, place.folder, dirs_exist_ok=True)
        command = ["resume=latest", "train.max_steps=40"] if has_begun else SMALL
        before = place.newest_step()

        def fill(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        ended = place.run("train.py", *command, before=fill)
        if ended.code == -signal.SIGXFSZ or ended.code == 0 or "Traceback" in ended.output:
            lost.append(f"limit {limit}: exit code {ended.code}, {ended.output[-500:]}")
        found = re.findall(r"error: (File too large.*)", ended.output) or [ended.output]
        told += "File too large" in ended.output or len(ended.output) >= limit
        messages |= {found[0][:60]}
        if place.newest_step() < before:
            lost.append(f"limit {limit}: step {place.newest_step()} after {before}")
        lost += complain(place, place.run("train.py", *command), {0})
        if not has_begun:
            lost += [f"limit {limit}: {name} differs" for name in Result.of(place).differences(expected)]
        lost += [f"limit {limit}: {path} is left" for path in place.leftovers()]
        shutil.rmtree(place.folder)
    if told < count:
        lost.append(f"only {told} of {count} were told: {messages}")
    return [Row("disk full (ulimit -f)", count, "runs lost", lost, "each goes on once there is room")]


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files


class Hostile:
    """What a pickle does when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch '{self.canary}'",))


def hostile_files(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Files that would run code, or take all memory or for ever, given as a checkpoint."""
    import io
    import pickle
    import zipfile

    folder.mkdir(parents=True)
    canary = folder / "canary"
    good = folder / "good.pth"
    from tests.helpers import noisy_model, tiny_config

    model = noisy_model(tiny_config(vocab_size=257))
    about = {"model": vars(model.config), "run": None, "tokenizer": None, "progress": {"step": 1}}
    checkpoint.write(good, {f"model/{k}": v for k, v in model.state_dict().items()}, about)

    def with_header(path: Path, header: bytes, data: bytes = b"") -> None:
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)

    def torch_pickle(path: Path) -> None:
        torch.save({"model": Hostile(canary)}, path)

    def plain_pickle(path: Path) -> None:
        path.write_bytes(pickle.dumps(Hostile(canary)))

    def zip_bomb(path: Path) -> None:
        plain = io.BytesIO()
        torch.save(torch.zeros(2**26), plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))

    def endless_header(path: Path) -> None:
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")

    def sparse_header(path: Path) -> None:
        path.write_bytes((2**29).to_bytes(8, "little"))
        os.truncate(path, 2**30)

    def many_values(path: Path) -> None:
        with_header(path, b'{"__metadata__":[' + b"[]," * 3_000_000 + b"[]]}")

    def deep(path: Path) -> None:
        with_header(path, b"[" * 1_000_000)

    def overlapping(path: Path) -> None:
        size = 2**20
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        record = json.dumps({"format": checkpoint.FORMAT, **about})
        names = [f"model/{n}" for n in range(1000)]
        sums = json.dumps(dict.fromkeys(names, checkpoint.NO_SUM))
        metadata = {checkpoint.RECORD: record, checkpoint.TENSOR_SUMS: sums, checkpoint.HEADER_SUM: checkpoint.NO_SUM}
        header = json.dumps({"__metadata__": metadata, **dict.fromkeys(names, entry)}, separators=(",", ":")).encode()
        import hashlib

        signed = header.replace(
            checkpoint._assigned(checkpoint.NO_SUM), checkpoint._assigned(hashlib.sha256(header).hexdigest())
        )
        with_header(path, signed, bytes(size))

    def pipe(path: Path) -> None:
        os.mkfifo(path)

    def elsewhere(path: Path) -> None:
        path.symlink_to("/etc/passwd")

    def instantiated(path: Path) -> None:
        target = {"_target_": "os.system", "_args_": [f"touch '{canary}'"]}
        checkpoint.write(path, checkpoint.read_tensors(good), {**about, "model": target, "run": {"model": target}})

    kinds: list[Callable[[Path], None]] = [
        *(torch_pickle, plain_pickle, zip_bomb, endless_header, sparse_header, many_values),
        *(deep, overlapping, pipe, elsewhere, instantiated),
    ]
    executed: list[str] = []
    greedy: list[str] = []
    slowest = 0.0
    for kind in kinds[:count]:
        place = Place(folder / kind.__name__)
        path = place.folder / "some.pth"
        kind(path)
        size = path.stat().st_blocks * 512 if path.is_file() else 0

        def load(path: Path = path, place: Place = place) -> None:
            """In a process of its own, which tells the memory that it took at most."""
            Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
            before = _memory("VmRSS")
            try:
                open_model(path).build()
                code = "accepted"
            except UserError as error:
                code = str(error)
            (place.folder / "told").write_text(json.dumps([code, _memory("VmHWM") - before]))

        began = time.monotonic()
        ended = place.run("generate.py", "prompt=x", f"checkpoint='{path}'", before=load)
        slowest = max(slowest, time.monotonic() - began)
        told, memory = json.loads((place.folder / "told").read_text())
        if canary.exists() or told == "accepted":
            executed.append(f"{kind.__name__}: {told}")
            canary.unlink(missing_ok=True)
        executed += complain(place, ended, {2})
        if memory > 2 * size + 2**22:
            greedy.append(f"{kind.__name__}: {memory:,} bytes of memory for {size:,} on the disk")
    return [
        Row(
            "hostile file as a checkpoint",
            len(kinds[:count]),
            "executed or accepted",
            executed,
            f"{slowest:.1f} s at most",
        ),
        Row("", len(kinds[:count]), "in more than twice its size of memory", greedy, "and 4 MiB"),
    ]


def _memory(key: str) -> int:
    """Bytes of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def not_finite(count: int, folder: Path, random: random.Random) -> list[Row]:
    """NaN and infinity in a loss, a gradient, a weight: nothing of it is saved, and the run goes on from what is."""
    skip, limit = "train.on_nonfinite=skip", "train.nonfinite_limit=3"
    cases: list[tuple[str, list[str], int]] = [
        ("nan_loss@9", [], 3),
        ("inf_loss@12", [], 3),
        ("nan_gradient@1", [], 3),
        ("inf_gradient@23", [], 3),
        ("nan_weight@17", [], 3),
        ("nan_loss@9", [skip], 0),
        ("inf_loss@12,nan_loss@13", [skip], 0),
        ("nan_gradient@4-6", [skip, limit], 0),
        ("inf_gradient@40", [skip], 0),
        ("nan_gradient@4-7", [skip, limit], 3),
        ("nan_weight@17", [skip, limit], 3),
        ("inf_gradient@9", ["train.precision=fp16"], 0),
    ]
    poisoned: list[str] = []
    for number, (fault, options, code) in enumerate(cases[:count]):
        place = Place(folder / f"{number}", {"GPT2_FAULT": fault})
        ended = place.run("train.py", *SMALL, *options)
        poisoned += complain(place, ended, {code})
        if re.search(r"step \d+ \(batch", ended.output) is None:
            poisoned.append(f"{fault}: no word of it: {ended.output[-300:]}")
        for run in place.runs():
            for path in run.glob("checkpoints/*.pth"):
                poisoned += [f"{fault}: {path.name} {name}" for name in broken(checkpoint.read_tensors(path))]
            losses = [record["train/loss"] for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
            poisoned += [f"{fault}: logged {loss}" for loss in losses if loss is not None and not 0.1 < loss < math.inf]
        place.environment = {"GPT2_FAULT": ""}
        poisoned += complain(place, place.run("train.py", *SMALL, *options), {0})
        shutil.rmtree(place.folder)
    return [
        Row("NaN or infinity in loss, gradient, weights", len(cases[:count]), "poisoned checkpoints or logs", poisoned)
    ]


EXPERIMENTS: dict[str, tuple[Callable[[int, Path, random.Random], list[Row]], int, int]] = {
    # how often in all, and in the tests of every change
    "kills": (kills, 200, 12),
    "calls": (kills_at_every_call, 1000, 5),
    "signals": (signals, 30, 4),
    "damages": (damages, 500, 105),
    "disks": (full_disks, 10, 3),
    "hostile": (hostile_files, 11, 11),
    "numbers": (not_finite, 12, 6),
}
