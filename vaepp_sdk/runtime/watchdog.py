"""Watches a rank's own steps from a thread, where no parent does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from vaepp_sdk.runtime.beats import Beat
from vaepp_sdk.runtime.pace import Pace, stall
from vaepp_sdk.runtime.stacks import thread_waits
from vaepp_sdk.spec.classes import LimitsSpec

__all__ = ["Watchdog"]

_TURN = 0.25


class Watchdog:
    """Tells when the thread that works does not come further, and waits for no other rank.

    A rank that waits inside an exchange is left alone: the one it waits for tells, and the exchange has a
    limit of its own.

    Args:
        limits: how long steps may take.
        tell: called once, from the watching thread, with what was seen.
    """

    def __init__(self, limits: LimitsSpec, tell: Callable[[str], None]) -> None:
        self._limits = limits
        self._tell = tell
        self._worker = 0
        self._beat = _entered("start")

    def enter(self, stage: str) -> None:
        """Note that the work enters a stage."""
        self._beat = _entered(stage)

    def step(self, done: int, total: int) -> None:
        """Note that the work has done `done` of `total` steps."""
        beat, now = self._beat, time.monotonic()
        self._beat = Beat(now, beat.entered, now, done, total, False, beat.stage)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calling thread for the length of a block."""
        over = threading.Event()
        self._worker = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=[over], name="vaepp-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        pace = Pace()
        while not over.wait(_TURN):
            beat = self._beat
            pace.note(beat)
            found = stall([(beat, pace)], time.monotonic(), self._limits)
            if found is not None and not thread_waits(self._worker):
                where = f" at step {beat.step} of {beat.total}" if beat.total else ""
                self._tell(f"it runs and does not come further{where}; {found.what}")
                return


def _entered(stage: str) -> Beat:
    now = time.monotonic()
    return Beat(now, now, now, 0, 0, False, stage)
