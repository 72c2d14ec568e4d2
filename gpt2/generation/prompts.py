"""Prompts from a file: one text a line, or one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from gpt2.errors import UserError


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, each with a string under "prompt" and the other keys of its JSON object.

    A file whose name ends in `.jsonl` holds JSON objects, any other file plain prompts. Empty lines are skipped: an
    empty prompt, or one of several lines, needs JSON.

    Raises:
        UserError: The file cannot be read, has no prompt, or a line is invalid.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise UserError(f"prompts_file: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts_file: {path} is not UTF-8 text: {error}") from error
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts_file: {path} has no prompt")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_parse_record(line, f"prompts_file: {path}, line {number}") for number, line in numbered]


def _parse_record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{place}: expected an object with a string "prompt", such as {{"prompt": "Once upon a time"}}')
    return record
