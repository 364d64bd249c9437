"""Tables for people and JSON for machines."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.cases import Case

__all__ = ["environment", "print_table", "rows", "save", "sent", "write"]

MIB = 2**20


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", *_module(), *sys.argv[1:]]),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "cards": cards,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("vaepp-sdk", "torch", "diffusers")},
    }


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec else []


def sent(ranks: Sequence[Mapping[str, Any]], nbytes: str) -> dict[str, Any]:
    """What all ranks sent, and the busiest one.

    Args:
        ranks: each one's figures: `messages`, `rounds`, and bytes.
        nbytes: the name of the bytes.
    """
    return {
        "mib": sum(rank[nbytes] for rank in ranks) / MIB,
        "busiest_mib": max(rank[nbytes] for rank in ranks) / MIB,
        "messages": sum(rank["messages"] for rank in ranks),
        "busiest_messages": max(rank["messages"] for rank in ranks),
        "rounds": max(rank["rounds"] for rank in ranks),
    }


def rows(case: Case, ranks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each thing measured in a launch; ratios are against the untiled decode on one rank."""
    untiled = ranks[0]["untiled"]
    found = []
    for name in ("untiled", "tiled", *case.strategies):
        parts = [rank[name] for rank in ranks if name in rank]
        first = parts[0]
        row = {
            "vae": case.vae,
            "pixels": case.pixels,
            "dtype": case.dtype,
            "ranks": 1 if name in ("untiled", "tiled") else case.ranks,
            "what": name,
            "seconds": max(part["seconds"] for part in parts),
            "peak_mib": [part["peak"] / MIB for part in parts],
            "messages": sum(part.get("messages", 0) for part in parts),
            "sent_mib": sum(part.get("bytes", 0) for part in parts) / MIB,
            "alone_seconds": [part["alone"] for part in parts if "alone" in part],
            "equal_to_tiled": first.get("equal_to_tiled"),
            "mean_percent": _percent(first.get("mean_from_untiled")),
            "max_percent": _percent(first.get("max_from_untiled")),
        }
        row["time_ratio"] = row["seconds"] / untiled["seconds"]
        row["compute_ratio"] = max(row["alone_seconds"], default=first["seconds"]) / untiled["seconds"]
        row["peak_ratio"] = max(row["peak_mib"]) * MIB / untiled["peak"]
        found.append(row)
    return found


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


_COLUMNS = (
    ("vae", "vae"),
    ("px", "pixels"),
    ("what", "what"),
    ("ranks", "ranks"),
    ("time", "seconds"),
    ("x time", "time_ratio"),
    ("x compute", "compute_ratio"),
    ("x peak", "peak_ratio"),
    ("MiB sent", "sent_mib"),
    ("messages", "messages"),
    ("= tiled", "equal_to_tiled"),
    ("mean %", "mean_percent"),
)

LEGEND = """\
Ratios (x) are against the untiled decode on one rank, measured in the same launch.
time: wall clock of the slowest rank, with all ranks sharing this machine's cores or card.
compute: the busiest rank's own windows, alone on the machine, nothing exchanged.
peak: the most live bytes of any rank, weights excluded. mean %: mean difference from the untiled
decode, in percent of its range; random weights and random latents, so seams are at their worst."""


def print_table(found: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table, every column as wide as it needs to be."""
    cells = [[_cell(row[key]) for _, key in _COLUMNS] for row in found]
    widths = [
        max(len(heading), *(len(line[place]) for line in cells))
        for place, (heading, _) in enumerate(_COLUMNS)
    ]
    for line in [[heading for heading, _ in _COLUMNS], *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\n{LEGEND}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(path: Path, found: Sequence[Mapping[str, Any]], cases: Sequence[Case]) -> None:
    """Write rows, cases and environment as JSON."""
    content = {
        "environment": environment(),
        "cases": [attrs.asdict(case) for case in cases],
        "rows": list(found),
    }
    write(path, content)


def write(path: Path, content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write results as JSON, and say where; rows are added to them, one a line."""
    text = json.dumps(content, indent=2)
    if rows:
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        text = f'{text[:-2]},\n  "rows": [\n{lines}\n  ]\n}}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written to {path}")
