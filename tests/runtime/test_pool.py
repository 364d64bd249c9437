"""A pool of light ranks: what it gives, and that it ends without a trace."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime.processes import listeners, of_job, talks, wait_until_gone

from vaepp_sdk.errors import (
    OutputError,
    RankError,
    RequestError,
    RunError,
    UnsupportedError,
    VaeppWarning,
)
from vaepp_sdk.events import Progress, StageEnd, StageStart
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.news import Event
from vaepp_sdk.runtime.pool import WorkerPool

LIGHT = "runtime.stand_ins:Light"
JOINED = "runtime.stand_ins:Joined"


def make_pool(target: str = LIGHT, size: int = 2, **payload: Any) -> WorkerPool:
    return WorkerPool(Job(world_size=size, target=target, payload=payload))


@pytest.fixture(autouse=True)
def _own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run folders go where the test can count them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    gc.collect()


def run_folders(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("vaepp-run-*"))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_serves_many_requests_and_leaves_nothing(tmp_path: Path) -> None:
    events: list[Event] = []
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    }
    descriptors = open_descriptors()
    pool = WorkerPool(Job(world_size=3, target=LIGHT, payload={}), events.append)
    pool.start()
    pids = pool.pids()
    for number in range(20):
        answers = pool.run({"number": number, "size": 8 + number % 3})
        assert [value["rank"] for value in answers.values] == [0, 1, 2]
        assert all(value["echo"]["number"] == number for value in answers.values)
        assert [value["pid"] for value in answers.values] == pids
        first = answers.pictures[0]
        assert [picture.size for picture in first] == [
            (8 + number % 3, 8 + number % 3 + index) for index in (0, 1)
        ]
        assert [picture.getpixel((1, 2)) for picture in first] == [(0, 0, 7), (1, 0, 7)]
    assert events[:3] == [
        StageStart(rank=0, world_size=3, stage="encode_prompt", request=0),
        Progress("encode_prompt", 1, 2),
        Progress("encode_prompt", 2, 2),
    ]
    assert sum(isinstance(event, StageEnd) for event in events) == 20 * 4
    assert {os.getsid(pid) for pid in pids} == set(pids), "each rank has a session of its own"
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert len(run_folders(tmp_path)) == 1
    assert run_folders(tmp_path)[0].stat().st_mode & 0o077 == 0, "logs are the user's own"
    pool.close()
    pool.close()
    assert wait_until_gone(pids, 0) == []
    assert run_folders(tmp_path) == []
    assert open_descriptors() == descriptors
    assert not [thread for thread in threading.enumerate() if thread.name == "vaepp-supervisor"]
    with pytest.raises(RunError, match="it was closed"):
        pool.run({})


def test_ten_pools_one_after_the_other_from_a_thread() -> None:
    found: list[int] = []
    held: set[tuple[int, int]] = set()

    def work() -> None:
        for _ in range(10):
            pool = make_pool(size=1)
            pool.start()
            found.extend(pool.pids())
            pool.run({})
            pool.close()
            held.add((open_descriptors(), threading.active_count()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(set(found)) == 10
    assert len(held) == 1, "files and threads stay as many as they are"
    assert wait_until_gone(found, 0) == []


def test_ranks_outlive_the_thread_that_started_them() -> None:
    """The kernel ties a child to the thread that started it, so that thread must be the pool's own."""
    pool = make_pool()
    thread = threading.Thread(target=pool.start)
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert len(pool.run({}).values) == 2
    pool.close()


def test_garbage_collection_ends_the_ranks(tmp_path: Path) -> None:
    pool = make_pool()
    pool.start()
    pids = pool.pids()
    del pool
    gc.collect()
    assert wait_until_gone(pids, 0) == []
    assert run_folders(tmp_path) == []


def test_a_pool_that_never_started_holds_nothing(tmp_path: Path) -> None:
    pool = make_pool()
    pool.close()
    assert run_folders(tmp_path) == []


def test_a_refusal_of_all_ranks_fails_alone() -> None:
    pool = make_pool(size=3)
    pool.start()
    fault = {"kind": "refuse", "rank": "all", "stage": "encode_prompt"}
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"^this size is not served$"):
            pool.run({"fault": fault})
        assert len(pool.run({}).values) == 3
    # Saving exchanges nothing, so a rank that cannot save leaves no other rank waiting.
    with pytest.raises(OutputError, match="exists"):
        pool.run({"fault": {"kind": "cannot save", "rank": 0, "stage": "save"}})
    with pytest.raises(RequestError, match=r"^rank 0 failed in stage save, .* others: no such format"):
        pool.run({"fault": {"kind": "check of a file", "rank": 0, "stage": "save"}})
    assert len(pool.run({}).values) == 3
    pool.close()


def test_a_check_that_fails_on_all_ranks_fails_the_request_alone(tmp_path: Path) -> None:
    pool = make_pool(size=3)
    pool.start()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"in stage denoise, .*: no such size") as caught:
            pool.run({"fault": {"kind": "check", "rank": "all", "stage": "denoise"}})
        assert len(pool.run({}).values) == 3
    (folder,) = run_folders(tmp_path)
    assert caught.value.__notes__ == [f"the logs of all ranks are in {folder}"]
    pool.close()
    assert "RankError: rank 1 failed in stage denoise" in (folder / "rank1.log").read_text()


@pytest.mark.parametrize(("kind", "who"), [("check apart", "all"), ("check", 1)])
@pytest.mark.parametrize("target", [LIGHT, JOINED])
def test_a_check_that_fails_otherwise_ends_the_pool(kind: str, who: Any, target: str) -> None:
    """On one rank, or with other words: nobody knows where the others are."""
    pool = make_pool(target)
    pool.start()
    pids = pool.pids()
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank [01] failed in stage denoise: no such size"):
        pool.run({"fault": {"kind": kind, "rank": who, "stage": "denoise"}})
    assert wait_until_gone(pids, 0) == []
    assert time.monotonic() - started < 10


def test_a_refusal_of_one_rank_ends_the_pool() -> None:
    pool = make_pool(size=2)
    pool.start()
    pids = pool.pids()
    with pytest.raises(UnsupportedError, match="this size"):
        pool.run({"fault": {"kind": "refuse", "rank": 1, "stage": "denoise"}})
    assert wait_until_gone(pids, 0) == []
    with pytest.raises(RunError, match="the ranks have ended: this size is not served"):
        pool.run({})


def test_a_request_that_cannot_be_sent_is_refused_before_it_is() -> None:
    pool = make_pool()
    pool.start()
    with pytest.raises(RunError, match="over the limit"):
        pool.run({"prompt": "x" * (17 * 2**20)})
    assert len(pool.run({"prompt": "x" * 2**20}).values) == 2
    pool.close()


def test_warnings_of_ranks_are_given_once_in_the_caller() -> None:
    pool = make_pool(fault={"kind": "warn", "rank": "all", "stage": "load"})
    with pytest.warns(VaeppWarning, match="a light warning") as found:
        pool.start()
    assert len(found) == 1, "one of two, and none that is not ours"
    pool.run({"fault": {"kind": "warn", "rank": "all", "stage": "decode"}})  # a second one would be an error
    pool.close()


@pytest.mark.parametrize(
    ("kind", "words"), [("_exit 3", "exit code 3"), ("raise", "ValueError: struck on rank 1")]
)
def test_a_bad_end_after_close_is_told(kind: str, words: str, tmp_path: Path) -> None:
    pool = make_pool(fault={"kind": kind, "rank": 1, "stage": "close"})
    pool.start()
    with pytest.warns(VaeppWarning, match=f"rank 1 did not end in good order: .*{words}; the logs"):
        pool.close()
    assert len(run_folders(tmp_path)) == 1


def test_a_rank_that_dies_while_idle_is_told_at_the_next_request() -> None:
    pool = make_pool()
    pool.start()
    pids = pool.pids()
    os.kill(pids[1], signal.SIGKILL)
    assert wait_until_gone(pids, 5) == []
    with pytest.raises(RankError, match=r"rank 1 failed in stage idle: .*SIGKILL"):
        pool.run({})


def test_a_fork_of_the_caller_owns_no_ranks() -> None:
    pool = make_pool()
    pool.start()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            pool.run({})
            code = 1
        except RunError:
            pool.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(pool.run({}).values) == 2
    pool.close()


def test_a_joined_job_is_on_loopback_only() -> None:
    """Rank 0's store and gloo's sockets, those that listen and those that talk; the caller has none left."""
    pool = make_pool(JOINED, size=3)
    pool.start()
    pool.run({})
    assert all(listeners([pid]) for pid in pool.pids()), "each rank's gloo listens"
    mapped = "0000000000000000FFFF00000100007F"  # the same address, as sockets of IPv6 write it
    assert talks(pool.pids()) <= {"0100007F", mapped}
    assert talks([os.getpid()]) == set()
    pool.close()


@pytest.mark.parametrize("end", ["close", "failure"])
def test_children_of_ranks_end_with_them(end: str, tmp_path: Path) -> None:
    """A rank's own helpers, those in sessions of their own and those whose parents are gone included."""
    pool = make_pool(fault={"kind": "helper", "rank": 0, "stage": "load"})
    pool.start()
    pids = pool.pids()
    (folder,) = run_folders(tmp_path)
    limit = time.monotonic() + 10
    while len(of_job(folder)) < 2 + 4:  # the shell has not started its own yet
        assert time.monotonic() < limit
        time.sleep(0.02)
    if end == "close":
        pool.close()
    else:
        with pytest.raises(RankError, match="rank 0 failed"):
            pool.run({"fault": {"kind": "_exit", "rank": 0, "stage": "denoise"}})
    limit = time.monotonic() + 2  # killed; the kernel takes a moment
    while left := of_job(folder):
        assert time.monotonic() < limit, left
        time.sleep(0.02)
    assert wait_until_gone(pids, 2) == []


def test_what_keeps_ranks_alive_whose_work_is_done_is_named(tmp_path: Path) -> None:
    """A thread on rank 0, an exit handler on rank 1."""
    pool = make_pool(fault={"kind": "linger", "rank": "all", "stage": "load"})
    pool.start()
    pids, started = pool.pids(), time.monotonic()
    with pytest.warns(VaeppWarning) as found:
        pool.close()
    assert time.monotonic() - started < 9
    (said,) = (str(one.message) for one in found)
    place = r" \(\S+/stand_ins\.py:\d+ in _wait\) kept rank "
    assert re.match(r"all work is done, but (the thread|an exit handler)", said)
    assert re.search(rf"the thread 'uploader'{place}0 alive", said)
    assert re.search(rf"an exit handler{place}1 alive", said)
    assert said.endswith("; ended after 5 s")
    assert wait_until_gone(pids, 0) == []
    assert run_folders(tmp_path) == []


def test_a_rank_that_does_not_leave_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaepp_sdk.runtime.supervisor._CLOSE_LIMIT", 1.0)
    pool = make_pool(fault={"kind": "hold", "rank": 1, "stage": "close"})
    pool.start()
    with pytest.warns(VaeppWarning, match="rank 1 did not end in good order: it was not done with"):
        pool.close()
    (folder,) = run_folders(tmp_path)
    assert "in _strike" in (folder / "rank1.stacks").read_text()


SCRIPT = """
import sys, time
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.pool import WorkerPool

pool = WorkerPool(Job(world_size=2, target={target!r}, payload={{}}))
pool.start()
print(*pool.pids(), "torch" in sys.modules, flush=True)
{then}
"""


def start_script(target: str, then: str, tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A plain script without a main guard, and its ranks."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(target=target, then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout
    *pids, torch_imported = process.stdout.readline().split()
    assert torch_imported == "False"
    return process, [int(pid) for pid in pids]


def test_the_interpreter_exit_ends_the_ranks(tmp_path: Path) -> None:
    process, pids = start_script(LIGHT, "pool.run({})", tmp_path)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert wait_until_gone(pids, 0) == []
    assert run_folders(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("target", "stage"),
    [(LIGHT, "sleep"), (JOINED, "sleep"), (LIGHT, "hold"), (LIGHT, "idle")],
    ids=["python", "collective", "lock held in C", "idle"],
)
def test_no_rank_outlives_the_parent(number: int, target: str, stage: str, tmp_path: Path) -> None:
    """Ranks in Python code, in a collective, in C code that holds the interpreter's lock, or waiting."""
    fault = {"kind": stage, "rank": 1, "stage": "denoise"}
    then = "time.sleep(3600)" if stage == "idle" else f"pool.run({{'fault': {fault}}})"
    process, pids = start_script(target, then, tmp_path)
    with process:
        time.sleep(0.3)
        os.kill(process.pid, number)
        assert wait_until_gone(pids, 2.5) == []
        process.communicate(timeout=30)
