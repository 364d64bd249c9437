"""One rank's process: started in a session of its own, watched, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.runtime.beats import Slot
from vaepp_sdk.runtime.channel import ParentChannel, encode
from vaepp_sdk.runtime.job import Job, RunFolder
from vaepp_sdk.runtime.pace import Pace
from vaepp_sdk.runtime.pictures import make_store
from vaepp_sdk.runtime.strays import MARK, end_job, is_readable

__all__ = ["Ending", "RankProcess", "end_all", "spawn"]

_RANK_MAIN = str(Path(__file__).with_name("rank_main.py"))
_KILL_GRACE = 10.0
# A launcher's variables would make the ranks, or what they import, join another job.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@attrs.frozen
class Ending:
    """How a process ended: an exit code, or the signal that killed it; neither where nobody can tell."""

    code: int | None = None
    signal: int | None = None

    @property
    def may_be_good(self) -> bool:
        """Whether a rank that left its done mark has ended well, as far as anybody can tell."""
        return self.signal is None and not self.code

    def __str__(self) -> str:
        if self.signal is not None:
            name = signal.Signals(self.signal).name if self.signal in set(signal.Signals) else self.signal
            hint = " (the system kills so when memory runs out)" if self.signal == signal.SIGKILL else ""
            return f"its process was killed by {name}{hint}"
        if self.code is None:
            return "its process ended and its status went elsewhere"
        return f"its process ended early with exit code {self.code}"


@attrs.define(eq=False)
class RankProcess:
    """A rank, seen from the parent.

    Attributes:
        rank: its number.
        process: the process; its id is also its session's and its process group's.
        pidfd: readable once the process has ended.
        channel: messages to and from it.
        slot: its heartbeat.
        pictures_fd: where its pictures arrive.
        phase: `boot`, `load`, `idle`, `request` or `close`, as far as it has told.
        since: when the phase began, monotonic seconds.
        pace: how long its steps take.
    """

    rank: int
    process: subprocess.Popen[bytes]
    pidfd: int
    channel: ParentChannel
    slot: Slot
    pictures_fd: int
    phase: str = "boot"
    since: float = attrs.field(factory=time.monotonic)
    pace: Pace = attrs.field(factory=Pace)

    def enter(self, phase: str) -> None:
        """Note that the rank is in another phase."""
        self.phase, self.since = phase, time.monotonic()

    def ended(self) -> bool:
        """Whether the process has ended."""
        return is_readable(self.pidfd, 0)

    def ending(self) -> Ending | None:
        """How the process ended, or None while it lives. It is not reaped, so that its id stays its own."""
        if not self.ended():
            return None
        try:
            found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # the program around us collects its children itself
            found = None
        if found is None:
            return Ending()
        if found.si_code == os.CLD_EXITED:
            return Ending(code=found.si_status)
        return Ending(signal=found.si_status)

    def release(self) -> None:
        """Reap the process and close what the parent holds of it."""
        self.process.wait()
        self.channel.close()
        self.slot.close()
        os.close(self.pidfd)
        os.close(self.pictures_fd)


def spawn(job: Job, rank: int, folder: RunFolder, beats_fd: int, listener: socket.socket) -> RankProcess:
    """Start one rank and send it its boot message.

    The calling thread must live as long as the rank: the kernel ties the rank's life to that thread.
    """
    with contextlib.ExitStack() as undone:
        parent_end, rank_end = (undone.enter_context(end) for end in socket.socketpair())
        pictures_fd = make_store(rank)
        undone.callback(os.close, pictures_fd)
        log = undone.enter_context(folder.log(rank).open("wb"))
        slot = Slot(beats_fd, rank)
        undone.callback(slot.close)
        inherited = [rank_end.fileno(), beats_fd, pictures_fd]
        if rank == 0:
            inherited.append(listener.fileno())
        process = subprocess.Popen(
            # -P: what lies in the working folder is no module of ours.
            [sys.executable, "-P", _RANK_MAIN, str(rank_end.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=inherited,
            env=_environment(job.world_size, str(folder.path)),
        )
        undone.callback(process.wait)
        undone.callback(process.kill)
        pidfd = os.pidfd_open(process.pid)
        undone.pop_all()
    log.close()
    rank_end.close()
    found = RankProcess(
        rank=rank,
        process=process,
        pidfd=pidfd,
        channel=ParentChannel(parent_end),
        slot=slot,
        pictures_fd=pictures_fd,
    )
    found.channel.post(encode(_boot(job, found, folder, beats_fd, listener)))
    return found


def _boot(
    job: Job, rank: RankProcess, folder: RunFolder, beats_fd: int, listener: socket.socket
) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "world_size": job.world_size,
        "target": job.target,
        "payload": dict(job.payload),
        "sys_path": [entry for entry in sys.path if isinstance(entry, str)],
        "exchange": job.limits.exchange,
        "port": listener.getsockname()[1],
        "listen_fd": listener.fileno() if rank.rank == 0 else None,
        "beats_fd": beats_fd,
        "pictures_fd": rank.pictures_fd,
        "stacks": str(folder.stacks(rank.rank)),
        "error": str(folder.error(rank.rank)),
    }


def _environment(world_size: int, job: str) -> Mapping[str, str]:
    """The parent's environment, without a launcher's variables and with cores shared out fairly."""
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // world_size)))
    environment |= {"PYTHONUNBUFFERED": "1", MARK: job}
    return environment


def end_all(ranks: Sequence[RankProcess], job: str) -> None:
    """End the processes of ranks and all they started.

    Args:
        ranks: the processes.
        job: what they were marked with.
    """
    end_job(job, {rank.process.pid: rank.pidfd for rank in ranks}, _KILL_GRACE)
