"""How values and names from outside are shown in a message: short, printable, in TOML's words."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = [
    "clean",
    "first_line",
    "key_path",
    "message_of",
    "named",
    "one_line",
    "reason_of",
    "shown",
    "told",
]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")
_TYPE_NAMES = {"datetime": "a date", "date": "a date", "time": "a time of day", "NoneType": "None"}


def clean(text: str, limit: int = 80) -> str:
    """Text that is safe to print: no control, escape or bidirectional characters, no lone surrogates.

    Args:
        text: anything.
        limit: the most characters kept; what was left out is counted at the end.
    """
    kept = text if len(text) <= limit else text[:limit]
    printable = kept
    if not kept.isprintable():
        printable = "".join(char if char.isprintable() else _escaped(char) for char in kept)
    return printable if kept is text else f"{printable}... ({len(text)} characters)"


def shown(value: Any, limit: int = 60) -> str:
    """One value as a spec would write it; containers and foreign objects by their kind only."""
    if isinstance(value, str):
        return f'"{clean(value, limit)}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        digits = int(value.bit_length() * math.log10(2)) + 1
        return f"an integer of about {digits} digits" if digits > 40 else str(int(value))
    if isinstance(value, float):
        return str(float(value))
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a table"
    name = type(value).__name__
    return _TYPE_NAMES.get(name, f"a Python object of type {clean(name)}")


def message_of(error: BaseException, limit: int = 10_000) -> str:
    """What an exception says, as it is; of one that cannot even say it, that."""
    try:
        text = str(error)
    except Exception:
        return "(its message cannot be shown)"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def first_line(text: str) -> str:
    """The first line of a text that says something, as it is; empty where none does."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def one_line(text: str, limit: int = 300) -> str:
    """That line, safe to print and of a readable length."""
    return clean(first_line(text), limit)


def named(error: BaseException) -> str:
    """An exception's class and the first line of what it says, as they are."""
    name, first = type(error).__name__, first_line(message_of(error))
    return f"{name}: {first}" if first else name


def told(error: BaseException, limit: int = 300) -> str:
    """The same, safe to print and of a readable length."""
    return clean(named(error), limit)


def reason_of(error: OSError) -> str:
    """Why the system refused something, in its own words."""
    return error.strerror or str(error)


def key_path(path: str, key: object) -> str:
    """The path of a key inside a table, as in `$.parallel.tensor_parallel_size`."""
    if isinstance(key, str) and _BARE_KEY.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}.{shown(key)}"


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
