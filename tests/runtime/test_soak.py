"""A short form of `make soak`, and what it would say of a leak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.soak import SIZES, growths

ROOT = Path(__file__).resolve().parents[2]


def test_twenty_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """Real requests of all sizes, four rounds of them, by one pool of two ranks."""
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.soak", "--requests", "20", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 requests, and nothing grew" in done.stdout
    held = json.loads(out.read_text())["requests"][-1]["held"]
    assert [one["rank"] for one in held] == [-1, 0, 1]
    assert [one["groups"] for one in held] == [0, 1, 1], "the DiT group, and none beside it"


def _requests(count: int, **grown: int) -> list[dict[str, Any]]:
    """What a soak of one rank finds where some counts grow from the middle on."""
    flat = {"rank": 0, "resident": 1 << 28, "files": 20, "threads": 3, "groups": 1}
    found = []
    for number in range(count):
        more = {name: by for name, by in grown.items() if number >= count // 2}
        held = {name: value + more.get(name, 0) for name, value in flat.items()}
        found.append({"seconds": 0.1, "shared": more.get("shared", 0), "held": [held]})
    return found


def test_what_grows_is_named() -> None:
    count = 4 * len(SIZES)
    assert growths(_requests(count)) == []
    assert growths(_requests(count, files=1, threads=2)) == [
        "rank 0: files: 20 to 21",
        "rank 0: threads: 3 to 5",
    ]
    assert growths(_requests(count, shared=1, groups=1)) == [
        "files in shared memory: 0 to 1",
        "rank 0: groups: 1 to 2",
    ]
    assert growths(_requests(count, resident=1 << 24)) == ["rank 0: resident memory: 256 MiB to 272 MiB"]
