"""Reads the `.wandb` file of a W&B run, without wandb's own process."""

import json
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 * 1024, 7  # LevelDB's log: blocks of chunks, each after a checksum (4), a length (2) and a type (1)


def records(path: Path) -> list[Record]:
    """All complete records. The last seconds of a killed process are missing."""
    data, at, found, record = path.read_bytes(), HEADER, [], b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        chunk, at = data[at + HEADER : at + HEADER + length], at + HEADER + length
        record = chunk if kind in (1, 2) else record + chunk  # a whole record, or its first chunk
        if kind in (1, 4) and len(chunk) == length:  # a whole record, or its last chunk
            found.append(Record.FromString(record))
    return found


def read_wandb(path: Path) -> dict[str, Any]:
    """Read a run from its file, or the folder with the file. Nested keys of history and summary are joined by dots."""
    run: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metrics": {}, "exit_code": None}
    for record in records(path if path.is_file() else next(path.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        part = getattr(record, kind or "header")
        if kind == "run":
            run |= {"id": part.run_id, "group": part.run_group, "tags": list(part.tags)}
            run |= {name: getattr(part, name) for name in ("display_name", "job_type", "resume", "host")}
        for item in part.config.update if kind == "run" else part.update if kind == "config" else ():
            *above, last = item.nested_key or [item.key]
            into = run["config"]
            for key in above:
                into = into.setdefault(key, {})
            into[last] = json.loads(item.value_json)
        if kind in ("history", "summary"):
            items = part.item if kind == "history" else part.update
            values = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            run["history"].append(values) if kind == "history" else run["summary"].update(values)
        elif kind == "metric":
            summary = [field.name for field, value in part.summary.ListFields() if value]
            run["metrics"][part.name or part.glob_name] = {"step_metric": part.step_metric, "summary": summary}
        elif kind == "exit":
            run["exit_code"] = part.exit_code  # the last one is valid
    return run
