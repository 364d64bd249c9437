"""What is left of a job, asked of the kernel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path


def alive(session: int) -> list[int]:
    """Processes of a session that still run; a rank's session has its process id."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and not only waiting to be reaped."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def of_job(folder: Path) -> list[int]:
    """Processes with a job's mark in their environment."""
    return with_variable(f"VAEPP_JOB={folder}")


def with_variable(variable: str) -> list[int]:
    """Processes that were started with a variable and its value in their environment."""
    found, mark = list[int](), variable.encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def wait_until_gone(sessions: Iterable[int], seconds: float) -> list[int]:
    """Processes of these sessions that are left after so many seconds."""
    limit = time.monotonic() + seconds
    while left := [pid for session in sessions for pid in alive(session)]:
        if time.monotonic() > limit:
            return left
        time.sleep(0.02)
    return []


def listeners(pids: Iterable[int]) -> set[str]:
    """The addresses, in hexadecimal, on which processes listen for TCP."""
    return {local for local, state in _sockets(pids) if state == "0A"}


def talks(pids: Iterable[int]) -> set[str]:
    """The local addresses, in hexadecimal, of what processes have open over TCP and UDP."""
    return {local for local, _ in _sockets(pids)}


def _sockets(pids: Iterable[int]) -> set[tuple[str, str]]:
    """The local address and the state of each socket of IP that processes hold."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(link.readlink())
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                found.add((fields[1].rpartition(":")[0], fields[3]))
    return found
