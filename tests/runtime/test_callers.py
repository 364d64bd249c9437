"""What programs around a pool do to it: interrupts, threads, other calls' ends, signals, small limits."""

from __future__ import annotations

import gc
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime.processes import wait_until_gone

from vaepp_sdk.errors import RankError, RunError, VaeppError
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.news import Ended, Event
from vaepp_sdk.runtime.pool import WorkerPool

SLEEP = {"fault": {"kind": "sleep", "rank": 1, "stage": "denoise"}}


def make_job(size: int = 2, **payload: Any) -> Job:
    return Job(world_size=size, target="runtime.stand_ins:Light", payload=payload)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    gc.collect()


def test_an_interrupt_ends_the_ranks_and_the_next_call_says_so(tmp_path: Path) -> None:
    pool = WorkerPool(make_job())
    pool.start()
    interrupt = threading.Timer(0.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(SLEEP)
    assert wait_until_gone(pool.pids(), 0) == []
    with pytest.raises(RunError, match="have ended: KeyboardInterrupt; a new pipeline starts new ones"):
        pool.run({})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_before_the_wait_leaves_no_answer_to_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = WorkerPool(make_job())
    pool.start()
    submit = pool._supervisor.submit

    def interrupted(request: bytes) -> None:
        submit(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._supervisor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run({"number": 1})
    with pytest.raises(RunError, match="have ended"):
        pool.run({"number": 2})


def test_a_call_from_on_event_is_refused_and_a_close_there_ends_the_call() -> None:
    def call(event: Event) -> None:
        calling.run({})

    calling = WorkerPool(make_job(), call)
    calling.start()
    with pytest.raises(RunError, match="a call from inside another call"):
        calling.run({})
    closing = WorkerPool(make_job(), lambda _: closing.close())
    closing.start()
    with pytest.raises(RunError, match="were ended while they worked"):
        closing.run({})


def test_a_close_in_one_thread_ends_the_call_of_another() -> None:
    pool = WorkerPool(make_job())
    pool.start()
    timer = threading.Timer(0.3, pool.close)
    timer.start()
    with pytest.raises(RunError, match="were ended while they worked"):
        pool.run(SLEEP)
    timer.join(10)
    assert not timer.is_alive()
    pool = WorkerPool(make_job())
    pool.start()
    pool.close()
    assert isinstance(pool._supervisor.news.get_nowait(), Ended), "whoever closes leaves it to a call"


def test_threads_take_turns() -> None:
    pool = WorkerPool(make_job())
    pool.start()
    served = list[int]()

    def call(number: int) -> None:
        for _ in range(5):
            served.extend(value["echo"]["number"] == number for value in pool.run({"number": number}).values)

    threads = [threading.Thread(target=call, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert served == [True] * 40


def test_a_caller_that_ignores_the_ends_of_children() -> None:
    """The kernel then reaps the ranks: their exit codes go nowhere, which is no failure."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        pool = WorkerPool(make_job())
        pool.start()
        assert len(pool.run({}).values) == 2
        pool.close()  # a warning would be an error
        pool = WorkerPool(make_job())
        pool.start()
        with pytest.raises(RankError, match="rank 1 failed in stage denoise: its process ended"):
            pool.run({"fault": {"kind": "_exit", "rank": 1, "stage": "denoise"}})
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_caller_with_many_open_files() -> None:
    """Descriptors over 1023 are beyond what `select` can wait for."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed[1] < 2048:
        pytest.skip(f"this process may open {allowed[1]} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, allowed[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        pool = WorkerPool(make_job())
        pool.start()
        assert len(pool.run({}).values) == 2
        pool.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_too_few_open_files_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    """Whichever file is one too many: the pool's, the run folder's, a rank's."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, threads = open_descriptors(), threading.active_count()
    free = 1
    while "Too many open files" in (said := start_with(before + free, allowed)):
        assert said == "the ranks cannot be started: Too many open files; allow more open files (ulimit -n)"
        gc.collect()
        assert (open_descriptors(), threading.active_count()) == (before, threads)
        free += 1
    assert said == "started"
    assert free > 10
    noted = [folder for folder in tmp_path.iterdir() if (folder / "rank0.log").exists()]
    assert list(tmp_path.iterdir()) == noted, "logs that the error names, of ranks that were started"


def start_with(files: int, allowed: tuple[int, int]) -> str:
    """Start and close a pool where only so many files may be open; what came of it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, allowed[1]))
    try:
        pool = WorkerPool(make_job())
        pool.start()
    except VaeppError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    pool.close()
    return "started"
