"""A process that dies while it saves leaves the old file or the whole new one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SAVER = str(Path(__file__).with_name("saver.py"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("saver")
    command = [sys.executable, SAVER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("what", "before"), [("replace", "old"), ("new", "none")])
def test_a_kill_at_any_of_twenty_points(found: Any, what: str, before: str) -> None:
    states = found[what]
    assert len(states) == 20
    assert set(states) == {before, "new"}, "never a part of a picture; some kills come late enough"
    assert states == sorted(states, key=[before, "new"].index), "once there, it stays"


def test_a_disk_that_refuses_leaves_the_old_file(found: Any) -> None:
    """The kernel's own refusal in the middle of writing, as of a full disk."""
    assert found["refused"]["code"] == 2
    assert found["refused"]["state"] == "old"
    assert found["refused"]["left"] == ["0000-a-seed1.png"]
    assert "cannot write" in found["refused"]["said"]
    assert "File too large" in found["refused"]["said"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A real one, of 64 KiB, in a mount namespace of its own."""
    inside = f"mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} {SAVER} {tmp_path} full"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    assert found["state"] == "old"
    assert found["left"] == ["0000-a-seed1.png"]
    assert "No space left on device" in found["said"]
