"""Heartbeats: one slot per rank in shared memory without a name, so that nothing can be left behind.

A thread of the rank ticks `alive`; the rank's work notes stage and step. Both are plain stores that take less
than a microsecond, and reading them asks nothing of the rank: it can be stopped, or stuck in C.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable

import attrs

__all__ = ["Beat", "Slot", "keep_ticking", "make_beats"]

_LAYOUT = struct.Struct("=qqqqqqq48s")
_SLOT = 128  # two cache lines, so that ranks do not write to a line they share
_ALIVE, _ENTERED, _MOVED, _STEP, _TOTAL, _DONE, _EXCHANGES, _STAGE = range(0, 64, 8)
_INTEGER = struct.Struct("=q")
_TICK = 0.25


@attrs.frozen
class Beat:
    """What one slot says.

    Attributes:
        alive: when the rank's ticking thread last ran, monotonic seconds; 0 before its first tick.
        entered: when its work entered the stage, monotonic seconds.
        moved: when its work last entered a stage or made a step, monotonic seconds.
        step: steps done in the stage.
        total: steps of the stage; 0 where unknown.
        done: whether the rank has ended its work in good order.
        stage: the stage it is in.
        exchanges: how many with other ranks it has begun there.
    """

    alive: float
    entered: float
    moved: float
    step: int
    total: int
    done: bool
    stage: str
    exchanges: int = 0


class Slot:
    """One rank's slot, seen from the rank or from the parent.

    Args:
        descriptor: the shared memory of `make_beats`.
        rank: whose slot.
    """

    def __init__(self, descriptor: int, rank: int) -> None:
        self._memory = mmap.mmap(descriptor, 0)
        self._start = rank * _SLOT
        self._exchanges = 0

    def tick(self) -> None:
        """Note that the process runs."""
        self._write(_ALIVE, time.monotonic_ns())

    def enter(self, stage: str) -> None:
        """Note that the work enters a stage."""
        self._write(_ENTERED, time.monotonic_ns())
        self._exchanges = 0
        self._write(_EXCHANGES, 0)
        self.step(0, 0)
        # Last, so that nobody who looks in between takes the time of the stage before for that of this one.
        name = stage.encode()[:48].ljust(48, b"\0")
        self._memory[self._start + _STAGE : self._start + _STAGE + 48] = name

    def step(self, done: int, total: int) -> None:
        """Note that the work has done `done` of `total` steps."""
        self._write(_STEP, done)
        self._write(_TOTAL, total)
        self._write(_MOVED, time.monotonic_ns())

    def exchange(self) -> None:
        """Note that the work begins an exchange with other ranks."""
        self._exchanges += 1
        self._write(_EXCHANGES, self._exchanges)

    def finish(self) -> None:
        """Leave the done mark: the only thing that makes exit code 0 a good end."""
        self._write(_DONE, 1)

    def read(self) -> Beat:
        """What the slot says now."""
        alive, entered, moved, step, total, done, exchanges, stage = _LAYOUT.unpack_from(
            self._memory, self._start
        )
        name = stage.rstrip(b"\0").decode(errors="replace") or "start"
        return Beat(alive / 1e9, entered / 1e9, moved / 1e9, step, total, bool(done), name, exchanges)

    def close(self) -> None:
        """Unmap the memory."""
        self._memory.close()

    def _write(self, offset: int, value: int) -> None:
        _INTEGER.pack_into(self._memory, self._start + offset, value)


def make_beats(ranks: int) -> int:
    """Shared memory for the slots of a job; returns its descriptor, to be inherited by the ranks."""
    descriptor = os.memfd_create("vaepp-beats", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, ranks * _SLOT)
    return descriptor


def keep_ticking(tick: Callable[[], None]) -> None:
    """Tick from a thread of its own for the rest of the process's life."""

    def forever() -> None:
        while True:
            tick()
            time.sleep(_TICK)

    threading.Thread(target=forever, name="vaepp-heartbeat", daemon=True).start()
