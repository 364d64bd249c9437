"""Ranks that a launcher started: they agree, fail alike, and stay together after a refusal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from vaepp_sdk.errors import PeerError, RunError, UnsupportedError, VaeppError
from vaepp_sdk.runtime.board import Board
from vaepp_sdk.runtime.inplace import Launch
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.joined import JoinedRank
from vaepp_sdk.runtime.news import Event
from vaepp_sdk.runtime.work import Answer
from vaepp_sdk.testing import RankFailedError, run_ranks

ALIKE = "the request failed in stage denoise, and the ranks are ready for others"


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except VaeppError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def joined(rank: int, size: int, events: list[Event] | None = None) -> JoinedRank:
    job = Job(world_size=size, target="runtime.stand_ins:Joined", payload={})
    launch = Launch(rank=rank, world_size=size, local_rank=rank, local_size=size)
    return JoinedRank(job, launch, (events if events is not None else []).append)


def _many_requests(rank: int) -> list[Any]:
    events: list[Event] = []
    engine = joined(rank, 2, events)
    engine.start()
    first = engine.run({"seed": 10 + rank, "steps": 1})  # ranks that drew other seeds take rank 0's
    refused = {"fault": {"kind": "refuse", "rank": "all", "stage": "encode_prompt"}, "seed": 0}
    failed = {"fault": {"kind": "check", "rank": "all", "stage": "denoise"}, "seed": 0}
    found = [
        [value["echo"]["seed"] for value in first.values],
        len(first.pictures),
        error_of(lambda: engine.run(refused)),
        error_of(lambda: engine.run(failed)),
        error_of(lambda: engine.run({"seed": 0, "size": 4 + rank})),
        [value["rank"] for value in engine.run({"seed": 0}).values],
        len(events) > 0,
    ]
    engine._work = None  # the group belongs to the test
    return [*found, error_of(lambda: engine.run({}))]


def test_ranks_agree_and_stay_together() -> None:
    for rank, found in enumerate(run_ranks(2, _many_requests)):
        assert found == [
            [10, 10],
            1,
            "UnsupportedError: this size is not served",
            f"RequestError: {ALIKE}: no such size",
            "AgreementError: rank 0 and ranks [1] were asked for different pictures",
            [0, 1],
            rank == 0,
            "RunError: this rank has left its job",
        ]


def _one_fails(rank: int) -> str:
    engine = joined(rank, 2)
    engine.start()
    engine._work.exchange = lambda: None  # type: ignore[union-attr]  # nobody waits inside
    return error_of(lambda: engine.run({"fault": {"kind": "raise", "rank": 1, "stage": "save"}}))


def test_the_failure_of_one_rank_is_raised_by_all() -> None:
    assert (
        run_ranks(2, _one_fails)
        == ["RankError: rank 1 failed in stage save: ValueError: struck on rank 1"] * 2
    )


def _missed(rank: int) -> str:
    board = Board(rank, 2)
    board.post("one", {})
    assert set(board.read("one", 10)) == {0, 1}
    if rank == 1:
        return ""
    return error_of(lambda: board.gather("two", {}, 0.3))


def test_a_rank_that_does_not_come_is_named() -> None:
    found = run_ranks(2, _missed)
    assert found[0] == "PeerError: rank 0 waited for rank 1 (two): they have not come this far in time"


def test_a_single_rank_needs_no_group() -> None:
    engine = joined(0, 1)
    engine.start()
    for seed in range(4):
        assert engine.run({"seed": seed}).values[0]["echo"]["seed"] == seed
    fault = {"kind": "refuse", "rank": 0, "stage": "decode"}
    with pytest.raises(UnsupportedError, match="not served"):
        engine.run({"fault": fault})
    engine.close()
    engine.close()
    with pytest.raises(RunError, match="left"):
        engine.run({})


def started(rank: int, run: Callable[[Mapping[str, Any]], Answer]) -> JoinedRank:
    """One of two ranks, loaded, that does this for a request."""
    engine = joined(rank, 2)
    engine.start()
    assert engine._work is not None
    engine._work.run = run  # type: ignore[assignment, method-assign]
    return engine


def _stuck_where_no_limit_is_near(rank: int) -> None:
    def fail(request: Mapping[str, Any]) -> Answer:
        raise ValueError("struck")

    def sleep(request: Mapping[str, Any]) -> Answer:
        threading.Event().wait()
        raise AssertionError

    engine = started(rank, sleep if rank == 1 else fail)
    error_of(lambda: engine.run({"seed": 0}))
    time.sleep(60)  # keeps the store, and rank 1 from being ended by whoever started both


def test_a_rank_that_is_stuck_when_the_job_is_over_ends_itself() -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 died without a word"):
        run_ranks(2, _stuck_where_no_limit_is_near)
    assert time.monotonic() - begun < 50  # before rank 0 leaves


def _nobody_comes_to_a_gate(rank: int) -> str:
    def wait(request: Mapping[str, Any]) -> Answer:
        raise PeerError(0, [1], "before decoding", "not there after 9 s")

    engine = started(rank, wait)
    if rank == 0:
        return error_of(lambda: engine.run({"seed": 0}))
    engine._board.post("request 1", {"seed": 0})
    time.sleep(6)  # longer than rank 0 listens, and with a pulse
    return ""


def test_a_rank_that_was_waited_for_in_vain_is_named_with_stage_and_gate() -> None:
    assert run_ranks(2, _nobody_comes_to_a_gate)[0] == (
        "PeerError: rank 0 waited for rank 1 (stage request, before decoding): not there after 9 s; it is "
        "gone or stuck, which its launcher may explain"
    )
