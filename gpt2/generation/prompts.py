"""Prompts from standard input, which is one, or from a file: one text a line, or one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from gpt2.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")


def decode_prompt(data: bytes, place: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark, and with the line ends of Unix.

    Raises:
        UserError: The bytes are not UTF-8, or hold a NUL.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text at byte {error.start}") from error
    if b"\0" in data:
        raise UserError(f"{place} has a NUL at byte {data.index(0)}, so it is UTF-16 or not text; give UTF-8")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, each with a string under "prompt" and the other keys of its JSON object.

    A file whose name ends in `.jsonl` or `.ndjson` holds JSON objects, any other file plain prompts. Empty lines are
    skipped: an empty prompt, or one of several lines, needs JSON.

    Raises:
        UserError: The file cannot be read, has no prompt, or a line is invalid.
    """
    path = Path(path)
    try:
        text = decode_prompt(path.read_bytes(), f"prompts_file: {path}")
    except OSError as error:
        raise UserError(f"prompts_file: {path} cannot be read: {error.strerror}") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts_file: {path} has no prompt")
    if path.suffix.lower() not in JSON_LINES:
        return [{"prompt": line} for _, line in numbered]
    return [_parse_record(line, f"prompts_file: {path}, line {number}") for number, line in numbered]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _parse_record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{place}: expected an object with a string "prompt", such as {{"prompt": "Once upon a time"}}')
    return record
