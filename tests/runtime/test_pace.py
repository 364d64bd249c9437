"""When steps have stopped: the rule with invented heartbeats, and the watchdog of a rank without a parent."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from vaepp_sdk.pipeline import _limits
from vaepp_sdk.runtime.beats import Beat
from vaepp_sdk.runtime.pace import PATIENCE, Pace, Stall, stall
from vaepp_sdk.runtime.stacks import frames_of
from vaepp_sdk.runtime.watchdog import GIVEN_UP, Watchdog
from vaepp_sdk.spec import LimitsSpec, PipelineSpec

LIMITS = LimitsSpec(load=1000, denoise=60, decode=120)


def beat(step: int, moved: float, total: int = 9, stage: str = "denoise", entered: float = 0) -> Beat:
    return Beat(moved, entered, moved, step, total if step else 0, False, stage)


def paced(*looks: Beat) -> tuple[Beat, Pace]:
    """A rank after some looks at it."""
    pace = Pace()
    for look in looks:
        pace.note(look)
    return looks[-1], pace


def median(*looks: Beat) -> float | None:
    return paced(*looks)[1].median


def test_a_pace_is_the_median_of_the_steps_in_this_stage() -> None:
    assert median(beat(0, 0)) is None
    assert median(beat(0, 0), beat(1, 5)) == 5
    assert median(beat(1, 5)) == 5, "the first look may come after the first step"
    assert median(beat(0, 0), beat(1, 300), beat(2, 302), beat(3, 305)) == 3
    assert median(beat(1, 4), beat(5, 12)) == 4, "one look for four steps of 2 s counts once"
    assert median(beat(1, 4), beat(1, 4), beat(1, 4)) == 4


@pytest.mark.parametrize(
    "again",
    [
        beat(1, 110, entered=100),  # the same stage of the next request
        beat(1, 110, stage="decode", entered=100),
        beat(1, 110, total=4, entered=100),
    ],
)
def test_a_stage_entered_anew_is_timed_anew(again: Beat) -> None:
    assert median(beat(1, 1), beat(2, 2), again) == 10


def test_work_that_is_planned_anew_is_timed_anew() -> None:
    """A rank that steps down to a lighter plan begins with its first piece again, in the same stage."""
    assert median(beat(1, 50), beat(2, 51), beat(1, 60)) == 60
    assert median(beat(1, 50), beat(2, 51), beat(3, 75, total=40)) == 25


FAST = paced(beat(1, 1), beat(2, 2))
SLOW = paced(beat(1, 20), beat(2, 40))
NEW = paced(beat(0, 1))


@pytest.mark.parametrize(
    ("busy", "limit", "why"),
    [
        ([FAST], 60, "[limits] denoise"),
        ([FAST, NEW], 60, "[limits] denoise"),  # one rank's steps are enough
        ([SLOW, FAST], PATIENCE * 20, "20 times the usual step of 20 s"),  # the slowest rank's count
        ([NEW, NEW], 1000, "[limits] load, which holds until the first step"),
        ([paced(beat(1, 2, stage="decode"))], 120, "[limits] decode"),
        ([paced(beat(1, 2, stage="decode")), FAST], 120, "[limits] decode"),
    ],
)
def test_the_limit_is_the_setting_or_twenty_usual_steps(
    busy: Sequence[tuple[Beat, Pace]], limit: float, why: str
) -> None:
    last = max(beat.moved for beat, _ in busy)
    moved = [beat.moved for beat, _ in busy]
    assert stall(busy, last + limit, LIMITS) is None
    assert stall(busy, last + limit + 0.1, LIMITS) == Stall(
        moved.index(min(moved)), f"no step for {limit} s ({why})"
    )


def test_one_rank_that_moves_is_enough() -> None:
    waits, works = paced(beat(1, 1), beat(2, 2)), paced(beat(1, 1), beat(90, 89, total=200))
    assert stall([waits, works], 140, LIMITS) is None
    assert stall([waits], 140, LIMITS) is not None


@pytest.mark.parametrize("stage", ["encode_prompt", "save", "request", "idle", "call"])
def test_stages_without_steps_have_the_requests_limit_only(stage: str) -> None:
    assert stall([paced(beat(1, 1, stage=stage))], 10**6, LIMITS) is None
    assert stall([paced(beat(1, 1, stage=stage)), FAST], 10**6, LIMITS) is None
    assert stall([], 10**6, LIMITS) is None


def test_later_steps_may_compile_too() -> None:
    def denoise(**tables: Any) -> float:
        return _limits(PipelineSpec.load({"model": {"id": "a/b"}, **tables}, ["limits.exchange=500"])).denoise

    assert denoise() == 60
    assert denoise(model={"id": "a/b", "compile": "inductor"}) == 500
    assert denoise(model={"id": "a/b", "compile": "inductor"}, limits={"denoise": 90}) == 90


def test_a_watchdog_tells_of_its_own_thread_only() -> None:
    told: list[str] = []
    heard = threading.Event()

    def hear(what: str) -> None:
        told.append(what)
        heard.set()

    dog = Watchdog(LimitsSpec(denoise=0.1), hear)
    dog.enter("denoise")
    with dog.watching(str):  # `str()` is empty: the job is not over
        dog.step(3, 8)
        assert heard.wait(30)
    assert len(told) == 1
    assert told[0].startswith("it runs and does not come further at step 3 of 8; no step for 0.")
    with dog.watching(str):
        dog.enter("save")
        time.sleep(0.6)
    assert len(told) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "vaepp-watchdog"]


def test_a_rank_whose_job_is_over_has_time_to_see_it_itself() -> None:
    told: list[tuple[float, str]] = []
    heard = threading.Event()

    def hear(what: str) -> None:
        told.append((time.monotonic(), what))
        heard.set()

    dog = Watchdog(LimitsSpec(), hear)
    dog.enter("decode")
    begun = time.monotonic()
    with dog.watching(lambda: "rank 1 has failed"):
        time.sleep(3)
        dog.step(1, 4)  # it comes further, and may yet come to where it learns of it
        moved = time.monotonic()
        assert heard.wait(30)
    [(at, what)] = told
    assert moved - begun >= 3
    assert at - moved > GIVEN_UP
    assert re.match(
        r"it runs and does not come further at step 1 of 4; no step for [678]\.\d s, and rank 1 has failed",
        what,
    )


def test_where_a_thread_of_this_process_stands() -> None:
    over = threading.Event()

    def waits_here(depth: int) -> None:
        if depth:
            waits_here(depth - 1)
        else:
            over.wait()

    thread = threading.Thread(target=waits_here, args=[20])
    thread.start()
    while not any("waits_here" in line for line in frames_of(thread.ident or 0)):
        time.sleep(0.01)
    found = frames_of(thread.ident or 0)
    over.set()
    thread.join()
    assert found[0].startswith("in wait, ")
    assert f"in waits_here, {__file__}, line " in found[-1]
    assert len(found) == 8
    assert frames_of(thread.ident or 0) == []
