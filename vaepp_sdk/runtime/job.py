"""What a job is: how many ranks, what they do, how long each wait may take, and its private folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import OutputError
from vaepp_sdk.spec.classes import LimitsSpec
from vaepp_sdk.text import one_line, reason_of

__all__ = ["Job", "RunFolder"]

_PREFIX, _OWNER = "vaepp-run-", "owner"
_TAIL = 2**16
_CRASH = re.compile(
    r'^Fatal Python error: (.+)$(?:\n.*)*?\nCurrent thread .*\n  File "(.+)", line (\d+) in (.+)$',
    re.MULTILINE,
)
"""What Python's fault handler writes: what happened, then the stacks of all threads."""


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
    """A folder that only this user can read, with the logs and error files of one job.

    Where the process that made it is killed nobody can remove it: the next job does, told by the lock that
    the kernel has taken off its `owner` file.
    """

    path: Path
    _owner: int

    @classmethod
    def create(cls) -> RunFolder:
        """Make a new one under the system's folder for temporary files.

        Raises:
            OutputError: nothing can be written there.
            OSError: too many files are open.
        """
        try:
            return cls._made()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise OutputError(
                f"the logs of ranks cannot be written to the folder for temporary files: {reason_of(error)}; "
                "make room there, or name another one in TMPDIR"
            ) from error

    @classmethod
    def _made(cls) -> RunFolder:
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            # Locked before it has its name, so that nobody ever finds it without the lock.
            unnamed = path / "new"
            owner = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError:
            path.rmdir()
            raise
        fcntl.flock(owner, fcntl.LOCK_EX)
        unnamed.rename(path / _OWNER)
        return cls(path, owner)

    def log(self, rank: int) -> Path:
        """What a rank prints."""
        return self.path / f"rank{rank}.log"

    def error(self, rank: int) -> Path:
        """What a failing rank leaves."""
        return self.path / f"rank{rank}.error.json"

    def stacks(self, rank: int) -> Path:
        """The stacks of a rank that was asked for them."""
        return self.path / f"rank{rank}.stacks"

    def last_line(self, rank: int) -> str:
        """The last line a rank printed, or where it crashed. Its log may be of any length, or gone."""
        text = ""
        with contextlib.suppress(OSError), self.log(rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            text = file.read(_TAIL).decode(errors="replace")
        if crash := _CRASH.search(text):
            return one_line("{} at {}:{} in {}".format(*crash.groups()), 160)
        lines = [line for line in text.splitlines() if line.strip()]
        return one_line(lines[-1], 160) if lines else ""

    def keep(self) -> None:
        """Leave it to the user, who has been told of it."""
        (self.path / _OWNER).unlink(missing_ok=True)
        os.close(self._owner)

    def remove(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._owner)


def _sweep(parent: Path) -> None:
    """Remove this user's folders whose process was killed."""
    for owner in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):  # another's, or another job is faster
            if owner.parent.lstat().st_uid == os.getuid() and _is_free(owner):
                shutil.rmtree(owner.parent, ignore_errors=True)


def _is_free(owner: Path) -> bool:
    descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
