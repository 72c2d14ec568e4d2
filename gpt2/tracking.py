"""What a run tells, and to whom: `metrics.jsonl` first, then Weights & Biases; a progress line for whoever watches.

The file is the truth. W&B is a guest: whatever it does, the run goes on and nothing is lost.
"""

import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gpt2.checkpoint import replacing
from gpt2.config import TrainRun
from gpt2.failures import is_full_disk

log = logging.getLogger(__name__)

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


class ConsoleHandler(logging.StreamHandler):
    """Log lines on standard output, above the progress line while there is one.

    It looks `sys.stdout` up each time, because the progress line puts something in its place. A record marked
    `on_progress_line` is not repeated while that line shows it.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def emit(self, record: logging.LogRecord) -> None:
        if not (getattr(record, "on_progress_line", False) and is_terminal()):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Where nobody reads any more, after `| head` or on a terminal that was closed, the run goes on in silence."""
        _raise_full_disk()
        if isinstance(sys.exc_info()[1], OSError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the rest of the process
        else:
            super().handleError(record)


class LogFile(logging.FileHandler):
    """Log lines in a file."""

    def handleError(self, record: logging.LogRecord) -> None:
        _raise_full_disk()
        super().handleError(record)


def _raise_full_disk() -> None:
    """Let what `logging` would print with a traceback, and go on, end the run as it does anywhere else."""
    error = sys.exc_info()[1]
    if error is not None and is_full_disk(error):
        raise error


def is_terminal() -> bool:
    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def track(description: str, unit: str, seconds_between_lines: float = 10.0) -> Iterator[Callable[..., None]]:
    """Show that something goes on. Yields a function to call with the amount done so far, and of how much if known."""
    started = time.perf_counter()
    last_line = started
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, transient=True, disable=not is_terminal()) as progress:
        task = progress.add_task(description, total=None, amount="")
        done = 0

        def advance(so_far: int, of: int | None = None) -> None:
            nonlocal done, last_line
            done = so_far
            now = time.perf_counter()
            out_of = "" if of is None else f" of {of:,}"
            rate = so_far / max(now - started, 1e-9)
            amount = f"{so_far:,}{out_of} {unit}, {rate:{',.0f' if rate >= 10 else '.2g'}} a second"
            progress.update(task, amount=amount)
            if progress.disable and now - last_line > seconds_between_lines:
                log.info("%s: %s", description, amount)
                last_line = now

        yield advance
    if done:
        log.info("%s: %s %s in %.1f s", description, f"{done:,}", unit, time.perf_counter() - started)


def time_left(seconds: float | None) -> str:
    """Such as 1:02:03 or 2:03."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLine:
    """Step, loss, speed and time left on one line of a terminal; nothing where there is none."""

    def __init__(self, total_steps: int, step: int = 0, label: str = ""):
        columns = (
            TextColumn(f"{label}  step" if label else "step", markup=False),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = Progress(*columns, disable=not is_terminal(), transient=True)
        self.task = self.progress.add_task("", total=total_steps, completed=step, figures="")

    def __enter__(self) -> "ProgressLine":
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def step(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def figures(self, loss: float, tokens_per_second: float, seconds_left: float | None) -> None:
        self.show(f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {time_left(seconds_left)} left")

    def show(self, text: str) -> None:
        self.progress.update(self.task, figures=text)


# ---------------------------------------------------------------------------------------------------------------------
# The record of a run


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # also what is no UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class Tracker:
    """Where a run's numbers go. Without a folder and without W&B, nowhere: the null object."""

    def __init__(self, folder: Path | None = None, wandb_run: Any = None):
        self.folder = folder
        self.wandb_run = wandb_run
        self.samples: list[tuple[int, str]] = []
        self.has_failed: bool | None = None  # None: if an exception ends it

    @property
    def path(self) -> Path | None:
        return self.folder and self.folder / "metrics.jsonl"

    def cut_back(self, step: int, evaluated_at: int) -> None:
        """Forget what came after `step`, or after the evaluation at `evaluated_at`: a resumed run does it again."""
        if self.folder is None or self.path is None:
            return
        if not self.path.exists():
            return
        records = read_metrics(self.path)
        kept = [r for r in records if r["step"] <= (evaluated_at if "val/loss" in r else step)]
        self.samples = [(r["step"], r["sample"]) for r in kept if "sample" in r]
        lost = len(self.path.read_bytes().splitlines()) - len(records)
        if lost > 1:  # a crash leaves one line unfinished
            log.warning("%s: %s lines are damaged and left out", self.path, lost)
        _replace(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        _replace(self.folder / "samples.md", "".join(_section(*sample) for sample in self.samples))

    def log(self, record: Record, sample: str | None = None) -> None:
        """Add one record; it has `step`, `tokens` and `seconds`. A number that is none (NaN, infinity) becomes null.

        A sample of text goes with it into `metrics.jsonl`, is a section of `samples.md`, and a row of a growing table
        in W&B.
        """
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._append("metrics.jsonl", json.dumps(finite if sample is None else {**finite, "sample": sample}) + "\n")
        self._tell_wandb(lambda run: run.log(record))
        if sample is not None:
            self.samples.append((record["step"], sample))
            self._append("samples.md", _section(*self.samples[-1]))
            self._tell_wandb(lambda run: run.log({"samples": _table(self.samples), "step": record["step"]}))

    def flush(self) -> None:
        """Have the disk, not only the kernel, hold all that was logged."""
        if self.path and self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def _append(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            error.filename = str(self.folder / name)
            raise

    @property
    def wandb_id(self) -> str | None:
        return None if self.wandb_run is None else self.wandb_run.id

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        """End W&B's run, as failed if ours did."""
        has_failed = error is not None if self.has_failed is None else self.has_failed
        self._tell_wandb(lambda run: run.finish(exit_code=int(has_failed)))

    def ended(self, state: str, has_failed: bool, states: Collection[str]) -> None:
        """Say how a trial ended, in one of the `states` that there are; it is also a tag in W&B."""
        self.has_failed = has_failed

        def tell(run: Any) -> None:
            run.summary["trial/state"] = state
            others = [tag for tag in run.tags or () if tag not in states]  # it may have been interrupted once
            run.tags = (*others, state)

        self._tell_wandb(tell)

    def where_in_wandb(self) -> str | None:
        """Where to look at the run in W&B, or how to get it there; None without W&B."""
        if self.wandb_run is None:
            return None
        if self.wandb_run.offline:
            return f"kept offline; `wandb sync {Path(self.wandb_run.dir).parent}` uploads it"
        return self.wandb_run.url

    def _tell_wandb(self, say: Callable[[Any], Any]) -> None:
        if self.wandb_run is None:
            return
        try:
            say(self.wandb_run)
        except Exception as error:  # noqa: BLE001  # a guest cannot stop the run, whatever goes wrong with it
            log.warning("W&B failed and gets nothing more of this run; metrics.jsonl has it all: %s", error)
            self.wandb_run = None


def _section(step: int, sample: str) -> str:
    return f"## Step {step:,}\n\n```\n{sample}\n```\n\n"


def _replace(path: Path, text: str) -> None:
    """Give a file another content, all of it or none; also if the power goes."""
    content = text.encode()
    if path.exists() and path.read_bytes() == content:
        return
    with replacing(path) as file:
        file.write(content)


def _table(samples: list[tuple[int, str]]) -> Any:
    import wandb

    return wandb.Table(columns=["step", "text"], data=[list(sample) for sample in samples])


def start_wandb(run: TrainRun, run_folder: Path, root: Path, settings: Record, known_id: str | None = None) -> Any:
    """Begin, or go on with, this run's W&B run, never asking a question. None if it is off or refuses.

    The trials of a study are grouped by its name, other runs by theirs.

    Args:
        run_folder: Keeps the id, so that a resumed run is the same W&B run.
        root: All runs' W&B files lie together in `root/wandb`.
        settings: The resolved configuration, plain and nested.
        known_id: Of the W&B run to go on with, from a checkpoint, should the folder no longer have it.
    """
    config, study = run.wandb, run.study
    if config.mode == "off":
        return None
    import wandb

    id_file = run_folder / "wandb_id"
    if not id_file.exists() or not id_file.read_text():
        id_file.write_text(known_id or uuid.uuid4().hex[:12])
    root.mkdir(parents=True, exist_ok=True)
    for mode in _modes(config.mode):
        try:
            started = wandb.init(
                project=config.project,
                entity=config.entity,
                dir=str(root),
                id=id_file.read_text(),
                resume="allow",
                name=f"{run.name}-{run_folder.name}" if study.trial is None else f"{study.name}-{study.trial:04}",
                group=study.name or run.name,
                job_type="train" if study.trial is None else "trial",
                reinit="finish_previous",  # a run before in this process that did not end
                config=settings,
                allow_val_change=True,  # of a run that is resumed longer
                mode=mode,
                # Neither the command line nor the terminal's text goes in: either may hold a secret.
                settings=wandb.Settings(console="off", silent=True, init_timeout=10, x_disable_meta=True),
            )
        except Exception as error:  # noqa: BLE001  # see Tracker._tell_wandb
            log.warning("W&B (%s) did not start: %s", mode, " ".join(str(error).split()))
            wandb.teardown()  # it still holds the id that the next attempt takes
            continue
        started.define_metric("tokens")
        started.define_metric("*", step_metric="tokens")
        return started
    return None


def _modes(mode: str) -> list[Any]:
    """The modes to try in turn."""
    wanted = (os.environ.get("WANDB_MODE") or "online") if mode == "auto" else mode
    if wanted != "online":
        return [wanted]
    import wandb

    try:
        is_logged_in = wandb.login(prompt=False)
    except Exception as error:  # noqa: BLE001  # a server that does not answer, a key that is none
        log.warning("W&B: this run is kept offline: %s", " ".join(str(error).split()))
        return ["offline"]
    if is_logged_in:
        return ["online", "offline"]
    if mode == "online":
        log.warning("W&B: nobody is logged in here (`wandb login` does that): this run is kept offline.")
    return ["offline"]


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draw the loss over the tokens seen, in training and validation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    records = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "train/loss": {"color": "#9db4d0", "linewidth": 1.2, "label": "training"},
        "val/loss": {"color": "#c8502d", "linewidth": 2, "marker": "o", "markersize": 4, "label": "validation"},
    }
    for key, style in styles.items():
        points = [(r["tokens"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    best = min((r for r in records if r.get("val/loss") is not None), key=lambda r: r["val/loss"], default=None)
    if best:
        axes.annotate(
            f"best {best['val/loss']:.3f}",
            (best["tokens"], best["val/loss"]),
            textcoords="offset points",
            xytext=(0, 10),
            ha="right",
            color=styles["val/loss"]["color"],
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(picture)
