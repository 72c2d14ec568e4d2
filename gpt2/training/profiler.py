"""Profile a few training steps: a trace file, and a table of the most expensive operations."""

import logging
import os
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

from gpt2.training.callbacks import Callback

log = logging.getLogger(__name__)

SKIPPED, WARMUP, STEPS = 3, 2, 3  # steps before the profiler starts, in which it warms up, and that it records
TRACE = "trace.json"
ROWS = 15


class StepProfiler(Callback):
    """Records `STEPS` steps with torch.profiler and writes the trace into a folder."""

    def __init__(self, folder: Path):
        self.trace = folder / TRACE
        self.sort_by = "self_cpu_time_total"
        steps = schedule(wait=SKIPPED, warmup=WARMUP, active=STEPS, repeat=1)
        self.profiler = profile(schedule=steps, on_trace_ready=self._report, acc_events=True)
        self.is_done = False

    def on_train_start(self, trainer: Any) -> None:
        if trainer.device.type == "cuda":
            self.sort_by = "self_cuda_time_total"
        self.profiler.start()

    def on_step_end(self, trainer: Any) -> None:
        if not self.is_done:
            self.profiler.step()

    def on_train_end(self, trainer: Any) -> None:
        if not self.is_done:
            self.profiler.on_trace_ready = None
            self.profiler.stop()
            log.warning(f"profile: nothing was recorded, that takes at least {SKIPPED + WARMUP + STEPS} steps")

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.on_train_end(trainer)

    def _report(self, recorded: profile) -> None:
        """Write the trace and log the most expensive operations."""
        self.is_done = True
        recorded.export_chrome_trace(str(self.trace))
        table = recorded.key_averages().table(sort_by=self.sort_by, row_limit=ROWS)
        log.info(f"Profile of {STEPS} steps:\n{table}")
        log.info(f"    written to {os.path.relpath(self.trace)}, for https://ui.perfetto.dev or chrome://tracing")
