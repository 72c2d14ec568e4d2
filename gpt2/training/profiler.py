"""Profile a few training steps: a trace file, and a table of the most expensive operations."""

import logging
import os
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from gpt2.training.callbacks import Callback

log = logging.getLogger(__name__)

SKIPPED, WARMUP, STEPS = 3, 2, 3  # steps before the profiler starts, in which it warms up, and that it records
TRACE = "trace.json"
ROWS = 15


class StepProfiler(Callback):
    """Records `STEPS` steps with torch.profiler and writes the trace into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.is_cuda = self.is_done = False
        self.profiler: profile | None = None

    def on_train_start(self, trainer: Any) -> None:
        self.is_cuda = trainer.device.type == "cuda"
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])],
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=STEPS, repeat=1),
            on_trace_ready=self._report,
            acc_events=True,
        )
        self.profiler.start()

    def on_step_end(self, trainer: Any) -> None:
        if self.profiler and not self.is_done:
            self.profiler.step()

    def on_train_end(self, trainer: Any) -> None:
        if self.profiler and not self.is_done:
            self.profiler.on_trace_ready = None
            self.profiler.stop()
            log.warning(f"profile: nothing was recorded, that takes at least {SKIPPED + WARMUP + STEPS} steps")

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.on_train_end(trainer)

    def _report(self, recorded: profile) -> None:
        """Write the trace and log the table."""
        self.is_done = True
        trace = self.folder / TRACE
        try:
            recorded.export_chrome_trace(str(trace))
        except (OSError, RuntimeError) as error:  # such as a full disk, which must not end the training here
            log.warning(f"profile: the trace cannot be written: {error}")
        where = "GPU" if self.is_cuda else "CPU"
        log.info(f"Profile of {STEPS} steps, {where} time by operation:\n{self._table(recorded)}")
        log.info(f"    written to {os.path.relpath(trace)}, for https://ui.perfetto.dev or chrome://tracing")

    def _table(self, recorded: profile) -> str:
        operations = [
            (operation, operation.self_device_time_total if self.is_cuda else operation.self_cpu_time_total)
            for operation in recorded.key_averages()
            if self._is_work(operation)
        ]
        total = sum(time for _, time in operations) or 1
        lines = [f"    {'operation':<60} {'ms a step':>10} {'share':>7} {'calls':>7}"]
        for operation, time in sorted(operations, key=lambda pair: pair[1], reverse=True)[:ROWS]:
            calls = operation.count / STEPS
            lines.append(f"    {operation.key[:60]:<60} {time / 1e3 / STEPS:>10.2f} {time / total:>7.1%} {calls:>7.0f}")
        return "\n".join(lines)

    def _is_work(self, operation: Any) -> bool:
        """Whether it is a single operation: no annotation, and on CUDA no call that only launches a kernel."""
        if operation.key.startswith("ProfilerStep") or operation.is_user_annotation:
            return False
        return not self.is_cuda or operation.device_type == DeviceType.CUDA
