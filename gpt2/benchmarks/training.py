"""How fast a model is trained: `transformers`, another peer, and ours, with the same weights on the same batches."""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from gpt2.benchmarks import memory
from gpt2.benchmarks.common import (
    Row,
    circumstances,
    from_to,
    headline,
    interleaved,
    or_na,
    spread,
    table,
    write_json,
)
from gpt2.benchmarks.contestants import Contestant, FirstStep, Workload, contestants
from gpt2.benchmarks.overhead import overhead, told, waiting
from gpt2.config import TrainingBenchmark
from gpt2.ops.linear import LINEARS
from gpt2.runtime.console import track
from gpt2.runtime.device import Precision, fastest_seconds, free_memory, keep_freed_memory, peak_flops

log = logging.getLogger(__name__)

PRODUCT = 2048  # rows and columns of the matrices by which a CPU's peak is measured
WAITING_STEPS = 5  # fed by the loader


def rate_of_products(precision: Precision) -> float:
    """FLOP/s of a large matrix product on this device in that number format, by the faster way that there is."""
    left, right = (torch.ones(PRODUCT, PRODUCT, dtype=precision.dtype, device=precision.device) for _ in range(2))
    return 2 * PRODUCT**3 / min(fastest_seconds([partial(way, left, right) for way in LINEARS.values()], repetitions=1))


class TrainingComparison:
    """Whole training steps of all contestants, in turn."""

    def __init__(self, config: TrainingBenchmark, folder: Path):
        self.config = config
        once = 1 + WAITING_STEPS
        self.workload = Workload(config, folder, config.warmup + config.repetitions * config.steps + once)
        self.device = self.workload.device
        self.left_out: dict[str, str] = {}
        self.waiting: Row = {}
        self.peaks: dict[str, float | None] = {}  # FLOP/s by precision

    def compare(self) -> list[Row]:
        """A row for each contestant."""
        reference = self.workload.reference()
        ready: list[tuple[Contestant, FirstStep]] = []
        with track("Building", unit="contestants") as advance:
            everyone = contestants(self.workload)
            for number, contestant in enumerate(everyone, start=1):
                first = self._first(contestant, reference)
                if first is not None:
                    ready.append((contestant, first))
                advance(number, len(everyone))
        reference_loss = reference[0]
        del reference  # a gradient as large as the weights
        seconds = self._turns([contestant for contestant, _ in ready])
        for contestant, _ in ready:
            contestant.leave()
        free_memory()  # for those that run alone now
        memories = self._memories([contestant.name for contestant, _ in ready]) if self.config.memory else {}
        rows = [
            self._row(contestant, first, each, reference_loss, memories.get(contestant.name, {}))
            for (contestant, first), each in zip(ready, seconds, strict=True)
        ]
        peers = [row for row in rows if not row["contestant"].startswith("gpt2,")]
        named = [row for row in peers if not row["contestant"].startswith("transformers,")]
        for row in rows:
            row["ratio"] = row["tokens_per_second"] / (named or peers)[0]["tokens_per_second"] if peers else None
        return rows

    def _memories(self, names: list[str]) -> dict[str, Row]:
        found = {}
        with track("Memory", unit="contestants") as advance:
            for number, name in enumerate(names, start=1):
                try:
                    found[name] = memory.measure(self.config, name)
                except memory.NotMeasured as error:
                    log.warning("The memory of %s is not known: %s", name, error)
                advance(number, len(names))
        return found

    def _first(self, contestant: Contestant, reference: Any) -> FirstStep | None:
        """Build a contestant and make its warm-up steps; None where it cannot do what is asked for."""
        try:
            contestant.prepare()
            first = contestant.first_step(self.workload, reference)
        except (NotImplementedError, RuntimeError) as error:
            if contestant.is_ours:
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.left_out[contestant.name] = reason
            log.warning("%s is left out: %s", contestant.name, reason)
            return None
        for number in range(1, self.config.warmup):
            contestant.turn(self.workload, number, 1)
        return first

    def _turns(self, ready: list[Contestant]) -> list[list[float]]:
        """Seconds a step of each contestant, in each repetition. All see the same batches in a repetition."""
        config = self.config
        repetition = [0] * len(ready)

        def turn(number: int) -> float:
            first = config.warmup + repetition[number] * config.steps
            repetition[number] += 1
            return ready[number].turn(self.workload, first, config.steps)

        named = {contestant.precision.name: contestant.precision for contestant in ready}
        measured = named.values() if self.device.type == "cpu" else ()
        turns: list[Callable[[], float]] = [partial(turn, number) for number in range(len(ready))]
        turns += [partial(rate_of_products, precision) for precision in measured]
        seconds = interleaved(turns, config.repetitions, "Training")
        rates = dict(zip([p.name for p in measured], seconds[len(ready) :], strict=True))
        self.peaks = {
            name: max(rates[name]) if name in rates else peak_flops(precision) for name, precision in named.items()
        }
        ours = next(contestant for contestant in ready if contestant.is_ours)
        self.waiting = {"precision": ours.precision.name, **self._waiting(ours)}
        return seconds[: len(ready)]

    def _waiting(self, ours: Contestant) -> Row:
        assert ours.trainer is not None
        with ours.own_settings():
            return waiting(ours.trainer, self.workload, WAITING_STEPS)

    def _row(self, contestant: Contestant, first: FirstStep, each: list[float], loss: float, memories: Row) -> Row:
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
            **memories,
            "build_seconds": contestant.build_seconds,
            "first_step_seconds": first.seconds,
            "first_loss": first.loss,
            "loss_difference": first.loss - loss,
            "gradient_error": first.gradient_error,
        }


HEAD = (
    *("", "tokens/s", "from - to", "ms a step", "from - to", "ratio", "MFU", "peak MB", "first s"),
    *("first loss", "off by", "gradient off by"),
)
LEGEND = """\
ratio: to the first line of the peer, or of transformers where there is no other.
MFU: model FLOPs (PaLM, appendix B) over {peak}.
peak MB: {memory}. first s: the first step, with what is compiled.
off by: first loss less that of plain fp32; of the gradient, the norm of the difference over the norm, all weights."""
PEAK_MEMORY = {
    "cuda": "the most that PyTorch had allocated, each alone in a process",
    "cpu": "the most that was resident during the steps, each alone in a process, libraries included",
}


def as_text(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        each = row["step_seconds_of_each"]
        cells = (
            row["contestant"],
            f"{row['tokens_per_second']:,.0f}",
            from_to(row["tokens_per_second_of_each"]),
            f"{row['step_seconds'] * 1e3:,.1f}",
            from_to([seconds * 1e3 for seconds in each], 1),
            or_na(row["ratio"], ".2f"),
            or_na(row["mfu"], ".1%"),
            or_na(row.get("peak_memory_bytes") and row["peak_memory_bytes"] / 1e6, ",.0f"),
            f"{row['first_step_seconds']:.1f}",
            f"{row['first_loss']:.4f}",
            f"{row['loss_difference']:+.1e}",
            or_na(row["gradient_error"], ".1e"),
        )
        lines.append(cells)
    return table(HEAD, lines)


def told_peaks(comparison: TrainingComparison) -> str:
    if comparison.device.type != "cpu":
        return "the chip's peak by its data sheet"
    rates = [f"{name} {(rate or 0) / 1e9:,.0f}" for name, rate in comparison.peaks.items()]
    return f"the best product of {PRODUCT} x {PRODUCT} matrices here ({', '.join(rates)} GFLOP/s)"


def training(config: TrainingBenchmark) -> None:
    """Print a table, and write it all to `config.json`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keep_freed_memory()  # as train.py does; it is a setting of the process, so all others have it too
    with tempfile.TemporaryDirectory() as folder:
        comparison = TrainingComparison(config, Path(folder))
        workload, train = comparison.workload, config.train
        found = circumstances(comparison.device)
        print(
            f"{workload.weights / 1e6:,.1f} million weights, {workload.tokens_per_step:,} tokens a step "
            f"({train.batch_size} blocks of {workload.context} in each of {train.accumulation_steps} passes), "
            f"medians of {config.repetitions}\n{headline(found)}",
            flush=True,
        )
        rows = comparison.compare()
        waits = comparison.waiting
        print(f"\n{as_text(rows)}\n")
        kind = PEAK_MEMORY.get(comparison.device.type, "not measured")
        print(LEGEND.format(peak=told_peaks(comparison), memory=kind if config.memory else "left out"))
        print(
            f"\nwaiting for data, gpt2, {waits['precision']}: {waits['waiting_for_data']:.2%} of {WAITING_STEPS} steps "
            f"fed by its loader with {waits['workers']} workers",
            flush=True,
        )
        found |= {
            "parameters": workload.weights,
            "tokens_per_step": workload.tokens_per_step,
            "flops_per_token": workload.flops_per_token,
            "peak_flops": comparison.peaks,
            "left_out": comparison.left_out,
            "waiting": waits,
            "results": rows,
        }
        del comparison, workload
    free_memory()  # before more is built
    if config.overhead:
        found["overhead"] = overhead(config)
        print(f"\n{told(found['overhead'])}")
    write_json(config, "training", found)
