"""What W&B hears of a run: a guest, told in the conventions by which runs compare there.

Nothing secret goes in: no environment, no command line, no storage, no text of the terminal. See
`gpt2.tracking.wandb_service.settings` for what is switched off.
"""

import logging
import os
import threading
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.config import TrainRun, WandbConfig
from gpt2.errors import UserError, without_secrets
from gpt2.tracking.tracker import ENDINGS, Ended, ExternalLogger, Record

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

Table = tuple[str, list[str | int], list[list[Any]]]  # its name, columns and rows

ROOT = Path("outputs")  # all runs' files lie together in its folder `wandb`
OURS_ALONE = ("wandb", "started_with", "resume", "resume_changes")  # of a configuration: nothing that runs compare by


def start_wandb(
    config: WandbConfig,
    *,
    name: str,
    group: str,
    job_type: str,
    tags: Collection[str] = (),
    settings: Record | None = None,
    identity: str | None = None,
) -> ExternalLogger:
    """Begin, or go on with, a run in W&B, never asking a question; a guest without ears if that is off or refused.

    Args:
        group: The experiment, or the study.
        job_type: train, trial, evaluate or generate.
        settings: The resolved configuration, nested and plain.
        identity: Of the run that goes on, or that will be known by it; a new one if None.
    """
    mode = wanted_mode(config.mode)
    if mode == "off":
        return ExternalLogger()
    how = {"name": name, "group": group, "tags": [tag[:64] for tag in tags], "config": settings or {}}
    try:
        from gpt2.tracking import wandb_service as service

        ROOT.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DATA_DIR", str((ROOT / "wandb").absolute()))  # not into the home directory
        seconds = service.UPLOAD_SECONDS if config.log_checkpoints == "best" else service.FINISH_SECONDS
        run = service.start(
            mode == "online",
            seconds,
            **harmless(how),
            project=config.project,
            entity=config.entity,
            dir=str(ROOT),
            id=identity or new_identity(),
            resume="allow",
            job_type=job_type,
            reinit="finish_previous",  # a run before in this process that did not end
            allow_val_change=True,  # of a run that is resumed longer
        )
        if run is None:
            return ExternalLogger()
        if config.mode == "online" and run.offline:
            log.warning("W&B: nobody is logged in here (`wandb login` does that), or nobody answers: kept offline.")
        return WandbRun(run, config, seconds)
    except Exception as error:  # noqa: BLE001  # a guest cannot stop the run, whatever goes wrong with it
        log.warning("W&B did not start: %s", _line(error))
        return ExternalLogger()


def start_of_training(config: TrainRun, run_folder: Path, about: Record, known_id: str | None = None) -> ExternalLogger:
    """`start_wandb` for a run of `train.py`.

    Args:
        run_folder: Keeps the id, so that a resumed run is the same W&B run.
        about: What `run.json` says.
        known_id: From a checkpoint, should the folder no longer have it.
    """
    if wanted_mode(config.wandb.mode) == "off":
        return ExternalLogger()
    id_file, study = run_folder / "wandb_id", config.study
    if not id_file.exists() or not id_file.read_text():
        id_file.write_text(known_id or new_identity())
    facts = {key: about[key] for key in ("parameters", "tokens_per_step", "repository", "machine", "versions")}
    return start_wandb(
        config.wandb,
        name=about["title"] if study.trial is None else f"{study.name}-{study.trial:04}",
        group=study.name or config.name,
        job_type="train" if study.trial is None else "trial",
        tags=about["tags"],
        settings={**told(about["config"]), **facts, "folder": os.path.relpath(run_folder)},
        identity=id_file.read_text(),
    )


def wanted_mode(mode: str) -> str:
    """`online`, `offline` or `off`; in `auto` the variable WANDB_MODE counts, as it does for other programs."""
    if mode != "auto":
        os.environ.pop("WANDB_MODE", None)  # wandb's login would heed it
        return mode
    variable = os.environ.get("WANDB_MODE", "online")
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(variable, "online")


def new_identity() -> str:
    return uuid.uuid4().hex[:12]


def told(config: Record) -> Record:
    """A plain configuration as W&B shows and filters it: nested, without what has no part in a comparison."""
    values = {key: value for key, value in config.items() if key not in OURS_ALONE}
    if "study" in values:
        values["study"] = {key: value for key, value in values["study"].items() if key != "claim"}
    return values


def kept_offline(run_folders: Iterable[Path]) -> str | None:
    """How to upload those of some runs of `train.py` that W&B keeps offline; None if there are none."""
    ids = [path.read_text() for folder in run_folders if (path := folder / "wandb_id").exists()]
    count = sum(any((ROOT / "wandb").glob(f"offline-run-*-{identity}")) for identity in ids)
    runs = "1 run is" if count == 1 else f"{count} runs are"
    return f"{runs} kept offline; `wandb sync {ROOT}/wandb/offline-run-*` uploads them" if count else None


def harmless(value: Any) -> Any:
    """The same without what may be secret in URLs."""
    if isinstance(value, dict):
        return {key: harmless(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [harmless(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


class WandbRun(ExternalLogger):
    """A run in W&B. What goes wrong with it is told once, and no more is said to it."""

    def __init__(self, run: "wandb.Run", config: WandbConfig, finish_seconds: float):
        self.run, self.id = run, run.id
        self.config, self.finish_seconds = config, finish_seconds
        self.folder = Path(os.path.relpath(Path(run.dir).parent))
        self.url = None if run.offline else run.url
        self._hears = self._takes_tables = self._is_uploaded = True
        self._table: threading.Thread | None = None
        self._newest_table: Table | None = None
        self._next_table: Table | None = None
        self._rows_told = 0
        self._say(self._define)

    @staticmethod
    def _define(run: "wandb.Run") -> None:
        for name in ("tokens", "step", "seconds"):  # what there is to draw against
            run.define_metric(name, hidden=True)
        run.define_metric("*", step_metric="tokens")
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            run.define_metric(name, step_metric="tokens", summary="min,last")  # "min" alone would drop the last

    def log(self, record: Record) -> None:
        self._say(lambda run: run.log({key: value for key, value in record.items() if value is not None}))

    def show_table(self, name: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        """In a thread: a table asks the server first, which takes 20 seconds where none answers.

        While it does, only the newest table waits to be next. W&B keeps every version of a table whole, so one goes
        in when it has grown by a tenth; the last one goes in at the end.
        """
        self._newest_table = name, columns, rows
        if len(rows) >= 1.1 * self._rows_told:
            self._hand_in_table()

    def _hand_in_table(self) -> None:
        if not (self._hears and self._takes_tables) or self._newest_table is None:
            return
        self._next_table, self._newest_table = self._newest_table, None
        self._rows_told = len(self._next_table[2])
        if self._table is None or not self._table.is_alive():
            self._table = threading.Thread(target=self._log_tables, daemon=True, name="wandb table")
            self._table.start()

    def _log_tables(self) -> None:
        import wandb

        while self._next_table is not None:
            (name, columns, rows), self._next_table = self._next_table, None
            try:
                self.run.log({name: wandb.Table(columns=columns, data=rows)})
            except Exception as error:  # noqa: BLE001  # see `_say`
                if self._takes_tables:  # and the run has not ended meanwhile
                    log.warning("W&B gets no more samples of this run; samples.md has them: %s", _line(error))
                self._takes_tables = False
                return

    def summarize(self, figures: Record) -> None:
        self._say(lambda run: run.summary.update(figures))

    def finish(self, ended: Ended, folder: Path | None = None) -> None:
        from gpt2.tracking import wandb_service as service

        try:
            self._hand_in_table()
            if self._table is not None:
                self._table.join(service.GRACE_SECONDS if self.url else service.FINISH_SECONDS)
            self._takes_tables = False
            self._say(lambda run: self._conclude(run, ended, folder))
        finally:
            self._is_uploaded = service.finish(self.run, ended.exit_code, self.finish_seconds) and self._hears

    def _conclude(self, run: "wandb.Run", ended: Ended, folder: Path | None) -> None:
        import wandb

        run.summary.update(harmless({"state": ended.state, **({"reason": ended.reason} if ended.reason else {})}))
        if run.job_type == "trial":
            run.tags = (*(tag for tag in run.tags or () if tag not in ENDINGS), ended.state)
        if folder and (picture := folder / "curves.png").exists():
            run.log({"curves": wandb.Image(str(picture))})
        if folder and self.config.log_checkpoints == "best":
            self._upload_best(run, folder)

    @staticmethod
    def _upload_best(run: "wandb.Run", folder: Path) -> None:
        import wandb

        from gpt2.checkpoint.run_folder import find_checkpoint
        from gpt2.tracking import wandb_service as service

        try:
            checkpoint = find_checkpoint(str(folder))
        except UserError:  # it ended before its first
            return
        artifact = wandb.Artifact(f"model-{run.id}", type="model")
        artifact.add_file(str(checkpoint))
        # It asks the server first, and has no limit of its own.
        service.within(service.STAGING_SECONDS, lambda: run.log_artifact(artifact, aliases=["best"]))

    def where(self) -> str | None:
        if self.url is None:
            return f"kept offline; `wandb sync {self.folder}` uploads it"
        if self._is_uploaded:
            return self.url
        return f"{self.url}, but not all of it; `wandb sync --include-online {self.folder}` uploads the rest"

    def _say(self, say: Callable[["wandb.Run"], Any]) -> None:
        if not self._hears:
            return
        try:
            say(self.run)
        except Exception as error:  # noqa: BLE001  # a guest cannot stop the run, whatever goes wrong with it
            self._hears = False
            log.warning("W&B failed and gets nothing more of this run; metrics.jsonl has it all: %s", _line(error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
