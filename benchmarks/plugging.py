"""Lets the ranks of a run find a plugin of the benchmarks, which no package installs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["announce"]

ROOT = Path(__file__).resolve().parents[1]


def announce(name: str, module: str, folder: Path) -> str:
    """Write a plugin's metadata into a folder.

    Args:
        name: the entry point's.
        module: where the plugin is.
        folder: an existing folder.

    Returns:
        The `PYTHONPATH` with which a process finds the plugin, and all that this one finds.
    """
    package = folder / f"{name}-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[vaepp_sdk]\n{name} = {module}\n")
    return os.pathsep.join([str(folder), str(ROOT), *sys.path])
