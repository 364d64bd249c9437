"""Runs into which nobody injects anything, on loaded cores: `python -m benchmarks.clean_runs`.

Each row is one `vaepp-run` of a small Z-Image checkpoint with the usual `[limits]`. Several run at a time in
one output folder, so that all cores are loaded all the while. Exits with 1 where a run ended with another
exit code than 0 or put a word on stderr, where one of its processes was left 2 s later, or where anything but
one whole picture a run was left in the end: temporary files, latents, files in shared memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
from PIL import Image

from benchmarks.faults import RESULTS, Bench, left_after, print_line
from benchmarks.random_kills import in_shared_memory
from benchmarks.report import environment, write

RANKS = 2
HANG_SECONDS = 900.0
MOST_WORDS = 2000


@attrs.frozen(kw_only=True)
class Row:
    """What came of one run.

    Attributes:
        number: counted from 1.
        seconds: from its start to its end.
        code: its exit code; -9 where it was given up after a quarter of an hour.
        words: what it put on stderr.
        left: its processes that were left 2 s later.
        load: processes that wanted a core in the last minute, on the whole machine.
        misses: the goals missed.
    """

    number: int
    seconds: float
    code: int
    words: str
    left: int
    load: float
    misses: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Clean:
    """Clean runs beside each other.

    Attributes:
        bench: where they happen.
        command: one run.
        temporary: their folder for temporary files.
    """

    bench: Bench
    command: Sequence[str]
    temporary: Path

    @classmethod
    def prepared(cls, folder: Path) -> Clean:
        """Build the checkpoint in an empty folder, and run once alone."""
        bench = Bench(folder, limits={})
        bench.prepare()
        temporary = folder / "temporary"
        temporary.mkdir()
        # Said in the spec, so that no warning says it.
        command = [*bench.command(RANKS), "--set", "vae.vae_use_tiling=true"]
        return cls(bench, command, temporary)

    def run(self, number: int) -> Row:
        """One run to its end."""
        run, began = uuid.uuid4().hex, time.monotonic()
        with subprocess.Popen(
            self.command,
            env=self.bench.environment({}, VAEPP_FAULT_RUN=run, TMPDIR=str(self.temporary)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                _, words = process.communicate(timeout=HANG_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                _, words = process.communicate()
        row = Row(
            number=number,
            seconds=time.monotonic() - began,
            code=process.returncode,
            words=words[:MOST_WORDS],
            left=left_after(run, 2.0),
            load=os.getloadavg()[0],
        )
        return attrs.evolve(row, misses=tuple(_misses(row)))

    def pictures(self) -> list[Path]:
        """The pictures saved so far."""
        return sorted((self.bench.folder / "out").glob("*.png"))

    def leftovers(self) -> list[str]:
        """What runs have left beside whole pictures."""
        found = [path for path in (self.bench.folder / "out").iterdir() if not _is_picture(path)]
        return sorted(path.name for path in [*found, *self.temporary.iterdir()])


def _misses(row: Row) -> Iterator[str]:
    if row.code != 0:
        yield f"exit code {row.code}"
    if row.words:
        yield "words on stderr"
    if row.left:
        yield "processes left"


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.load()
    except OSError:
        return False
    return True


_WIDTHS = {"number": 8, "seconds": 9, "code": 6, "left": 6, "load": 8, "misses": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument(
        "--at-a-time",
        type=int,
        default=max(2, os.cpu_count() or 1),
        help="runs beside each other, 2 ranks each",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "clean_runs.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaepp-clean-") as folder:
        clean = Clean.prepared(Path(folder))
        saved, shared, rows = len(clean.pictures()), in_shared_memory(), []
        print_line({name: name for name in _WIDTHS}, _WIDTHS)
        with ThreadPoolExecutor(arguments.at_a_time) as side_by_side:
            for row in side_by_side.map(clean.run, range(1, arguments.runs + 1)):
                rows.append(row)
                print_line(attrs.asdict(row), _WIDTHS)
                if row.words:
                    print(row.words, flush=True)
        left = [*clean.leftovers(), *sorted(in_shared_memory() - shared)]
        made = len(clean.pictures()) - saved
    missed = sum(bool(row.misses) for row in rows)
    load = statistics.median(row.load for row in rows)
    print(
        f"{len(rows)} runs, {arguments.at_a_time} at a time, median load {load:.1f}: {missed} missed a goal, "
        f"{made} pictures; left behind: {', '.join(left) or 'nothing'}"
    )
    content = {
        "environment": environment(),
        "at_a_time": arguments.at_a_time,
        "pictures": made,
        "left": left,
        "rows": [attrs.asdict(row) for row in rows],
    }
    write(arguments.out, content)
    raise SystemExit(1 if missed or left or made != len(rows) else 0)


if __name__ == "__main__":
    main()
