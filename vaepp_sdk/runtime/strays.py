"""Ends a job's processes, those too that have left their rank's session.

A signal to a rank's process group does not reach them, and once the rank is gone only a mark in the
environment that they inherit tells whose they were.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Container, Mapping
from pathlib import Path

__all__ = ["MARK", "end_job", "is_readable"]

MARK = "VAEPP_JOB"
"""Names the job in the environment of all its processes; without it, one is left alone."""

_TERM_GRACE = 1.0


def end_job(job: str, ranks: Mapping[int, int], grace: float) -> None:
    """End the processes of a job and all they started: SIGTERM, a second to leave, SIGKILL.

    Args:
        job: what they were marked with.
        ranks: the ids of processes with a process group of their own, each with a descriptor that is readable
            once it has ended.
        grace: how long to wait for the kernel at the end, in seconds.
    """
    for number, wait in ((signal.SIGTERM, _TERM_GRACE), (signal.SIGKILL, grace)):
        for group in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        strays = _signal_strays(job, ranks, number)
        limit = time.monotonic() + wait
        for pidfd in [*ranks.values(), *strays]:
            is_readable(pidfd, max(0.0, limit - time.monotonic()))
        for pidfd in strays:
            os.close(pidfd)


def is_readable(descriptor: int, wait: float) -> bool:
    """Whether a descriptor, of any number, becomes readable within so many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(wait * 1000))


def _signal_strays(job: str, sessions: Container[int], number: int) -> list[int]:
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
