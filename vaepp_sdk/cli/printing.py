"""What the command line prints as results, on stdout, and who does where several ranks could."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import attrs

from vaepp_sdk.events import StageEnd

__all__ = ["StageRow", "speaks", "stage_rows", "table"]


def speaks() -> bool:
    """Whether this process prints results: the only one, or rank 0 under a launcher."""
    return os.environ.get("RANK", "0") == "0"


@attrs.frozen
class StageRow:
    """One stage over all ranks.

    Attributes:
        stage: its name.
        seconds: the slowest rank's.
        peak_bytes: each rank's peak memory, by rank; None where a rank took no part.
    """

    stage: str
    seconds: float
    peak_bytes: list[int | None]


def stage_rows(stages: Sequence[Sequence[StageEnd]]) -> list[StageRow]:
    """What each rank did, by rank, as one row per stage."""
    rows: dict[str, StageRow] = {}
    for rank, ends in enumerate(stages):
        for end in ends:
            row = rows.get(end.stage) or StageRow(end.stage, 0.0, [None] * len(stages))
            row.peak_bytes[rank] = max(end.peak_bytes, row.peak_bytes[rank] or 0)
            rows[end.stage] = attrs.evolve(row, seconds=max(row.seconds, end.seconds))
    return list(rows.values())


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns under their names; the first is flush left, the others flush right."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = []
    for row in ({name: name for name in names}, *rows):
        first, *others = names
        cells = [row[first].ljust(widths[first]), *(row[name].rjust(widths[name]) for name in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
