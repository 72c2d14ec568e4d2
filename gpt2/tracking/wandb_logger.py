"""The `ExternalLogger` for Weights & Biases.

Nothing secret is uploaded: no environment variables, command line, storage URL or terminal output. See
`gpt2.tracking.wandb_service.settings` for what is switched off.
"""

import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.config import TrainRun, WandbConfig
from gpt2.errors import UserError, one_line, without_secrets
from gpt2.runtime.files import remove
from gpt2.tracking.tracker import ENDINGS, Ended, ExternalLogger, Record

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

Table = tuple[str, list[str | int], list[list[Any]]]  # name, columns, rows

ID = "wandb_id"  # file in a run folder
ROOT = Path("outputs")  # all runs share its folder `wandb`, so that `wandb sync` and `wandb leet` find them
NOT_COMPARED = ("wandb", "started_with", "resume", "resume_changes")  # keys of a configuration


def start_wandb(
    config: WandbConfig,
    *,
    name: str,
    group: str,
    job_type: str,
    tags: Collection[str] = (),
    run_config: Record | None = None,
    run_id: str | None = None,
) -> ExternalLogger:
    """Start or resume a W&B run without prompting. Returns a logger that does nothing if W&B is off or fails.

    Args:
        group: The experiment or the study.
        job_type: train, trial, evaluate or generate.
        run_config: The resolved configuration, nested.
        run_id: Of the run to resume or create; None: a new id.
    """
    mode = resolve_mode(config.mode)
    if mode == "off":
        return ExternalLogger()
    try:
        from gpt2.tracking import wandb_service as service

        ROOT.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DATA_DIR", str((ROOT / "wandb").absolute()))  # by default in the home directory
        seconds = service.UPLOAD_SECONDS if config.log_checkpoints == "best" else service.FINISH_SECONDS
        run = service.start(
            mode == "online",
            seconds,
            **redact({"name": name, "group": group, "tags": [tag[:64] for tag in tags], "config": run_config or {}}),
            project=config.project,
            entity=config.entity,
            dir=str(ROOT),
            id=run_id or new_id(),
            resume="allow",
            job_type=job_type,
            reinit="finish_previous",  # a run of this process that was not finished
            allow_val_change=True,  # a resumed run may train longer
        )
        if run is None:
            return ExternalLogger()
        if config.mode == "online" and run.offline:
            log.warning("W&B: not logged in (see `wandb login`) or no answer from the server; this run is offline.")
        return WandbLogger(run, config, service.LOCAL_SECONDS if run.offline else seconds)
    except Exception as error:  # noqa: BLE001  # tracking never ends a run
        log.warning("W&B did not start: %s", one_line(error))
        return ExternalLogger()


def start_wandb_for_training(
    config: TrainRun, run_folder: Path, about: Record, known_id: str | None = None
) -> ExternalLogger:
    """`start_wandb` for a run of `train.py`.

    Args:
        run_folder: Stores the W&B id, so that a resumed run is the same W&B run.
        about: The content of `run.json`.
        known_id: The id in a checkpoint, used if the folder has none.
    """
    if resolve_mode(config.wandb.mode) == "off":
        return ExternalLogger()
    run_id, study = read_id(run_folder), config.study
    if run_id is None:
        run_id = known_id or new_id()
        remove(run_folder / ID)
        (run_folder / ID).write_text(run_id)
    facts = {key: about[key] for key in ("parameters", "tokens_per_step", "repository", "machine", "versions")}
    return start_wandb(
        config.wandb,
        name=about["title"] if study.trial is None else f"{study.name}-{study.trial:04}",
        group=study.name or config.name,
        job_type="train" if study.trial is None else "trial",
        tags=about["tags"],
        run_config={**comparable(about["config"]), **facts, "folder": os.path.relpath(run_folder)},
        run_id=run_id,
    )


def resolve_mode(mode: str) -> str:
    """`online`, `offline` or `off`; `auto` follows the environment variable WANDB_MODE, as other programs do."""
    if mode != "auto":
        os.environ.pop("WANDB_MODE", None)  # wandb.login would follow it
        return mode
    variable = os.environ.get("WANDB_MODE", "online")
    return {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(variable, "online")


def read_id(run_folder: Path) -> str | None:
    """The W&B id in a run folder; None if it is missing or damaged."""
    try:
        text = (run_folder / ID).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[\w-]{1,64}", text, re.ASCII) else None


def new_id() -> str:
    return uuid.uuid4().hex[:12]


def comparable(config: Record) -> Record:
    """A nested configuration without the keys that do not matter when runs are compared."""
    values = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    if "study" in values:
        values["study"] = {key: value for key, value in values["study"].items() if key != "claim"}
    return values


def offline_runs(run_folders: Iterable[Path]) -> str | None:
    """How to upload the offline W&B runs of some run folders, in a line; None if there are none."""
    ids = filter(None, map(read_id, run_folders))
    count = sum(any((ROOT / "wandb").glob(f"offline-run-*-{run_id}")) for run_id in ids)
    runs = "1 run is" if count == 1 else f"{count} runs are"
    return f"{runs} offline; upload with `wandb sync {ROOT}/wandb/offline-run-*`" if count else None


def redact(value: Any) -> Any:
    """Replace what may be secret in URLs, in all strings of nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


class WandbLogger(ExternalLogger):
    """Logs to a W&B run. After its first failure, which is a warning, it logs nothing more."""

    def __init__(self, run: "wandb.Run", config: WandbConfig, finish_seconds: float):
        self.run, self.id = run, run.id
        self.config, self.finish_seconds = config, finish_seconds
        self.folder = Path(os.path.relpath(Path(run.dir).parent))
        self.url = None if run.offline else run.url
        self._works = self._takes_tables = self._is_uploaded = True
        self._newest_table: Table | None = None
        self._table_thread: threading.Thread | None = None
        self._rows_logged = 0
        self._call(self._define_metrics)

    @staticmethod
    def _define_metrics(run: "wandb.Run") -> None:
        for name in ("tokens", "step", "seconds"):  # possible x axes, not curves
            run.define_metric(name, hidden=True)
        run.define_metric("*", step_metric="tokens")
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            run.define_metric(name, step_metric="tokens", summary="min,last")  # "min" alone would drop the last

    def log(self, record: Record) -> None:
        self._call(lambda run: run.log({key: value for key, value in record.items() if value is not None}))

    def show_table(self, name: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        """Log a table if it grew by a tenth, as W&B stores each version whole; `finish` logs the last one anyway."""
        self._newest_table = name, columns, rows
        if len(rows) >= 1.1 * self._rows_logged:
            self._log_newest_table()

    def _log_newest_table(self) -> None:
        """In a thread: wandb contacts the server first, which blocks for 20 seconds if that does not answer."""
        is_busy = self._table_thread is not None and self._table_thread.is_alive()
        if is_busy or self._newest_table is None or not (self._works and self._takes_tables):
            return
        table, self._newest_table = self._newest_table, None
        self._rows_logged = len(table[2])
        self._table_thread = threading.Thread(target=self._log_table, args=table, daemon=True, name="wandb table")
        self._table_thread.start()

    def _log_table(self, name: str, columns: list[str | int], rows: list[list[Any]]) -> None:
        import wandb

        try:
            self.run.log({name: wandb.Table(columns=columns, data=rows)})
        except Exception as error:  # noqa: BLE001  # tracking never ends a run
            if self._takes_tables:  # else the run has finished in the meantime
                log.warning("W&B gets no more samples of this run; samples.md has all: %s", one_line(error))
            self._takes_tables = False

    def summarize(self, figures: Record) -> None:
        self._call(lambda run: run.summary.update(figures))

    def finish(self, ended: Ended, folder: Path | None = None) -> None:
        from gpt2.tracking import wandb_service as service

        try:
            for _ in range(2):  # the version that is being logged, then the newest
                if self._table_thread is not None:
                    self._table_thread.join(service.limit(service.TABLE_SECONDS if self.url else service.LOCAL_SECONDS))
                self._log_newest_table()
            self._takes_tables = False
            self._call(lambda run: self._log_ending(run, ended, folder))
        finally:
            self._is_uploaded = service.finish(self.run, ended.exit_code, self.finish_seconds) and self._works

    def _log_ending(self, run: "wandb.Run", ended: Ended, folder: Path | None) -> None:
        import wandb

        run.summary.update(redact({"state": ended.state, **({"reason": ended.reason} if ended.reason else {})}))
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
        except UserError:  # the run ended before its first checkpoint
            return
        artifact = wandb.Artifact(f"model-{run.id}", type="model")
        artifact.add_file(str(checkpoint))
        # log_artifact contacts the server and has no timeout of its own.
        service.within(service.STAGING_SECONDS, lambda: run.log_artifact(artifact, aliases=["best"]))

    def where(self) -> str | None:
        if self.url is None:
            return f"offline; upload with `wandb sync {self.folder}`"
        if self._is_uploaded:
            return self.url
        return f"{self.url}, incomplete; upload the rest with `wandb sync --include-online {self.folder}`"

    def _call(self, call: Callable[["wandb.Run"], Any]) -> None:
        if not self._works:
            return
        try:
            call(self.run)
        except Exception as error:  # noqa: BLE001  # tracking never ends a run
            self._works = False
            log.warning("W&B failed and gets nothing more of this run; metrics.jsonl has all: %s", one_line(error))
