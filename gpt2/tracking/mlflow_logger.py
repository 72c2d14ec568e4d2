"""The `ExternalLogger` for MLflow: a folder on this machine, or a tracking server."""

import json
import logging
import os
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.errors import without_secrets
from gpt2.runtime.files import exclusive_change, remove
from gpt2.runtime.plain_values import flat
from gpt2.tracking.loggers import MLFLOW_ID, Config, LoggedRun
from gpt2.tracking.tracker import FINISHED, INTERRUPTED, PRUNED, Ended, ExternalLogger, Record

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

STORE = Path("outputs/mlruns")
ARTIFACTS = Path("outputs/mlartifacts")  # files of runs in a database on this machine; MLflow's default is ./mlruns
STATUS = {FINISHED: "FINISHED", PRUNED: "FINISHED", INTERRUPTED: "KILLED"}  # for other endings: FAILED
MAX_KEY, MAX_VALUE = 250, 6000  # MLflow's limits, in characters
MAX_METRICS, MAX_PARAMS = 1000, 100  # MLflow's limits for a request


class MlflowLogger(ExternalLogger):
    """Logs metrics over steps, the configuration as parameters and as a file, and the samples as a table.

    MLflow's own retries take minutes. They run in a thread, so they delay only the end of a run, by at most `seconds`.
    """

    title = "MLflow"

    def __init__(self, config: Config, run: LoggedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.uri = config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or str(STORE)
        self.is_folder = "://" not in self.uri.removeprefix("file://")
        self.is_database = self.uri.startswith("sqlite:")  # on this machine
        if self.is_folder:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # otherwise MLflow 3 requires a database
        import mlflow  # noqa: F401  # imported in the main thread

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # it prints to standard error
        self.seconds = 30.0 if self.is_folder or self.is_database else 5.0  # creating a database takes several seconds
        self.experiment, self.run, self.step = config.mlflow.experiment, run, run.step
        self.run_id = ""
        self._pending: list[Metric] = []
        self._table: tuple[str, Record] | None = None
        self._rows_logged = 0

    def start(self) -> None:
        """Continue the run whose id is in the run folder, or create one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=self.uri)
        resumed = self._resumed()
        if resumed is None:
            tags = {"group": self.run.group, "job_type": self.run.job_type, "tags": ", ".join(self.run.tags)}
            run_id = self.client.create_run(self._experiment_id(), run_name=self.run.name, tags=tags).info.run_id
            if self.run.folder:
                remove(self.run.folder / MLFLOW_ID)
                (self.run.folder / MLFLOW_ID).write_text(run_id)
        else:
            run_id = resumed.info.run_id
            self.client.update_run(run_id, status="RUNNING")
        self.run_id, known = run_id, resumed.data.params if resumed else {}  # parameters cannot be changed
        values = {re.sub(r"[^\w. /:-]", "_", key)[:MAX_KEY]: value for key, value in flat(self.run.config).items()}
        params = [Param(key, str(value)[:MAX_VALUE]) for key, value in values.items() if key not in known]
        for first in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(run_id, params=params[first : first + MAX_PARAMS])
        self.client.log_text(run_id, json.dumps(self.run.config, indent=2, default=str), "config.json")

    def _resumed(self) -> "Run | None":
        from mlflow import MlflowException

        path = self.run.folder and self.run.folder / MLFLOW_ID
        if path is None or not path.is_file():
            return None
        try:
            return self.client.get_run(path.read_text(errors="replace"))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # an id of another server
                return None
            raise

    def _experiment_id(self) -> str:
        """The id of the experiment. It is created under a lock, or two processes could create two of the same name."""
        STORE.parent.mkdir(exist_ok=True)
        with exclusive_change(STORE.parent) if self.is_folder or self.is_database else nullcontext():
            if known := self.client.get_experiment_by_name(self.experiment):
                return known.experiment_id
            place = str(ARTIFACTS.absolute()) if self.is_database else None
            return self.client.create_experiment(self.experiment, artifact_location=place)

    def log(self, record: Record) -> None:
        self.step = record["step"]
        self.summarize({key: value for key, value in record.items() if key != "step"})

    def summarize(self, figures: Record) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
        self._pending += [Metric(key, value, now, self.step) for key, value in numbers.items()]
        if len(self._pending) > MAX_METRICS // 2:
            self.flush()

    def show_table(self, name: str, columns: list[str], rows: list[Any]) -> None:
        """Log a table if it grew by a tenth, as MLflow stores every version whole. `finish` logs the last version."""
        self._table = f"{name}.json", {"columns": columns, "data": rows}
        if len(rows) >= 1.1 * self._rows_logged:
            self._rows_logged = len(rows)
            self._log_table()

    def _log_table(self) -> None:
        if self._table:
            name, table = self._table
            self.client.log_text(self.run_id, json.dumps(table), name)
            self._table = None

    def flush(self) -> None:
        """Send all pending metrics in one request, so a slow server gets fewer requests."""
        if self._pending:
            metrics, self._pending = self._pending, []
            self.client.log_batch(self.run_id, metrics=metrics)

    def finish(self, ended: Ended, folder: Path | None) -> None:
        if not self.run_id:  # it did not start
            return
        self.flush()
        self._log_table()
        if folder and (picture := folder / "curves.png").exists():
            self.client.log_artifact(self.run_id, str(picture))
        self.client.set_tag(self.run_id, "state", ended.state)
        self.client.set_tag(self.run_id, "reason", ended.reason or "")  # replaces the reason of an earlier end
        self.client.set_terminated(self.run_id, STATUS.get(ended.state, "FAILED"))

    def where(self) -> list[str]:
        if not self.run_id:
            return []
        if self.is_folder:
            return [f"MLflow: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {self.uri}"]
        return [f"MLflow: run {self.run_id} at {without_secrets(self.uri)}"]
