"""Training speed of `transformers`, other peers and this repository, with the same weights on the same batches."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from gpt2.analysis.tables import from_to, table
from gpt2.benchmarks.common import MATRIX, Row, circumstances, headline, interleaved, matmul_flops, spread, write_json
from gpt2.benchmarks.contestants import Contestant, Workload, contestants
from gpt2.config import TrainingBenchmark
from gpt2.errors import one_line
from gpt2.runtime.console import track
from gpt2.runtime.device import keep_freed_memory, peak_flops

log = logging.getLogger(__name__)

LEGEND = f"""\
ratio: to the first row of the peer, or of transformers if there is no peer.
MFU: model FLOPs (PaLM, appendix B) over the peak. The peak of a GPU is that of its data sheet, of a CPU the fastest
product of {MATRIX} x {MATRIX} matrices. first s: seconds of the first step, including compilation. first loss, last
loss: all contestants train on the same batches, so only rounding may make them differ."""


class TrainingComparison:
    """Times training steps of all contestants, interleaved."""

    def __init__(self, config: TrainingBenchmark, folder: Path):
        self.config = config
        self.workload = Workload(config, folder, config.warmup + config.repetitions * config.steps)
        self.left_out: dict[str, str] = {}  # the reasons, by the names of contestants that cannot run
        self.peaks: dict[str, float | None] = {}  # FLOP/s by precision

    def compare(self) -> list[Row]:
        """Return a row for each contestant."""
        ready: list[tuple[Contestant, Row]] = []
        with track("Building", unit="contestants") as advance:
            everyone = contestants(self.workload)
            for number, contestant in enumerate(everyone, start=1):
                first = self._prepare(contestant)
                if first is not None:
                    ready.append((contestant, first))
                advance(number, len(everyone))

        seconds = self._measure([contestant for contestant, _ in ready])
        rows = [self._row(contestant, seconds[contestant.name]) | first for contestant, first in ready]
        others = (row for row in rows if not row["contestant"].startswith(("gpt2,", "transformers,")))
        reference = next(others, rows[0])
        return [{**row, "ratio": row["tokens_per_second"] / reference["tokens_per_second"]} for row in rows]

    def _prepare(self, contestant: Contestant) -> Row | None:
        """Build a contestant and run its warm-up steps. Return None if it does not support the configuration."""
        try:
            contestant.prepare()
            first = {"first_step_seconds": contestant.time_steps(), "first_loss": contestant.loss}
        except RuntimeError as error:  # or NotImplementedError, a subclass
            if contestant.is_ours:
                raise
            self.left_out[contestant.name] = one_line(error)[:300]
            log.warning("%s is left out: %s", contestant.name, self.left_out[contestant.name])
            return None
        for _ in range(1, self.config.warmup):
            contestant.time_steps()
        return first

    def _measure(self, ready: list[Contestant]) -> dict[str, list[float]]:
        """Return the seconds per step of each contestant in each repetition, and set `peaks`."""
        precisions = {contestant.precision.name: contestant.precision for contestant in ready}
        self.peaks = {name: peak_flops(precision) for name, precision in precisions.items()}
        turns = {contestant.name: partial(contestant.time_steps, self.config.steps) for contestant in ready}
        if self.workload.device.type == "cpu":
            turns |= {name: partial(matmul_flops, precision) for name, precision in precisions.items()}
        each = interleaved(list(turns.values()), self.config.repetitions, "Training")
        results = dict(zip(turns, each, strict=True))
        self.peaks |= {name: max(results[name]) for name in precisions if name in results}
        return results

    def _row(self, contestant: Contestant, each: list[float]) -> Row:
        step = spread("step_seconds", each)
        speed = self.workload.tokens_per_step / step["step_seconds"]
        peak = self.peaks[contestant.precision.name]
        return {
            "contestant": contestant.name,
            "precision": contestant.precision.name,
            "tokens_per_second": speed,
            **step,
            "mfu": peak and speed * self.workload.flops_per_token / peak,
            "last_loss": contestant.loss,
        }


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["contestant"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "ms a step": lambda row: f"{row['step_seconds'] * 1e3:,.1f}",
    "from - to": lambda row: from_to([seconds * 1e3 for seconds in row["step_seconds_of_each"]], 1),
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "MFU": lambda row: "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
    "first s": lambda row: f"{row['first_step_seconds']:.1f}",
    "first loss": lambda row: f"{row['first_loss']:.4f}",
    "last loss": lambda row: f"{row['last_loss']:.4f}",
}


def training(config: TrainingBenchmark) -> None:
    """Print a table, and write all measurements to the file `config.json`."""
    keep_freed_memory()  # as train.py does; a setting of the process, so it applies to all contestants
    with tempfile.TemporaryDirectory() as folder:
        comparison = TrainingComparison(config, Path(folder))
        workload, train = comparison.workload, config.train
        about = circumstances(workload.device)
        print(
            f"{workload.weights / 1e6:,.1f} million weights, {workload.tokens_per_step:,} tokens a step "
            f"({train.batch_size} blocks of {workload.context} in each of {train.accumulation_steps} micro-batches), "
            f"medians of {config.repetitions}\n{headline(about)}",
            flush=True,
        )
        rows = comparison.compare()
    print(f"\n{table(rows, COLUMNS)}\n\n{LEGEND}", flush=True)
    record = {
        "benchmark": "training",
        "config": asdict(config),
        **about,
        "parameters": workload.weights,
        "tokens_per_step": workload.tokens_per_step,
        "flops_per_token": workload.flops_per_token,
        "peak_flops": comparison.peaks,
        "left_out": comparison.left_out,
        "results": rows,
    }
    write_json(config.json, record)
