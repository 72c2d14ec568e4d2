"""Speed of training: `transformers`, another peer, and this repository, with the same weights on the same batches."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import transformers

from gpt2.benchmarks.common import Row, circumstances, from_to, headline, interleaved, or_na, spread, table, write_json
from gpt2.benchmarks.contestants import Contestant, Workload, contestants
from gpt2.benchmarks.peers import State
from gpt2.config import TrainingBenchmark
from gpt2.errors import one_line
from gpt2.ops.linear import LINEARS
from gpt2.runtime.console import track
from gpt2.runtime.device import Precision, fastest_seconds, keep_freed_memory, peak_flops

log = logging.getLogger(__name__)

MATRIX = 2048  # rows and columns of the matrices whose product measures a CPU's peak


def matmul_flops(precision: Precision) -> float:
    """FLOP/s of a large matrix product in a precision, by the fastest of our implementations."""
    left, right = (torch.ones(MATRIX, MATRIX, dtype=precision.dtype, device=precision.device) for _ in range(2))
    return 2 * MATRIX**3 / min(fastest_seconds([partial(way, left, right) for way in LINEARS.values()], repetitions=1))


class TrainingComparison:
    """Whole training steps of all contestants, in turn."""

    def __init__(self, config: TrainingBenchmark, folder: Path):
        self.config = config
        self.workload = Workload(config, folder, config.warmup + config.repetitions * config.steps)
        self.device = self.workload.device
        self.left_out: dict[str, str] = {}  # contestants that cannot run, with the reason
        self.peaks: dict[str, float | None] = {}  # FLOP/s by precision

    def compare(self) -> list[Row]:
        """A row for each contestant."""
        reference = self.workload.reference()
        ready: list[tuple[Contestant, Row]] = []
        with track("Building", unit="contestants") as advance:
            everyone = contestants(self.workload)
            for number, contestant in enumerate(everyone, start=1):
                first = self._prepare(contestant, reference)
                if first is not None:
                    ready.append((contestant, first))
                advance(number, len(everyone))
        del reference  # a gradient as large as the weights

        seconds = self._measure([contestant for contestant, _ in ready])
        rows = [self._row(contestant, each) | first for (contestant, first), each in zip(ready, seconds, strict=True)]
        peers = [row for row in rows if not row["contestant"].startswith("gpt2,")]
        named = [row for row in peers if not row["contestant"].startswith("transformers,")]
        for row in rows:
            row["ratio"] = row["tokens_per_second"] / (named or peers)[0]["tokens_per_second"] if peers else None
        return rows

    def _prepare(self, contestant: Contestant, reference: tuple[float, State]) -> Row | None:
        """Build a contestant and make its warm-up steps; None if it does not support what is configured."""
        try:
            first = {"build_seconds": contestant.prepare(), **contestant.first_step(self.workload, reference)}
        except (NotImplementedError, RuntimeError) as error:
            if contestant.is_ours:
                raise
            reason = one_line(error)[:300]
            self.left_out[contestant.name] = reason
            log.warning("%s is left out: %s", contestant.name, reason)
            return None
        for number in range(1, self.config.warmup):
            contestant.turn(self.workload, number, 1)
        return first

    def _measure(self, ready: list[Contestant]) -> list[list[float]]:
        """Seconds a step of each contestant in each repetition, in which all see the same batches; sets `peaks`."""
        config = self.config
        repetition = [0] * len(ready)

        def turn(number: int) -> float:
            first = config.warmup + repetition[number] * config.steps
            repetition[number] += 1
            return ready[number].turn(self.workload, first, config.steps)

        precisions = {contestant.precision.name: contestant.precision for contestant in ready}
        self.peaks = {name: peak_flops(precision) for name, precision in precisions.items()}
        measured = list(precisions.values()) if self.device.type == "cpu" else []
        turns: list[Callable[[], float]] = [partial(turn, number) for number in range(len(ready))]
        turns += [partial(matmul_flops, precision) for precision in measured]
        results = interleaved(turns, config.repetitions, "Training")
        for precision, rates in zip(measured, results[len(ready) :], strict=True):
            self.peaks[precision.name] = max(rates)
        return results[: len(ready)]

    def _row(self, contestant: Contestant, each: list[float]) -> Row:
        step = spread("step_seconds", each)
        speed = self.workload.tokens_per_step / step["step_seconds"]
        peak = self.peaks[contestant.precision.name]
        return {
            "contestant": contestant.name,
            "precision": contestant.precision.name,
            "tokens_per_second": speed,
            "tokens_per_second_of_each": [self.workload.tokens_per_step / seconds for seconds in each],
            **step,
            "mfu": peak and speed * self.workload.flops_per_token / peak,
        }


COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("", lambda row: row["contestant"]),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
    ("from - to", lambda row: from_to(row["tokens_per_second_of_each"])),
    ("ms a step", lambda row: f"{row['step_seconds'] * 1e3:,.1f}"),
    ("from - to", lambda row: from_to([seconds * 1e3 for seconds in row["step_seconds_of_each"]], 1)),
    ("ratio", lambda row: or_na(row["ratio"], ".2f")),
    ("MFU", lambda row: or_na(row["mfu"], ".1%")),
    ("first s", lambda row: f"{row['first_step_seconds']:.1f}"),
    ("first loss", lambda row: f"{row['first_loss']:.4f}"),
    ("difference", lambda row: f"{row['loss_difference']:+.1e}"),
    ("gradient error", lambda row: or_na(row["gradient_error"], ".1e")),
]
LEGEND = """\
ratio: to the first line of the peer, or of transformers if there is no other.
MFU: model FLOPs (PaLM, appendix B) over {peak}. first s: seconds of the first step, with compilation.
difference: first loss minus that of plain fp32. gradient error: norm of the difference over the norm, all weights."""


def as_text(rows: list[Row]) -> str:
    return table([head for head, _ in COLUMNS], [[cell(row) for _, cell in COLUMNS] for row in rows])


def peaks_as_text(comparison: TrainingComparison) -> str:
    if comparison.device.type != "cpu":
        return "the chip's peak by its data sheet"
    rates = [f"{name} {(rate or 0) / 1e9:,.0f}" for name, rate in comparison.peaks.items()]
    return f"the best product of {MATRIX} x {MATRIX} matrices here ({', '.join(rates)} GFLOP/s)"


def training(config: TrainingBenchmark) -> None:
    """Print a table, and write everything that was measured to `config.json`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()  # as train.py does; a setting of the process, so it applies to all contestants
    with tempfile.TemporaryDirectory() as folder:
        comparison = TrainingComparison(config, Path(folder))
        workload, train = comparison.workload, config.train
        about = circumstances(comparison.device)
        print(
            f"{workload.weights / 1e6:,.1f} million weights, {workload.tokens_per_step:,} tokens a step "
            f"({train.batch_size} blocks of {workload.context} in each of {train.accumulation_steps} passes), "
            f"medians of {config.repetitions}\n{headline(about)}",
            flush=True,
        )
        rows = comparison.compare()
    print(f"\n{as_text(rows)}\n")
    print(LEGEND.format(peak=peaks_as_text(comparison)), flush=True)
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
