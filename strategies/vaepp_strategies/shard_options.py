"""Which options of `shard` go together; read where specs are checked, so it imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vaepp_sdk.errors import UnsupportedError

__all__ = ["UNITS", "parse_bytes", "refuse_conflict", "shard_conflict"]

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Bytes of each unit that a size may have."""

_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(KiB|MiB|GiB)")

_DEFAULTS = {
    "deterministic": "off",
    "repeat": "auto",
    "row_blocks": 1,
    "peak_limit": None,
    "recompute": "auto",
}


def shard_conflict(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why options, each of which is fine, cannot be set together; see `StrategyEntry.conflict`."""
    asked = {**_DEFAULTS, **options}
    changed = [name for name, default in _DEFAULTS.items() if asked[name] != default]
    blocks = [name for name in ("row_blocks", "peak_limit") if name in changed]
    if asked["peak_limit"] is not None and not parse_bytes(asked["peak_limit"]):
        fix = "it must be a number with KiB, MiB or GiB, as in '6GiB' or '900MiB'"
        return f"peak_limit is {asked['peak_limit']!r}", fix
    if len(blocks) > 1:
        return "row_blocks and peak_limit are both set", "set one: peak_limit finds row_blocks"
    if asked["deterministic"] != "off":
        named = f"deterministic = {asked['deterministic']!r} does not go together with"
        others = [name for name in (*blocks, "recompute") if name in changed]
        if others:
            return f"{named} {' and '.join(others)}", "leave one out: row blocks round in their own way"
        if asked["repeat"] == "always":
            return f"{named} repeat = 'always'", "leave one out: its ranks compute nothing for their peers"
    elif not blocks and "recompute" in changed:
        found = f"recompute = {asked['recompute']!r} has no effect without row blocks"
        return found, "set row_blocks or peak_limit, or leave it out"
    if blocks and asked["repeat"] == "always":
        return f"repeat = 'always' does not go together with {blocks[0]}", "leave one out"
    return None


def refuse_conflict(**options: Any) -> None:
    """Refuse options that do not go together, where a strategy is made without its entry.

    Raises:
        UnsupportedError: with what would work.
    """
    conflict = shard_conflict(options)
    if conflict is not None:
        raise UnsupportedError("; ".join(conflict))


def parse_bytes(text: str) -> int:
    """The bytes of a size as in `"6GiB"` or `"1.5GiB"`; 0 for what is no number with KiB, MiB or GiB."""
    match = _SIZE.fullmatch(text)
    return int(float(match[1]) * UNITS[match[2]]) if match else 0
