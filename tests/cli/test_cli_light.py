"""The command line over stand-in ranks: output, exit codes, signals, faults."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from cli.commands import DRIVER, environment, light, run_folders, write_spec
from runtime.processes import listeners, runs, wait_until_gone, with_variable


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path) -> str:
    return str(write_spec(tmp_path, tiny_model))


def test_a_run_prints_a_table_and_the_files(spec: str, tmp_path: Path) -> None:
    done = light(spec, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "stage    seconds  rank 0 peak MiB  rank 1 peak MiB",
        "denoise     1.50                3                4",
        "decode      1.50                3                4",
        "",
        "/pictures/a red cube.png",
    ]
    # No progress in a pipe; the notice once, whatever the number of ranks.
    assert done.stderr.splitlines() == [
        "vaepp-run: warning: vae_use_tiling is switched on for VAE patch parallelism over 2 ranks."
    ]
    assert run_folders(tmp_path) == []


def test_json_and_overrides(spec: str, tmp_path: Path) -> None:
    arguments = [spec, "--json", "--set", 'call.prompt="a blue cube"', "--set", "call.seed=9"]
    done = light(*arguments, "--set", "parallel.tensor_parallel_size=1", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] == ["/pictures/a blue cube.png"]
    assert found["seed"] == 9
    assert found["stages"][0] == {"stage": "denoise", "seconds": 0.5, "peak_bytes": [3 * 2**20]}
    (notice,) = found["notices"]
    assert "vae_patch_parallel_size" in notice


def test_quiet_prints_the_files_only(spec: str, tmp_path: Path) -> None:
    done = light(spec, "--quiet", "--set", "vae.vae_use_tiling=true", tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "/pictures/a red cube.png\n", "")


def test_nothing_printed_is_obeyed_by_a_terminal(spec: str, tmp_path: Path) -> None:
    done = light(spec, "--set", r'call.prompt="\u001b[2J\u202egone"', tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "/pictures/\\u001b[2J\\u202egone.png" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_a_terminal_sees_progress(spec: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(
        [sys.executable, DRIVER, spec], stdout=subprocess.PIPE, stderr=theirs, env=environment(tmp_path)
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other side has closed
                break
            if not data:
                break
            seen += data
        assert process.wait() == 0
    os.close(ours)
    for stage in (b"encode_prompt", b"denoise", b"decode"):
        assert stage in seen
    assert b"2/2" in seen


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("raise", 1, "denoise"), "rank 1 failed in stage denoise: ValueError: struck on rank 1"),
        (("KILL", 0, "decode"), "rank 0 failed in stage decode: its process was killed by SIGKILL"),
        (("exit", 1, "load"), "rank 1 failed in stage load: SystemExit: 0"),
    ],
)
def test_a_failed_run_is_one_block_and_exit_code_1(
    fault: tuple[str, int, str], message: str, spec: str, tmp_path: Path
) -> None:
    named = dict(zip(("kind", "rank", "stage"), fault, strict=True))
    done = light(spec, tmp_path=tmp_path, fault=named)
    assert done.returncode == 1
    assert done.stdout == ""
    _, first, second = done.stderr.splitlines()
    assert first.startswith(f"vaepp-run: {message}")
    (folder,) = run_folders(tmp_path)
    assert second == f"  the logs of all ranks are in {folder}"


def test_a_refused_request_is_exit_code_2(spec: str, tmp_path: Path) -> None:
    fault = {"kind": "refuse", "rank": "all", "stage": "encode_prompt"}
    done = light(spec, tmp_path=tmp_path, fault=fault)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["vaepp-run: this size is not served"]
    assert run_folders(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_in_good_order(number: int, code: int, spec: str, tmp_path: Path) -> None:
    fault = json.dumps({"kind": "sleep", "rank": 0, "stage": "decode"})
    process = subprocess.Popen(
        [sys.executable, DRIVER, spec],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, VAEPP_TEST_FAULT=fault),
    )
    ranks = children_when_ready(process.pid, 2)
    started = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stdout == ""
    assert "Traceback" not in stderr
    assert wait_until_gone(ranks, 0) == []
    assert time.monotonic() - started < 10
    assert run_folders(tmp_path) == []


def children_when_ready(parent: int, count: int) -> list[int]:
    """The ranks of a command, once there are as many as they should be."""
    path = Path(f"/proc/{parent}/task")
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        found = {int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()}
        if len(found) == count:
            time.sleep(0.5)
            return sorted(found)
        time.sleep(0.05)
    raise AssertionError(f"{parent} has not started {count} ranks")


def torchrun_command(size: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    return [*launcher, "--standalone", DRIVER]


def torchrun(
    spec: str, size: int, tmp_path: Path, *arguments: str, **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*torchrun_command(size), spec, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(tmp_path, PYTHONWARNINGS="ignore", **extra),
        check=False,
    )


def test_under_torchrun_it_joins(spec: str, tmp_path: Path) -> None:
    done = torchrun(spec, 2, tmp_path, "--json", "--set", "vae.vae_use_tiling=true")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one object: only rank 0 prints
    assert found["files"] == ["/pictures/a red cube.png"]
    assert found["stages"][0]["peak_bytes"] == [3 * 2**20, 4 * 2**20], "the table knows every rank"
    assert run_folders(tmp_path) == [], "nothing was started"


def test_under_torchrun_another_size_is_refused(spec: str, tmp_path: Path) -> None:
    done = torchrun(spec, 2, tmp_path, "--set", "parallel.tensor_parallel_size=1")
    assert done.returncode != 0
    assert "its sizes make 1 ranks and the launcher started 2 (WORLD_SIZE)" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert done.stderr.count("vaepp-run: ") == 1, "two ranks, one voice"


def voices(stderr: str) -> int:
    """How often ranks have said something that is no warning."""
    return len(re.findall(r"^vaepp-run: (?!(?:rank \d+: )?warning)", stderr, re.MULTILINE))


def test_under_torchrun_the_others_name_a_rank_that_is_stuck(spec: str, tmp_path: Path) -> None:
    fault = json.dumps({"kind": "sleep", "rank": 1, "stage": "decode"})
    done = torchrun(spec, 2, tmp_path, "--set", "limits.exchange=4", "--quiet", VAEPP_TEST_FAULT=fault)
    assert done.returncode != 0
    assert (
        "vaepp-run: rank 0 waited for rank 1 (stage decode): a rank or a node is gone or stuck" in done.stderr
    )
    assert voices(done.stderr) == 1


def test_under_torchrun_a_rank_that_does_not_come_further_says_so(spec: str, tmp_path: Path) -> None:
    fault = json.dumps({"kind": "sleep", "rank": 1, "stage": "decode"})
    done = torchrun(spec, 2, tmp_path, "--set", "limits.decode=2", "--quiet", VAEPP_TEST_FAULT=fault)
    assert done.returncode != 0
    words = "rank 1 failed in stage decode: it runs and does not come further at step 2 of 2; no step for 2 s"
    assert f"vaepp-run: {words} ([limits] decode)" in done.stderr
    assert voices(done.stderr) == 1


def kept_latents(folder: Path) -> Path:
    """A folder that holds latents, as far as names go."""
    run = folder / "run-4"
    run.mkdir()
    (run / "latents-0000.safetensors").touch()
    return run


def test_under_torchrun_a_killed_rank_leaves_the_command_that_goes_on(spec: str, tmp_path: Path) -> None:
    """The launcher ends the other rank, which says what to do, whether it found the loss first or not."""
    run = kept_latents(tmp_path)
    fault = json.dumps({"kind": "KILL", "rank": 1, "stage": "decode", "kept": str(run)})
    done = torchrun(spec, 2, tmp_path, "--quiet", VAEPP_TEST_FAULT=fault)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert f"\n  the latents are kept; go on from them with: vaepp-run --resume {run}\n" in done.stderr


def test_a_signal_after_denoise_leaves_the_command_that_goes_on(spec: str, tmp_path: Path) -> None:
    run = kept_latents(tmp_path)
    fault = json.dumps({"kind": "sleep", "rank": 1, "stage": "decode", "kept": str(run)})
    with subprocess.Popen(
        [sys.executable, DRIVER, spec, "--quiet", "--set", "vae.vae_use_tiling=true"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, VAEPP_TEST_FAULT=fault),
    ) as process:
        limit = time.monotonic() + 60
        while not (run / "reached-0").exists():
            assert time.monotonic() < limit
            time.sleep(0.05)
        time.sleep(0.5)  # the parent hears of it
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr.splitlines() == [
        "vaepp-run: ended by SIGTERM",
        f"  the latents are kept; go on from them with: vaepp-run --resume {run}",
    ]


SLOW_TORCH = """
import os, time
from pathlib import Path
Path(os.environ["IMPORTS"]).write_text(str(os.getpid()))
time.sleep(3600)
"""


def test_a_launcher_that_is_killed_while_its_ranks_import(spec: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    mark = tmp_path / "imports"
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    path = os.pathsep.join([str(tmp_path), *sys.path])
    sizes = ["--set", "parallel.tensor_parallel_size=1", "--quiet"]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, sys.executable, "-m", "vaepp_sdk.cli", spec, *sizes],
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path, PYTHONPATH=path, IMPORTS=str(mark), **place),
    ) as launcher:
        limit = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()):
            assert time.monotonic() < limit
            time.sleep(0.05)
        launcher.kill()
    rank, limit = int(mark.read_text()), time.monotonic() + 5
    while runs(rank):
        assert time.monotonic() < limit
        time.sleep(0.02)


LAUNCHER = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


def test_a_launcher_that_is_gone_before_the_kernel_is_asked() -> None:
    script = """
import os
from vaepp_sdk.runtime.inplace import end_with_launcher
os.getppid = iter([7, 1]).__next__
end_with_launcher()
print("lives")
"""
    place = {**os.environ, "TORCHELASTIC_RUN_ID": "one"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, env=place)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_launcher_that_is_killed_takes_its_ranks_along(spec: str, tmp_path: Path) -> None:
    fault = json.dumps({"kind": "hold", "rank": 1, "stage": "denoise"})
    launcher = subprocess.Popen(
        [*torchrun_command(2), spec, "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path, VAEPP_TEST_FAULT=fault),
    )
    try:
        ranks = children_when_ready(launcher.pid, 2)
        assert all(runs(pid) for pid in ranks)
        joined = time.monotonic() + 60
        while not (found := listeners(ranks)) and time.monotonic() < joined:
            time.sleep(0.1)
        assert found == {"0100007F"}, "gloo's; torchrun's own store is torchrun's"
        time.sleep(5)  # rank 1 is in C, rank 0 waits for it
    finally:
        launcher.kill()
        launcher.wait()
    limit = time.monotonic() + 5
    while left := [pid for pid in ranks if runs(pid)]:
        assert time.monotonic() < limit, left
        time.sleep(0.02)


PLACE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
ONE = ("--set", "parallel.tensor_parallel_size=1", "--set", "parallel.vae_patch_parallel_size=1", "--quiet")


def test_a_plugins_thread_does_not_keep_vaepp_run_alive(spec: str, tmp_path: Path) -> None:
    fault = {"kind": "linger", "rank": 0, "stage": "load"}
    done = light(spec, *ONE, tmp_path=tmp_path, fault=fault, **PLACE)
    assert (done.returncode, done.stdout) == (0, "/pictures/a red cube.png\n")
    assert re.fullmatch(
        r"vaepp-run: rank 0: warning: the run is over, but the thread 'uploader' \(\S+ in _wait\) "
        r"kept vaepp-run alive; ended after 5 s\n",
        done.stderr,
    )


def test_under_a_launcher_children_of_plugins_end_with_their_rank(spec: str, tmp_path: Path) -> None:
    """In sessions of their own too, where they hold our streams, and whoever reads those waits for them."""
    fault = {"kind": "helper", "rank": 0, "stage": "load"}
    run = f"VAEPP_TEST_RUN={tmp_path}"
    done = light(spec, *ONE, tmp_path=tmp_path, fault=fault, **PLACE, VAEPP_TEST_RUN=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert with_variable(run) == []


def test_half_a_launcher_is_refused(spec: str, tmp_path: Path) -> None:
    done = light(spec, tmp_path=tmp_path, RANK="0")
    assert done.returncode == 2
    assert "the environment sets RANK" in done.stderr
    assert "WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in done.stderr
    assert done.stdout == ""
