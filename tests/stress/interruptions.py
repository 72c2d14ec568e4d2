"""Processes that are killed or interrupted at any moment, and restarted."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint import run_folder
from gpt2.errors import UserError
from gpt2.tracking.tracker import read_metrics
from tests.conftest import ROOT
from tests.stress.table import Row, complain
from tests.stress.warm import SMALL, Place, Result

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CALLS = ("write", "fsync", "rename", "link", "unlink")


def kills(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Send SIGKILL at random moments and repeat the command, until `count` is reached and runs have finished."""
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
                longest *= 0.9  # it was faster than the first run, which prepared the data, or the machine was busy
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


def kills_at_every_call(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Send SIGKILL with strace at every system call of a save that changes the disk, or at `count` of them."""
    fault = "SIGKILL at each write, flush and rename of a save"
    if shutil.which("strace") is None:
        return [Row(fault, 0, "runs lost", [], "skipped: there is no strace here")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def save(run: Path, *prefix: str) -> int:
        if not prefix:
            place = Place(folder / "untraced")
            return place.run("tests/stress/one_save.py", str(run)).code
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
            newest = run_folder.first_intact(run_folder.newest_first(run / "checkpoints"))
            is_there = newest is not None and checkpoint.read_record(newest)["progress"]["step"] in (step, step + 1)
        except UserError as error:
            is_there, newest = False, None
            lost.append(str(error))
        if not is_there:
            lost.append(f"killed at {kind} {number}: {newest}")
        if save(run):
            lost.append(f"killed at {kind} {number}: does not resume")
        steps = [record["step"] for record in read_metrics(run / "metrics.jsonl") if "val/loss" in record]
        if steps != sorted(set(steps)):
            lost.append(f"killed at {kind} {number}: evaluations of steps {steps}")
        leftovers += [str(path) for path in run.rglob(".*")]
        shutil.rmtree(run)
    message = f"{len(points)} such calls in a save"
    return [
        Row(fault, len(chosen), "runs lost", lost, message),
        Row("", len(chosen), "files left behind", leftovers, "after the next start"),
    ]


def signals(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Interrupt runs one to five times with different signals, in six configurations."""
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
            place.wait_for_handler(process)
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
