"""Profile a few training steps: a trace file, and a table of the most expensive operations."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from gpt2.training.callbacks import Callback

log = logging.getLogger(__name__)

SKIPPED, WARMUP, RECORDED = 3, 2, 3  # steps before the profiler starts, steps in which it warms up, recorded steps


class StepProfiler(Callback):
    """Records `RECORDED` steps with torch.profiler and writes the trace into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.device = "cpu"
        self.profiler: profile | None = None  # while it runs

    def on_train_start(self, trainer: Any) -> None:
        self.device = "cuda" if trainer.device.type == "cuda" else "cpu"
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])],
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=RECORDED, repeat=1),
            on_trace_ready=self._report,
            acc_events=True,
        )
        self.profiler.start()

    def on_step_end(self, trainer: Any) -> None:
        if self.profiler:
            self.profiler.step()

    def on_train_end(self, trainer: Any) -> None:
        if self.profiler:
            self.profiler.on_trace_ready = None
            self.profiler.stop()
            log.warning(f"profile: nothing was recorded, that takes at least {SKIPPED + WARMUP + RECORDED} steps")

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.on_train_end(trainer)

    def _report(self, recorded: profile) -> None:
        """Write the trace and log the most expensive operations."""
        self.profiler = None
        trace = self.folder / "trace.json"
        with suppress(OSError, RuntimeError):  # it must not end the training; in most cases nothing is raised
            recorded.export_chrome_trace(str(trace))
        table = recorded.key_averages().table(sort_by=f"self_{self.device}_time_total", row_limit=15)
        log.info(f"Profile of {RECORDED} steps:\n{table}")
        if trace.is_file():
            log.info(f"    written to {os.path.relpath(trace)}, for https://ui.perfetto.dev or chrome://tracing")
        else:
            log.warning(f"profile: {os.path.relpath(trace)} cannot be written")
