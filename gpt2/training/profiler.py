"""Where the time of a training step goes: a trace of a few steps, and a table of the costliest operations."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger(__name__)

SKIPPED, WARMUP, STEPS = 3, 2, 3  # steps: before the profiler starts, in which it sets itself up, and that it records
TRACE = "trace.json"
ROWS = 15


class StepProfiler:
    """Watches steps of a training: call it after each."""

    def __init__(self, folder: Path, device: torch.device):
        """The trace goes into the folder."""
        self.folder, self.is_cuda = folder, device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])]
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=STEPS, repeat=1),
            on_trace_ready=self._tell,
            acc_events=True,
        )
        self.is_done = False
        self.profiler.start()

    def __call__(self) -> None:
        if not self.is_done:
            self.profiler.step()

    def close(self) -> None:
        """End it, if the run has not been long enough for it to end by itself."""
        if not self.is_done:
            self.profiler.on_trace_ready = None
            self.profiler.stop()
            needed = SKIPPED + WARMUP + STEPS
            log.warning("profile: nothing was recorded, for that the run must train for %s steps at least", needed)

    def _is_work(self, operation: Any) -> bool:
        """Whether it is an operation of its own: neither a name for several nor, on CUDA, what only starts a kernel."""
        if operation.key.startswith("ProfilerStep") or operation.is_user_annotation:
            return False
        return not self.is_cuda or operation.device_type == DeviceType.CUDA

    def _tell(self, recorded: profile) -> None:
        """Write the trace, and print the table."""
        self.is_done = True
        try:
            recorded.export_chrome_trace(str(self.folder / TRACE))
        except (OSError, RuntimeError) as error:  # such as a full disk: no reason to end a training
            log.warning("profile: the trace cannot be written: %s", error)
        operations = [
            (o, o.self_device_time_total if self.is_cuda else o.self_cpu_time_total) for o in recorded.key_averages()
        ]
        operations = [(o, time) for o, time in operations if self._is_work(o)]
        total = sum(time for _, time in operations) or 1
        costliest = sorted(operations, key=lambda pair: pair[1], reverse=True)[:ROWS]
        lines = [f"    {'operation':<60} {'ms a step':>10} {'share':>7} {'calls':>7}"]
        for operation, time in costliest:
            calls = operation.count / STEPS
            lines.append(f"    {operation.key[:60]:<60} {time / 1e3 / STEPS:>10.2f} {time / total:>7.1%} {calls:>7.0f}")
        where = "GPU" if self.is_cuda else "CPU"
        log.info("Profile of %s steps, time of the %s itself:\n%s", STEPS, where, "\n".join(lines))
        log.info(
            "    written to %s, for https://ui.perfetto.dev or chrome://tracing", os.path.relpath(self.folder / TRACE)
        )
