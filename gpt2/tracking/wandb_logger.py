"""The `ExternalLogger` for Weights & Biases.

No environment variables, command line, storage URL or terminal output are uploaded: see
`gpt2.tracking.wandb_service.settings` for what is switched off.
"""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import wandb

from gpt2.checkpoint.run_folder import find_checkpoint
from gpt2.errors import UserError, one_line
from gpt2.tracking import wandb_service as service
from gpt2.tracking.loggers import Config, LoggedRun, limit, within
from gpt2.tracking.tracker import ENDINGS, Ended, ExternalLogger, Record
from gpt2.tracking.wandb_runs import OUTPUTS, resolve_mode, stored_id, upload_command

log = logging.getLogger(__name__)


class WandbLogger(ExternalLogger):
    """Logs to a W&B run."""

    title = "W&B"

    def __init__(self, config: Config, run: LoggedRun):
        self.config, self.logged = config.wandb, run
        self.is_in_sweep = "WANDB_SWEEP_ID" in os.environ  # `wandb agent` started the run and chose its id
        known_id = os.environ.get("WANDB_RUN_ID") if self.is_in_sweep else run.wandb_id
        self.id = stored_id(run.folder, known_id)
        self.is_online = resolve_mode(self.config.mode) == "online"
        uploads = self.config.log_checkpoints == "best"
        self.finish_seconds = service.UPLOAD_SECONDS if uploads else service.FINISH_SECONDS
        self.seconds = self.finish_seconds + service.STAGING_SECONDS + 4 * service.LOCAL_SECONDS  # see wandb_service
        self.run: Any = None  # a wandb.Run, once it has started
        self.url: str | None = None
        self._takes_tables = True
        self._newest_table: tuple[str, list[str], list[Any]] | None = None  # name, columns, rows
        self._table_thread: threading.Thread | None = None
        self._rows_logged = 0
        service.prepare()
        os.environ.setdefault("WANDB_DATA_DIR", str((OUTPUTS / "wandb").absolute()))  # by default in the home directory

    def start(self) -> None:
        """Start or resume the run without prompting."""
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        self.run = run = service.start(
            self.is_online,
            self.finish_seconds,
            name=self.logged.name,
            group=self.logged.group,
            tags=self.logged.tags,
            config=self.logged.config,
            project=self.config.project,
            entity=self.config.entity,
            dir=str(OUTPUTS),
            id=self.id,
            resume="allow",
            job_type=self.logged.job_type,
            reinit="finish_previous",  # a run of this process that was not finished
            allow_val_change=True,  # a resumed run may train longer
        )
        if not run.offline:
            self.url = run.url
        else:
            self.finish_seconds = service.LOCAL_SECONDS
            if self.config.mode == "online":
                log.warning("W&B: not logged in (see `wandb login`) or no answer from the server; this run is offline.")
        self._define_metrics(run)

    def _define_metrics(self, run: wandb.Run) -> None:
        for name in ("tokens", "step", "seconds"):  # for x axes, not as curves
            run.define_metric(name, hidden=True)
        run.define_metric("*", step_metric="tokens")
        if self.is_in_sweep:  # W&B's sweeps compare plain numbers
            return
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            run.define_metric(name, step_metric="tokens", summary="min,last")  # "min" alone would drop the last

    def log(self, record: Record) -> None:
        self.run.log({key: value for key, value in record.items() if value is not None})

    def show_table(self, name: str, columns: list[str], rows: list[Any]) -> None:
        """Log a table if it grew by a tenth, as W&B stores every version whole. `finish` logs the last version."""
        self._newest_table = name, columns, rows
        if len(rows) >= 1.1 * self._rows_logged:
            self._log_newest_table()

    def _log_newest_table(self) -> None:
        """Log the newest table in a thread: wandb contacts the server first, and without an answer blocks for 20 s."""
        is_busy = self._table_thread is not None and self._table_thread.is_alive()
        if is_busy or self._newest_table is None or not self._takes_tables:
            return
        table, self._newest_table = self._newest_table, None
        self._rows_logged = len(table[2])
        self._table_thread = threading.Thread(target=self._log_table, args=table, daemon=True, name="wandb table")
        self._table_thread.start()

    def _log_table(self, name: str, columns: list[str], rows: list[Any]) -> None:
        try:
            self.run.log({name: wandb.Table(columns=[*columns], data=[list(row) for row in rows])})
        except Exception as error:  # noqa: BLE001  # tracking never ends a run
            if self._takes_tables:  # otherwise the run has finished in the meantime
                log.warning("W&B logs no more samples of this run; samples.md is complete: %s", one_line(error))
            self._takes_tables = False

    def summarize(self, figures: Record) -> None:
        self.run.summary.update(figures)

    def finish(self, ended: Ended, folder: Path | None) -> None:
        if self.run is None:  # it did not start
            return
        try:
            for _ in range(2):  # the version that is being logged, then the newest
                if self._table_thread is not None:
                    self._table_thread.join(limit(service.TABLE_SECONDS if self.url else service.LOCAL_SECONDS))
                self._log_newest_table()
            self._takes_tables = False
            self._log_ending(self.run, ended, folder)
        finally:
            if service.finish(self.run, ended.exit_code, self.finish_seconds) and self.url is not None:
                service.mark_as_synced(Path(self.run.dir).parent)

    def abandon(self, ended: Ended) -> None:
        service.end_service(ended.exit_code)  # otherwise wandb would report success when the interpreter exits

    def _log_ending(self, run: wandb.Run, ended: Ended, folder: Path | None) -> None:
        run.summary.update({"state": ended.state, **({"reason": ended.reason} if ended.reason else {})})
        if run.job_type == "trial":
            run.tags = (*(tag for tag in run.tags or () if tag not in ENDINGS), ended.state)
        if folder and (picture := folder / "curves.png").exists():
            run.log({"curves": wandb.Image(str(picture))})
        if folder and self.config.log_checkpoints == "best":
            self._upload_best(run, folder)

    @staticmethod
    def _upload_best(run: wandb.Run, folder: Path) -> None:
        try:
            checkpoint = find_checkpoint(str(folder))
        except UserError:  # the run ended before its first checkpoint
            return
        artifact = wandb.Artifact(f"model-{run.id}", type="model")
        artifact.add_file(str(checkpoint))
        # log_artifact contacts the server and has no timeout.
        within(service.STAGING_SECONDS, lambda: run.log_artifact(artifact, aliases=["best"]))

    def where(self) -> list[str]:
        if self.run is None:
            return []
        state = self.url or "offline"
        if command := upload_command([str(self.id)]):
            state += f"{', incomplete' if self.url else ''}; upload with `{command}`"
        return [f"W&B: {state}"]
