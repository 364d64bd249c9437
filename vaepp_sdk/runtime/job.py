"""What a job is: how many ranks, what they do, how long each wait may take, and its private folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.spec.classes import LimitsSpec

__all__ = ["Job", "RunFolder"]


@attrs.frozen(kw_only=True)
class Job:
    """One job on this machine.

    Attributes:
        world_size: ranks to start.
        target: what makes a rank's work, as `"module:attribute"`; see `RankWork`.
        payload: what the work is about; plain data.
        limits: the longest waits.
    """

    world_size: int
    target: str
    payload: Mapping[str, Any]
    limits: LimitsSpec = attrs.field(factory=LimitsSpec)


@attrs.frozen
class RunFolder:
    """A folder that only this user can read, with the logs and error files of one job."""

    path: Path

    @classmethod
    def create(cls) -> RunFolder:
        """Make a new one under the system's folder for temporary files."""
        return cls(Path(tempfile.mkdtemp(prefix="vaepp-run-")))

    def log(self, rank: int) -> Path:
        """What a rank prints."""
        return self.path / f"rank{rank}.log"

    def error(self, rank: int) -> Path:
        """What a failing rank leaves."""
        return self.path / f"rank{rank}.error.json"

    def stacks(self, rank: int) -> Path:
        """The stacks of a rank that was asked for them."""
        return self.path / f"rank{rank}.stacks"

    def remove(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
