"""Fault injection on real runs: `make faults`, or `python -m benchmarks.faults`.

Each row is one `vaepp-run` of a small Z-Image checkpoint, into one rank of which a plugin injects a fault, or
whose launcher gets a signal while a rank hangs. Exits with 1 where a row misses a goal: the right rank and
stage named, a crash within 2 s and a hang within its limit and 3 s, at most 25 lines on stderr, no process
left 2 s later, what was saved before untouched.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from vaepp_plugins.tiny_z_image import build

from benchmarks.fault_plugin import BETWEEN_STEPS, CRASHES, HANGS
from benchmarks.plugging import announce
from benchmarks.report import environment, write

STAGES = ("load", "encode_prompt", "denoise", "decode", "save")
SIGNALS = ("KILL", "TERM", "INT", "HUP")
LIMITS = {"load": 60.0, "denoise": 5.0, "request": 10.0, "exchange": 10.0}
CRASH_SECONDS, SLACK_SECONDS, MOST_LINES = 2.0, 3.0, 25
_LONGEST = 300.0
"""How long a run may take from its start, in seconds."""

RESULTS = Path(__file__).resolve().parent / "results"

SPEC = """
[model]
id = {model}
dtype = "float32"
device = "cpu"

[parallel]
tensor_parallel_size = {ranks}
vae_patch_parallel_size = {ranks}

[vae]
on_oom = "fail"

[limits]
{limits}

[call]
prompt = "a red cube"
height = 128
width = 96
num_inference_steps = 2
max_sequence_length = 64
seed = 5
"""


@attrs.frozen(kw_only=True)
class Row:
    """What came of one fault.

    Attributes:
        fault: what was injected, or the signal that the launcher got.
        stage: where.
        rank: which rank; of `ranks`.
        seconds: from the fault to the end of the launcher.
        code: its exit code.
        named: the rank and the stage that it named.
        lines: lines on stderr.
        left: processes left 2 s later.
        misses: the goals missed.
    """

    fault: str
    stage: str
    rank: int
    ranks: int
    seconds: float
    code: int
    named: str
    lines: int
    left: int
    misses: tuple[str, ...]


@attrs.define
class Bench:
    """Where runs happen: a folder with the model, the plugin's metadata, and one good output.

    Attributes:
        folder: the folder.
        limits: the `[limits]` of the runs.
        path: the `PYTHONPATH` of the runs.
    """

    folder: Path
    limits: Mapping[str, float] = attrs.field(factory=LIMITS.copy)
    path: str = attrs.field(default="", init=False)

    def prepare(self) -> None:
        """Build the checkpoint, announce the plugin, and make a picture that no fault may touch."""
        build(self.folder / "model")
        self.path = announce("fault_injection", "benchmarks.fault_plugin", self.folder)
        done = subprocess.run(self.command(2), env=self.environment({}), capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"a run without any fault failed:\n{done.stderr.decode()}")

    def command(self, ranks: int) -> list[str]:
        """A run on so many ranks."""
        spec = self.folder / f"on{ranks}.toml"
        limits = "\n".join(f"{name} = {value}" for name, value in self.limits.items())
        spec.write_text(
            SPEC.format(model=json.dumps(str(self.folder / "model")), ranks=ranks, limits=limits),
            encoding="utf-8",
        )
        return [sys.executable, "-m", "vaepp_sdk.cli", str(spec), "--quiet"]

    def environment(self, fault: Mapping[str, Any], **extra: str) -> dict[str, str]:
        """The environment of a run."""
        return {
            **os.environ,
            "TQDM_DISABLE": "1",
            "PYTHONPATH": self.path,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder),
            "VAEPP_FAULT": json.dumps(fault),
            **extra,
        }

    def digests(self) -> dict[str, str]:
        """The pictures saved so far."""
        pictures = sorted((self.folder / "out").glob("*.png"))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures}

    def run(self, fault: str, stage: str, rank: int, ranks: int, launcher: str = "") -> Row:
        """One run into one fault; with `launcher`, a signal for the launcher once the fault is there."""
        before, run = self.digests(), uuid.uuid4().hex
        mark = self.folder / f"mark-{run}"
        told = {"kind": fault, "stage": stage, "rank": rank, "mark": str(mark)}
        process = subprocess.Popen(
            self.command(ranks),
            env=self.environment(told, VAEPP_FAULT_RUN=run),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        since = None
        with killed_after(run, _LONGEST):
            if launcher:
                since = _wait_for(mark, process)
                time.sleep(0.5)  # the other ranks come to wait for this one
                since += 500_000_000
                process.send_signal(getattr(signal, f"SIG{launcher}"))
            _, stderr = process.communicate()
        ended = time.monotonic_ns()
        since = since or (int(mark.read_text()) if mark.exists() else ended)
        left = left_after(run, 2.0)
        named = re.search(r"rank (\d+) failed in stage (\w+)", stderr)
        row = Row(
            fault=f"SIG{launcher} to the launcher, {fault}" if launcher else fault,
            stage=stage,
            rank=rank,
            ranks=ranks,
            seconds=(ended - since) / 1e9,
            code=process.returncode,
            named=f"{named[1]} {named[2]}" if named else "",
            lines=len(stderr.splitlines()),
            left=left,
            misses=(),
        )
        after = self.digests()
        untouched = all(after.get(name) == digest for name, digest in before.items())
        partial = [path.name for path in (self.folder / "out").rglob("*.partial*")]
        happened = mark.exists()
        return attrs.evolve(
            row, misses=tuple(_misses(row, happened, untouched and not partial, fault, launcher))
        )


def _wait_for(mark: Path, process: subprocess.Popen[str]) -> int:
    """The time at which a fault struck."""
    while process.poll() is None:
        if mark.exists() and (text := mark.read_text()):
            return int(text)
        time.sleep(0.02)
    return time.monotonic_ns()


def _misses(row: Row, happened: bool, untouched: bool, fault: str, launcher: str) -> Iterator[str]:
    """The goals that a row misses."""
    if not happened:
        yield "the fault never came"
    if row.code == 0:
        yield "exit code 0"
    limit = CRASH_SECONDS if launcher or fault in CRASHES else _hang_limit(fault, row.stage) + SLACK_SECONDS
    if row.seconds > limit:
        yield f"over {limit:g} s"
    if not launcher and row.named != f"{row.rank} {row.stage}":
        yield "wrong rank or stage"
    if row.lines > MOST_LINES:
        yield "too many lines"
    if row.left:
        yield "processes left"
    if not untouched:
        yield "old outputs touched"


def _hang_limit(fault: str, stage: str) -> float:
    if fault == BETWEEN_STEPS:
        return LIMITS["denoise"]
    return LIMITS["load"] if stage == "load" else LIMITS["request"]


@contextlib.contextmanager
def killed_after(run: str, seconds: float) -> Iterator[None]:
    """Kill a run that has not ended after so many seconds: its row has them, and misses a goal."""

    def kill() -> None:
        for pid in processes_of(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def left_after(run: str, seconds: float) -> int:
    """Processes of a run that are still there after so many seconds."""
    limit = time.monotonic() + seconds
    while left := len(processes_of(run)):
        if time.monotonic() > limit:
            return left
        time.sleep(0.05)
    return 0


def processes_of(run: str) -> list[int]:
    """The processes that carry a run's mark in their environment; zombies have no environment."""
    needle, found = f"VAEPP_FAULT_RUN={run}".encode(), list[int]()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and needle in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def cases(quick: bool, ranks: list[int]) -> list[tuple[str, str, int, int, str]]:
    """Every fault in every stage, and every signal for the launcher while a rank hangs."""
    stages = ("denoise", "decode") if quick else STAGES
    found = [
        (fault, stage, 0 if stage == "save" else count - 1, count, "")
        for count in ranks
        for stage in stages
        for fault in (*CRASHES, *HANGS)
    ]
    found += [(BETWEEN_STEPS, "denoise", count - 1, count, "") for count in ranks]
    signals = ("KILL", "TERM") if quick else SIGNALS
    return found + [(hang, "denoise", 1, 2, name) for name in signals for hang in HANGS]


_COLUMNS = ("fault", "stage", "rank", "ranks", "seconds", "code", "named", "lines", "left", "misses")
_WIDTHS = dict(zip(_COLUMNS, (44, 14, 6, 7, 9, 6, 17, 7, 6, 0), strict=True))


def print_line(values: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    """One row of a table, as it comes."""
    print("".join(f"{_cell(values[name]):<{width}}" for name, width in widths.items()), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two stages and two signals")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--repeat", type=int, default=1, help="run each so many times")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaepp-faults-") as folder:
        bench = Bench(Path(folder))
        bench.prepare()
        print_line({name: name for name in _WIDTHS}, _WIDTHS)
        rows = []
        for case in cases(arguments.quick, arguments.ranks) * arguments.repeat:
            if arguments.only in case[0] and case[1] in arguments.stages:
                rows.append(bench.run(*case))
                print_line(attrs.asdict(rows[-1]), _WIDTHS)
    missed = sum(bool(row.misses) for row in rows)
    print(f"{len(rows)} faults, {missed} of them missed a goal")
    content = {"environment": environment(), "limits": LIMITS, "rows": [attrs.asdict(row) for row in rows]}
    write(arguments.out, content)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
