"""Profile a few training steps: a trace file, and a table of the most expensive operations."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

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
        """Write the trace and log the most expensive operations."""
        self.is_done = True
        trace = self.folder / TRACE
        with suppress(OSError, RuntimeError):  # it must not end the training; in most cases nothing is raised
            recorded.export_chrome_trace(str(trace))
        device = "cuda" if self.is_cuda else "cpu"
        table = recorded.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        log.info(f"Profile of {STEPS} steps:\n{table}")
        if trace.is_file():
            log.info(f"    written to {os.path.relpath(trace)}, for https://ui.perfetto.dev or chrome://tracing")
        else:
            log.warning(f"profile: {os.path.relpath(trace)} cannot be written")
