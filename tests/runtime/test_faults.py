"""Faults in one rank: the job ends in seconds, names rank, stage and cause, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from runtime.processes import wait_until_gone

from vaepp_sdk.errors import RankError, UnsupportedError, VaeppError
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.pool import WorkerPool
from vaepp_sdk.spec import LimitsSpec

LIGHT = "runtime.stand_ins:Light"
JOINED = "runtime.stand_ins:Joined"

CRASHES = {
    "raise": r"ValueError: struck on rank 1$",
    "exit": r"SystemExit: 0",
    "_exit": r"its process ended early with exit code 0",
    "_exit 3": r"its process ended early with exit code 3",
    "KILL": r"its process was killed by SIGKILL \(the system kills so when memory runs out\)",
    "SEGV": r"killed by SIGSEGV; its last words: Segmentation fault at .*stand_ins\.py:\d+ in _strike",
}


@pytest.fixture(autouse=True)
def _own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def fail(target: str, fault: dict[str, Any], limits: LimitsSpec, size: int = 3) -> tuple[VaeppError, float]:
    """Run a job into a fault; returns the error and the seconds from the fault's stage on."""
    in_request = fault["stage"] not in ("boot", "load")
    payload = {} if in_request else {"fault": fault}
    pool = WorkerPool(Job(world_size=size, target=target, payload=payload, limits=limits))
    if in_request:
        pool.start()
    started = time.monotonic()
    with pytest.raises(VaeppError) as caught:
        pool.run({"fault": fault}) if in_request else pool.start()
    seconds = time.monotonic() - started
    assert wait_until_gone(pool.pids(), 0) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "vaepp-supervisor"]
    return caught.value, seconds


def check(error: VaeppError, rank: int, stage: str, cause: str, tmp_path: Path) -> None:
    assert isinstance(error, RankError), repr(error)
    assert (error.rank, error.stage) == (rank, stage)
    assert re.search(cause, error.cause), error.cause
    (folder,) = tmp_path.glob("vaepp-run-*")
    assert error.__notes__ == [f"the logs of all ranks are in {folder}"]
    assert "\n" not in error.cause


@pytest.mark.parametrize("stage", ["boot", "load", "denoise", "save"])
@pytest.mark.parametrize("kind", CRASHES)
def test_a_crash(kind: str, stage: str, tmp_path: Path) -> None:
    error, seconds = fail(LIGHT, {"kind": kind, "rank": 1, "stage": stage}, LimitsSpec())
    check(error, 1, stage, CRASHES[kind], tmp_path)
    assert seconds < 10  # 0.5 s for evidence and the ends of processes; the rest is this machine's load


@pytest.mark.parametrize("kind", ["raise", "_exit", "KILL"])
def test_a_crash_while_peers_wait_in_a_collective(kind: str, tmp_path: Path) -> None:
    """The peers fail too, when their connections close; the first cause is named."""
    error, seconds = fail(JOINED, {"kind": kind, "rank": 1, "stage": "decode"}, LimitsSpec())
    check(error, 1, "decode", CRASHES[kind], tmp_path)
    assert seconds < 10


@pytest.mark.parametrize(
    ("kind", "how"),
    [("sleep", "it runs and does not come further"), ("STOP", "its process does not run")],
)
@pytest.mark.parametrize("stage", ["load", "decode"])
def test_a_rank_that_hangs_while_peers_wait(kind: str, how: str, stage: str, tmp_path: Path) -> None:
    """The peers wait inside a collective; their stacks tell them from the one they wait for."""
    limits = LimitsSpec(load=4.0, request=4.0)
    error, seconds = fail(JOINED, {"kind": kind, "rank": 1, "stage": stage}, limits)
    phase = "load" if stage == "load" else "request"
    check(error, 1, stage, rf"{how}.*\(\[limits\] {phase}\)", tmp_path)
    assert "4 s" in error.cause if isinstance(error, RankError) else False
    # Loading starts with the process; a request's clock starts with the request: limit + 3 s, and load.
    assert seconds < (100 if stage == "load" else 12)


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_rank_that_hangs_between_steps_is_found_by_the_stages_limit(stage: str, tmp_path: Path) -> None:
    limits = LimitsSpec(**{stage: 2.0})
    error, seconds = fail(JOINED, {"kind": "sleep", "rank": 1, "stage": stage}, limits, size=2)
    cause = rf"it runs and does not come further at step 2 of 2; no step for 2 s \(\[limits\] {stage}\)"
    check(error, 1, stage, cause, tmp_path)
    assert seconds < 15  # the other limits are ten minutes and more


def test_a_peer_that_times_out_is_not_blamed(tmp_path: Path) -> None:
    """The limit of one exchange ends it on a peer first; the rank that hangs is named all the same."""
    limits = LimitsSpec(exchange=4.0)
    error, _ = fail(JOINED, {"kind": "sleep", "rank": 1, "stage": "decode"}, limits)
    check(error, 1, "decode", "it runs and does not come further", tmp_path)


def test_a_stopped_process_is_found_by_its_heartbeat(tmp_path: Path) -> None:
    limits = LimitsSpec(exchange=3.0)
    error, seconds = fail(LIGHT, {"kind": "STOP", "rank": 1, "stage": "denoise"}, limits)
    check(error, 1, "denoise", r"does not run .*no heartbeat for 3 s", tmp_path)
    assert seconds < 10


def test_a_mistake_found_while_loading_is_the_users(tmp_path: Path) -> None:
    error, _ = fail(LIGHT, {"kind": "refuse", "rank": "all", "stage": "load"}, LimitsSpec())
    assert isinstance(error, UnsupportedError)
    assert str(error) == "this size is not served"
    assert list(tmp_path.glob("vaepp-run-*")) == [], "nothing in the logs would help"


def test_a_kill_before_the_rank_has_said_a_word(tmp_path: Path) -> None:
    pool = WorkerPool(
        Job(world_size=2, target=LIGHT, payload={"fault": {"kind": "sleep", "rank": 0, "stage": "boot"}})
    )
    timer = threading.Timer(0.5, lambda: os.kill(pool.pids()[1], signal.SIGKILL))
    timer.start()
    with pytest.raises(RankError, match=r"rank 1 failed in stage (boot|load|idle|start): .*SIGKILL"):
        pool.start()
    assert wait_until_gone(pool.pids(), 0) == []


def test_an_unknown_target_is_named(tmp_path: Path) -> None:
    pool = WorkerPool(Job(world_size=1, target="runtime.stand_ins:Nobody", payload={}))
    with pytest.raises(VaeppError, match=r"cannot import runtime\.stand_ins:Nobody"):
        pool.start()


def test_the_log_holds_the_traceback_and_the_prints(tmp_path: Path) -> None:
    fail(LIGHT, {"kind": "raise", "rank": 1, "stage": "denoise"}, LimitsSpec())
    (folder,) = tmp_path.glob("vaepp-run-*")
    log = (folder / "rank1.log").read_text()
    assert "Traceback" in log
    assert "struck on rank 1\nwith a second line" in log
    assert (folder / "rank1.error.json").exists()
    assert not list(folder.glob("*.partial"))


def test_the_same_cause_every_time(tmp_path: Path) -> None:
    """Peers that lose their connection race with the rank that failed; it is named in each of many runs."""
    for rank, kind in ((0, "raise"), (1, "KILL"), (0, "KILL"), (1, "raise")):
        error, _ = fail(JOINED, {"kind": kind, "rank": rank, "stage": "decode"}, LimitsSpec(), size=2)
        assert isinstance(error, RankError)
        assert (error.rank, error.stage) == (rank, "decode")
