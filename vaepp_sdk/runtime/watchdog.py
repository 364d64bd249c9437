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

__all__ = ["GIVEN_UP", "Watchdog"]

_TURN = 0.25
_LOOK = 1.0
"""How often it is asked whether the job is over, in seconds: each answer is a message or more."""

GIVEN_UP = 6.0
"""How long a rank may stand still once the job is over, in seconds: longer than those that failed listen."""


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
    def watching(self, is_over: Callable[[], str]) -> Iterator[None]:
        """Watch the calling thread for the length of a block.

        Args:
            is_over: called from the watching thread, about once a second: why the job has ended for the other
                ranks, or nothing. A rank that is stuck where no limit is near does not learn it otherwise.
        """
        over = threading.Event()
        self._worker = threading.get_ident()
        arguments = (over, is_over)
        thread = threading.Thread(target=self._watch, args=arguments, name="vaepp-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event, is_over: Callable[[], str]) -> None:
        pace, why = Pace(), ""
        next_look, learnt = 0.0, 0.0
        while not over.wait(_TURN):
            beat, now = self._beat, time.monotonic()
            pace.note(beat)
            if not why and now > next_look:
                why, next_look, learnt = is_over(), now + _LOOK, now
            found = stall([(beat, pace)], now, self._limits)
            what = found.what if found is not None else ""
            if not what and why and now - max(learnt, beat.moved) > GIVEN_UP:
                what = f"no step for {now - beat.moved:.1f} s, and {why}"
            if what and not thread_waits(self._worker):
                where = f" at step {beat.step} of {beat.total}" if beat.total else ""
                self._tell(f"it runs and does not come further{where}; {what}")
                return


def _entered(stage: str) -> Beat:
    now = time.monotonic()
    return Beat(now, now, now, 0, 0, False, stage)
