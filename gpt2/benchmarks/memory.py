"""The peak of memory of one contestant in training, in a process of its own: `python -m gpt2.benchmarks.memory`.

Several contestants in one process cannot be told apart. On CUDA the peak is what PyTorch had allocated; on a CPU the
resident memory of the process during its steps, interpreter and libraries included.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from gpt2.cli.compose import ROOT, merged
from gpt2.config import TrainingBenchmark

STEPS = 3


class NotMeasured(Exception):
    """A contestant did not come to its end alone, say for want of memory."""


def measure(config: TrainingBenchmark, contestant: str) -> dict[str, Any]:
    """`peak_memory_bytes` of a contestant, and the `alone_step_seconds` that it took without the others.

    Raises:
        NotMeasured: It failed there.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "gpt2.benchmarks.memory"],
        input=json.dumps({"config": asdict(config), "contestant": contestant}),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NotMeasured(f"it failed alone, exit code {done.returncode}: {last}")
    return json.loads(done.stdout)


def reset_peak() -> None:
    """Forget the peak of resident memory so far, where Linux can be told to."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """Of this process. `ru_maxrss` alone would not do: Linux lets a new process inherit the peak of its parent."""
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE):
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_alone(config: TrainingBenchmark, name: str, folder: Path) -> dict[str, Any]:
    import torch

    from gpt2.benchmarks.contestants import Workload, contestants
    from gpt2.runtime.device import free_memory, keep_freed_memory

    workload = Workload(config, folder, STEPS)
    contestant = next(found for found in contestants(workload) if found.name == name)
    if contestant.is_ours:
        keep_freed_memory()  # as train.py does; the others have it in one process with ours only
    contestant.prepare()
    workload.state = {}  # only what a training holds is to be counted
    free_memory()
    reset_peak()
    seconds = [contestant.turn(workload, number, 1) for number in range(STEPS)]
    on_cuda = workload.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(workload.device) if on_cuda else peak_resident_bytes()
    return {"peak_memory_bytes": peak, "alone_step_seconds": median(seconds[1:])}


def main() -> None:
    from omegaconf import OmegaConf

    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    config: Any = OmegaConf.to_object(merged(TrainingBenchmark, asked["config"]))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        found = run_alone(config, asked["contestant"], Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
