"""What the command line prints: messages on stderr, results on stdout, nothing that a terminal obeys."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence

import attrs

from vaepp_sdk.events import StageEnd
from vaepp_sdk.text import clean

__all__ = ["StageRow", "complain", "first_to_say", "safe", "speaks", "stage_rows", "table"]

_LINE = 2000
_SAID: list[socket.socket] = []


def safe(text: str) -> str:
    """A text of several lines without anything a terminal would obey."""
    return "\n".join(clean(line, _LINE) for line in text.split("\n"))


def first_to_say(message: str) -> bool:
    """Whether no other rank of this machine says the same; true where no launcher started several.

    The first holds the message's name until it exits, so it must not exit before the others have come here.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 or sys.platform != "linux":
        return True
    job = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    digest = hashlib.sha256("\n".join([*job, message]).encode(errors="replace")).hexdigest()
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0vaepp-{digest}")  # a name of the kernel's, no file
    except OSError:
        name.close()
        return False
    _SAID.append(name)
    return True


def complain(message: str, *notes: str) -> None:
    """One block on stderr; under a launcher it says which rank speaks, unless the message names one."""
    rank = os.environ.get("RANK")
    name = f"vaepp-run: rank {clean(rank)}" if rank and not message.startswith("rank ") else "vaepp-run"
    lines = [f"{name}: {message}", *(f"  {note}" for note in notes)]
    print(safe("\n".join(lines)), file=sys.stderr)


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
