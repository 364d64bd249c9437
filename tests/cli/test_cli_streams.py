"""`vaepp-run` with standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli.commands import DRIVER, environment, write_spec


def redirected(where: str, tmp_path: Path, *arguments: str, **extra: str) -> Any:
    """Run with a shell's redirections."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, DRIVER, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(tmp_path, **extra),
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_cannot_be_printed(unbuffered: str, tmp_path: Path) -> None:
    done = redirected(">/dev/full", tmp_path, "--schema", PYTHONUNBUFFERED=unbuffered)
    said = "vaepp-run: the results cannot be printed: No space left on device; what was saved stays\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_words_that_cannot_be_said_change_no_exit_code(tmp_path: Path) -> None:
    done = redirected("2>/dev/full", tmp_path, str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("where", "printed"), [("<&- >&- 2>&-", ""), ("2>/dev/full", "/pictures/a red cube.png\n")]
)
def test_a_run_that_nobody_hears(where: str, printed: str, tiny_model: Path, tmp_path: Path) -> None:
    """Sockets of ranks do not take the numbers of closed streams, and a warning harms nothing."""
    done = redirected(where, tmp_path, str(write_spec(tmp_path, tiny_model)), "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")
