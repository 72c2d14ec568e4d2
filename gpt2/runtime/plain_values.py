"""Build dataclasses from the plain values of a file, and check their keys and types."""

import reprlib
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gpt2.errors import UserError, collecting

NO_SUCH_KEY = "there is no such key"


def from_plain(kind: type, values: Any, prefix: str = "") -> Any:
    """Build a dataclass from the plain values of a file. Keys and types are checked, ranges are not.

    A missing value gets the default of its field. A nested dataclass must not be missing.

    Raises:
        UserError: Keys or types are wrong; all problems are listed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.')}: {brief(values)} is not a group of keys and values")
    hints, arguments = get_type_hints(kind), {}
    unknown = [key for key in values if key not in hints]
    problems = [f"{prefix}{key}: {NO_SUCH_KEY}; there are {', '.join(hints)}" for key in map(brief, unknown)]
    for field in fields(kind):
        key, options = field.name, options_of(hints[field.name])
        nested = next(filter(is_dataclass, options), None)
        if key not in values:
            if nested or field.default is field.default_factory is MISSING:
                problems.append(f"{prefix}{key}: missing")
        elif nested and not (values[key] is None and NoneType in options):
            with collecting(problems):
                arguments[key] = from_plain(nested, values[key], f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            try:
                arguments[key] = _as_type(values[key], hints[key])
            except ValueError as error:
                problems.append(f"{prefix}{key}: {error}")
    if problems:
        raise UserError(*problems)
    return kind(**arguments)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys; an empty dictionary counts as a value."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        result |= inner or {f"{prefix}{key}": value}
    return result


def brief(value: Any) -> str:
    """Format a value for a message: short and on one line; a name without quotes."""
    return value if isinstance(value, str) and value.isidentifier() and len(value) < 30 else reprlib.repr(value)


TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
TYPE_WORDS |= {list: "a list", dict: "a group of keys and values"}


def _as_type(value: Any, hint: Any) -> Any:
    """Convert a value to the type of a field. For a float, a text such as "1e-3" is accepted: YAML reads it as a text.

    Raises:
        ValueError: The value has another type; the message describes the expected type.
    """
    for option in options_of(hint):
        kind, inner = get_origin(option), get_args(option)
        if option is Any or type(value) is option or value in choices_of(option):
            return value
        if kind is list and isinstance(value, list):
            return [_as_type(item, inner[0]) for item in value]
        if kind is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: _as_type(item, inner[1]) for key, item in value.items()}
        if option is float and type(value) in (int, str):
            with suppress(ValueError, OverflowError):
                return float(value)
    words = (
        TYPE_WORDS.get(option) or ", ".join(map(shown, choices_of(option))) or TYPE_WORDS[get_origin(option)]
        for option in options_of(hint)
    )
    raise ValueError(f"{reprlib.repr(value)} is not {' or '.join(words)}")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of `Literal[...]`, and None if the type is optional; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = [choice for option in options_of(hint) if option is not hint for choice in choices_of(option)]
    return (*inner, None) if inner else ()


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; for another type, that type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def shown(choice: Any) -> str:
    return "null" if choice is None else str(choice)
