"""The result file of `evaluate.py`: `evaluation.json` in a run folder or in `outputs/evaluations`."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2.checkpoint.run_folder import refuse_links
from gpt2.config import EvaluateRun
from gpt2.errors import UserError
from gpt2.runtime.files import atomic_write, exclusive_change

# Fields of `DataConfig` that `files` replaces.
OF_DATASETS = ("dataset_name", "dataset_config", "train_split", "validation_split", "test_split", "document_start")


def earlier_results(path: Path) -> list[dict[str, Any]]:
    """Read the results in a result file, oldest first.

    Raises:
        UserError: The file cannot be read, or is of another kind.
    """
    if not path.exists():
        return []
    try:
        newest = json.loads(path.read_text(encoding="utf-8"))
        results = [*newest.pop("earlier"), newest]
    except OSError as error:
        raise UserError(f"output: cannot read the earlier results in {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        results = [None]
    if not all(isinstance(result, dict) for result in results):
        raise UserError(f"output: {path} exists and is not a result of evaluate.py; name another file")
    return results


def add_result(path: Path, result: dict[str, Any]) -> None:
    """Add a result to a result file, as the newest. Several processes may do so at the same time.

    NaN and infinity, which JSON does not have, become null.
    """
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_change(path.parent):
            content = {**finite, "earlier": earlier_results(path)}
            with atomic_write(path) as file:
                file.write(json.dumps(content, indent=2).encode() + b"\n")
    except OSError as error:
        raise UserError(f"output: cannot write {path}: {error.strerror}") from error


def settings_of(config: EvaluateRun) -> dict[str, Any]:
    """The settings of an evaluation that are stored with its result."""
    unused = {"loggers", "wandb", "mlflow", "all_checkpoints"}
    unused |= {"data", "split", "stride"} if config.tasks else {"tasks", "limit", "tasks_folder"}
    settings = {key: value for key, value in asdict(config).items() if key not in unused}
    if config.data.files and not config.tasks:
        settings["data"] = {key: value for key, value in settings["data"].items() if key not in OF_DATASETS}
    return settings


def default_output(source: str) -> Path:
    """`evaluation.json` in the run folder of a trained model, or in outputs/evaluations if the model has none."""
    run = Path(source).absolute().parent.parent
    if (run / "metrics.jsonl").is_file():
        refuse_links(run, "output")
        return Path(os.path.relpath(run)) / "evaluation.json"
    return Path("outputs/evaluations") / re.sub(r"[^\w.-]+", "_", source.strip("./")) / "evaluation.json"
