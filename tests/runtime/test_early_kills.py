"""A parent or a launcher that is killed leaves no rank, however little the rank has done."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.commands import environment, write_spec

from benchmarks.faults import processes_of

MOMENTS = (0.0, 0.01, 0.03, 0.1, 0.3)
"""Seconds from a rank's start to the kill: before the interpreter runs, while it imports, and after."""

POOL = """
from vaepp_sdk.runtime.job import Job
from vaepp_sdk.runtime.pool import WorkerPool

fault = {"kind": "sleep", "rank": "all", "stage": "boot"}
WorkerPool(Job(world_size=2, target="runtime.stand_ins:Light", payload={"fault": fault})).start()
"""

AGENT = """
import os, socket, subprocess, sys, time

store = socket.create_server(("127.0.0.1", 0))
port = str(store.getsockname()[1])
place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
place |= {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_USE_AGENT_STORE": "True"}
subprocess.Popen(sys.argv[1:], env={**os.environ, **place}, start_new_session=True)
time.sleep(3600)
"""
"""What torchrun is to a rank: its parent, with a store that listens as long as it lives."""

SLEEPING_TORCH = "import time; time.sleep(3600)"

SCRIPT = """
import os, signal, sys
import vaepp_sdk.pipeline
from vaepp_sdk import Pipeline

def handlers():
    return [signal.getsignal(number) for number in sorted(signal.valid_signals())]

vaepp_sdk.pipeline._TARGET = "runtime.stand_ins:Painter"
signal.signal(signal.SIGTERM, lambda *_: None)
before = handlers()
pipe = Pipeline.from_spec(sys.argv[1], ["parallel.tensor_parallel_size=1", "vae.vae_use_tiling=true"])
open(os.environ["READY"], "w").write("changed" if handlers() != before else "as before")
pipe()
"""


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.005)
    return True


def left_after_kill(command: list[str], moment: float, tmp_path: Path) -> list[int]:
    """Start a parent, kill it so long after its first rank is there; the ranks that are still there then."""
    mark = uuid.uuid4().hex
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with subprocess.Popen(
        command,
        env=environment(tmp_path, VAEPP_FAULT_RUN=mark, PYTHONPATH=path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as parent:
        started = wait_for(lambda: len(processes_of(mark)) > 1)
        time.sleep(moment)
        parent.kill()
    assert started
    wait_for(lambda: not processes_of(mark), 20)
    return processes_of(mark)


@pytest.mark.parametrize("kind", ["vaepp", "torchrun"])
def test_a_parent_that_is_killed_early(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, "-c", POOL]
    if kind == "torchrun":
        (tmp_path / "torch.py").write_text(SLEEPING_TORCH)
        sizes = ["--set", "parallel.tensor_parallel_size=1", "--quiet"]
        rank = [sys.executable, "-m", "vaepp_sdk.cli", str(write_spec(tmp_path, tiny_model)), *sizes]
        command = [sys.executable, "-c", AGENT, *rank]
    found: dict[float, list[int]] = {}

    def kill(moment: float) -> None:
        found[moment] = left_after_kill(command, moment, tmp_path)

    threads = [threading.Thread(target=kill, args=[moment]) for moment in MOMENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {moment: [] for moment in MOMENTS}


def test_a_script_of_ones_own_ends_with_its_launcher(tmp_path: Path, tiny_model: Path) -> None:
    """Stuck in C with the interpreter's lock held, where no thread of its own could end it."""
    spec, ready, mark = write_spec(tmp_path, tiny_model), tmp_path / "ready", uuid.uuid4().hex
    fault = '{"kind": "hold", "rank": 0, "stage": "denoise"}'
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, sys.executable, "-c", SCRIPT, str(spec)],
        env=environment(tmp_path, VAEPP_FAULT_RUN=mark, READY=str(ready), VAEPP_TEST_FAULT=fault),
    ) as launcher:
        assert wait_for(lambda: ready.exists() and ready.read_text())
        time.sleep(0.5)
        launcher.kill()
    assert ready.read_text() == "as before"
    assert wait_for(lambda: not processes_of(mark), 5)
