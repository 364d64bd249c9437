"""Overrides: `table.key=value`, as `--set` takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vaepp_sdk.errors import Fault, SpecError
from vaepp_sdk.spec.reading import MAX_BYTES, parse_toml
from vaepp_sdk.text import clean, shown

__all__ = ["apply_overrides"]

_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}(?:\.[A-Za-z0-9_-]{1,100}){1,3}")


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[Fault]]:
    """Set keys in a copy of plain tables.

    A value is read as TOML. What is not TOML is taken as a string, so that `model.id=./z-image` needs no
    quotes; whether the key takes a string is checked like everything else.

    Args:
        raw: the tables; not changed.
        overrides: as in `parallel.tensor_parallel_size=2`; a later one wins. One of `call` holds for every
            `[[call]]` entry.

    Returns:
        The tables, and the faults of overrides that are not of this form.
    """
    tables = dict(raw)
    if isinstance(overrides, str):  # its characters are not what was meant
        return tables, [Fault("overrides", f"found {shown(overrides)}", "give a list of such strings")]
    faults = []
    for text in overrides:
        fault = _apply(tables, text) if isinstance(text, str) else _malformed(text)
        if fault is not None:
            faults.append(fault)
    return tables, faults


def _apply(tables: dict[str, Any], text: str) -> Fault | None:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key) or len(value) > MAX_BYTES:
        return _malformed(text)
    *parents, last = key.split(".")
    entries = tables.get(parents[0])
    if parents == ["call"] and isinstance(entries, list):
        # Entries after the first may have said otherwise.
        tables["call"] = [
            {**entry, last: _value(value)} if isinstance(entry, Mapping) else entry for entry in entries
        ]
        return None
    table = tables
    for name in parents:
        inner = table.get(name, {})
        if not isinstance(inner, Mapping):
            return Fault(f"override {clean(key)}", f"{name} is {shown(inner)}", "only a table has keys")
        # A copy, so that the caller's own dict stays as it is.
        table[name] = dict(inner)
        table = table[name]
    table[last] = _value(value)
    return None


def _value(text: str) -> Any:
    try:
        parsed = parse_toml(f"value = {text}", "override")
    except SpecError:
        return text.strip()
    # A line break in the text could have added keys of its own.
    return parsed["value"] if set(parsed) == {"value"} else text.strip()


def _malformed(text: object) -> Fault:
    return Fault(f"override {shown(text)}", "it is not of the form table.key=value", _EXAMPLE)


_EXAMPLE = "write it as in parallel.tensor_parallel_size=2"
