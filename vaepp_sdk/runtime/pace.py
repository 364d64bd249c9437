"""Whether a job's steps have stopped: how long they have taken so far says how long to wait for the next.

Pure: it sees heartbeats and the clock, and does the same for invented ones.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import attrs

from vaepp_sdk.runtime.beats import Beat
from vaepp_sdk.spec.classes import LimitsSpec

__all__ = ["PATIENCE", "Pace", "Stall", "stall"]

PATIENCE = 20
"""How many usual steps a rank may take for one: less gives false alarms on a loaded machine."""

_STEPPED = ("denoise", "decode")
"""The stages with steps, each with a limit of its own; the request's limit is that of the others."""


class Pace:
    """How long one rank's steps take in the stage it is in."""

    def __init__(self) -> None:
        self._last: Beat | None = None
        self._times: list[float] = []

    def note(self, beat: Beat) -> None:
        """Look at the rank's heartbeat; steps made between two looks count as equally long."""
        last, self._last = self._last, beat
        if last is None or not _goes_on(last, beat):
            self._times = []
            last = attrs.evolve(beat, step=0, moved=beat.entered)
        if beat.step > last.step:
            insort(self._times, (beat.moved - last.moved) / (beat.step - last.step))

    @property
    def median(self) -> float | None:
        """The usual step in seconds, or None before the first one was made."""
        return self._times[len(self._times) // 2] if self._times else None


def _goes_on(last: Beat, beat: Beat) -> bool:
    """Whether the rank still does what it did; work that is planned anew begins with its first step again."""
    return beat.entered == last.entered and beat.step >= last.step and last.total in (0, beat.total)


@attrs.frozen
class Stall:
    """Nobody has come further for too long.

    Attributes:
        place: the rank that has not for the longest time, by its place among those that were looked at.
        what: one sentence for the user.
    """

    place: int
    what: str


def stall(busy: Sequence[tuple[Beat, Pace]], now: float, limits: LimitsSpec) -> Stall | None:
    """Whether no rank has moved for longer than its stage allows.

    The limit is the stage's setting, or `PATIENCE` usual steps of the slowest rank where that is more. Until
    the first steps are made nobody knows how long they take, and `[limits] load` holds.

    Args:
        busy: the heartbeats of all ranks that work on a request, and their paces.
        now: the time, monotonic seconds.
        limits: the settings.
    """
    stages = {beat.stage for beat, _ in busy}
    if not busy or not stages <= set(_STEPPED):
        return None
    limit, why = max(_limit(stage, busy, limits) for stage in stages)
    moved = [beat.moved for beat, _ in busy]
    if now - max(moved) <= limit:
        return None
    return Stall(moved.index(min(moved)), f"no step for {round(limit, 1):g} s ({why})")


def _limit(stage: str, busy: Sequence[tuple[Beat, Pace]], limits: LimitsSpec) -> tuple[float, str]:
    medians = [pace.median for beat, pace in busy if beat.stage == stage]
    timed = [median for median in medians if median is not None]
    if not timed:
        return limits.load, "[limits] load, which holds until the first step"
    setting: float = getattr(limits, stage)
    if PATIENCE * max(timed) > setting:
        return PATIENCE * max(timed), f"{PATIENCE} times the usual step of {max(timed):.3g} s"
    return setting, f"[limits] {stage}"
