"""Prompts from a file: a text a line, or a JSON object a line."""

import json
from pathlib import Path
from typing import Any

from gpt2.errors import UserError


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, each with a text under "prompt" and whatever else a JSON object holds.

    A file whose name ends in `.jsonl` holds JSON objects, any other one prompts. Empty lines are left out: an empty
    prompt, or one of several lines, needs JSON.

    Raises:
        UserError: The file cannot be read, holds no prompt, or a line is not what it should be.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"prompts_file: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file: {path} is no text in UTF-8: {error}") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts_file: {path} holds no prompt")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [record_of(line, f"prompts_file: {path}, line {number}") for number, line in numbered]


def record_of(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where}: no object with a text under "prompt", such as {{"prompt": "Once upon a time"}}')
    return record
