"""Processes that have left their rank's session, found by a mark in the environment that they inherit.

A signal to a rank's process group does not reach them, and once the rank is gone nothing else tells whose
they were.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Container
from pathlib import Path

__all__ = ["MARK", "end_strays", "signal_strays"]

MARK = "VAEPP_JOB"
"""Names the job in the environment of all its processes; without it, one is left alone."""

_GRACES = ((signal.SIGTERM, 1.0), (signal.SIGKILL, 2.0))


def end_strays(job: str) -> None:
    """End all processes that were started with a job's mark: SIGTERM, a second to leave, SIGKILL."""
    for number, grace in _GRACES:
        found, limit = signal_strays(job, (), number), time.monotonic() + grace
        for pidfd in found:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(max(0.0, limit - time.monotonic()) * 1000)
            os.close(pidfd)


def signal_strays(job: str, sessions: Container[int], number: int) -> list[int]:
    """Send a signal to the processes of a job that are in none of its ranks' sessions.

    Returns:
        A descriptor for each, readable once it has ended; to be closed.
    """
    mark, found = os.fsencode(f"{MARK}={job}"), list[int]()
    for pid in [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]:
        if not _is_stray(pid, mark, sessions):
            continue
        with contextlib.suppress(OSError):
            found.append(os.pidfd_open(pid))
            if _is_stray(pid, mark, sessions):  # still: the number may have become another's in between
                signal.pidfd_send_signal(found[-1], number)
    return found


def _is_stray(pid: int, mark: bytes, sessions: Container[int]) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        return mark in environment.split(b"\0") and os.getsid(pid) not in sessions
    except OSError:  # another user's, or it has ended
        return False
