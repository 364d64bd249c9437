"""`kill -9` at random moments: `make kills`, or `python -m benchmarks.random_kills`.

Each row is one `vaepp-run` of a small Z-Image checkpoint. At a random moment between its start and its end
one of its processes is killed: a rank, or the launcher, which the supervisor is a thread of. Exits with 1
where a row misses a goal: a killed rank named with its stage in one block and exit code 1, or a run that was
complete already; all processes gone within 3 s; nothing left in shared memory; pictures and latents whole or
not there; and once another run has come by, no temporary file but the logs that messages name.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import attrs
from PIL import Image
from safetensors import safe_open

from benchmarks.faults import MOST_LINES, RESULTS, Bench, print_line, processes_of
from benchmarks.report import environment, write

LIMITS = {"load": 600.0, "request": 600.0, "exchange": 600.0}
END_SECONDS, LEAVE_SECONDS = 3.0, 10.0
"""From the kill to the end of the last process; ranks of a run that was complete have their time to leave."""

RANKS = 2
CALL = {"num_inference_steps": 40, "height": 256, "width": 256}
"""Long enough for half of a run to lie behind loading."""

_NAMED = re.compile(r"rank (\d+) failed in stage (\w+): its process was killed by SIGKILL")
_PHASES = ("start", "boot", "load", "idle", "request", "close")
"""What a message may say where the rank is between the stages that plugins hear of."""


@attrs.frozen(kw_only=True)
class Row:
    """What came of one kill.

    Attributes:
        number: counted from 1.
        moment: seconds from the start of the run to the kill.
        victim: `rank N`, or `launcher`.
        stage: the stage that the victim was in, as its plugins were told; empty before the first.
        named: the rank and the stage in the message.
        code: the launcher's exit code.
        seconds: from the kill to the end of the last process.
        lines: lines on stderr.
        pictures: pictures that the run has saved.
        latents: files of latents that it has left.
        load: processes that wanted a core in the last minute, on the whole machine.
        misses: the goals missed.
    """

    number: int
    moment: float
    victim: str
    stage: str
    named: str
    code: int
    seconds: float
    lines: int
    pictures: int
    latents: int
    load: float
    misses: tuple[str, ...]


@attrs.define(eq=False)
class Kills:
    """Runs into kills, one after the other.

    Attributes:
        bench: where they happen.
        dice: what chance is.
        length: how long a run takes, in seconds.
        named: folders of logs that messages have named.
    """

    bench: Bench
    dice: random.Random
    length: float = 0.0
    named: set[str] = attrs.field(factory=set)

    def measure(self) -> None:
        """Make everything ready, and time a run that nobody kills."""
        self.bench.prepare()
        began = time.monotonic()
        self._undisturbed()
        self.length = time.monotonic() - began

    def kill(self, number: int) -> Row:
        """Start a run and kill one of its processes."""
        before, shared, run = self._outputs(), in_shared_memory(), uuid.uuid4().hex
        stages = self.bench.folder / f"stages-{run}"
        stages.mkdir()
        began = time.monotonic()
        moment = self.dice.uniform(0, self.length)
        with subprocess.Popen(
            self._command(),
            env=self.bench.environment({}, VAEPP_FAULT_RUN=run, VAEPP_STAGES=str(stages)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(moment)
            victim = self._strike(process, run)
            since = time.monotonic()
            stage = _stage(stages, victim)
            _, stderr = process.communicate(timeout=600)
        gone = _gone_after(run, since)
        self.named |= set(re.findall(r"the logs of all ranks are in (\S+)", stderr))
        found = _NAMED.search(stderr)
        made = [path for path in self._outputs() if path not in before]
        row = Row(
            number=number,
            moment=since - began,
            victim=victim or "none: it had ended",
            stage=stage,
            named=f"{found[1]} {found[2]}" if found else "",
            code=process.returncode,
            seconds=gone,
            lines=len(stderr.splitlines()),
            pictures=sum(path.suffix == ".png" for path in made),
            latents=sum(path.suffix == ".safetensors" for path in made),
            load=os.getloadavg()[0],
            misses=(),
        )
        broken = [path.name for path in made if not _is_whole(path)]
        return attrs.evolve(row, misses=tuple(_misses(row, broken, in_shared_memory() - shared)))

    def _strike(self, process: subprocess.Popen[str], run: str) -> str:
        """Kill one of the processes that there are; which of them it was."""
        ranks = [pid for pid in processes_of(run) if pid != process.pid]
        ranks.sort(key=_start_time)
        victims = {f"rank {number}": pid for number, pid in enumerate(ranks[:RANKS])}
        if process.poll() is None:
            victims["launcher"] = process.pid
        if not victims:
            return ""
        # The launcher as often as all ranks together.
        names = [name for name in victims if (name == "launcher") == (self.dice.random() < 0.5)]
        victim = self.dice.choice(names or list(victims))
        os.kill(victims[victim], signal.SIGKILL)
        return victim

    def leftovers(self) -> list[str]:
        """Temporary files that are there once another run has come by, beside the logs that were named."""
        self._undisturbed()
        folder = self.bench.folder
        found = [path for path in folder.glob("vaepp-run-*") if str(path) not in self.named]
        found += (folder / "out").glob(".*")
        return sorted(path.name for path in found)

    def _undisturbed(self) -> None:
        subprocess.run(self._command(), env=self.bench.environment({}), capture_output=True, check=True)

    def _command(self) -> list[str]:
        overrides = (("--set", f"call.{name}={value}") for name, value in CALL.items())
        return [*self.bench.command(RANKS), *chain.from_iterable(overrides)]

    def _outputs(self) -> list[Path]:
        return [path for path in (self.bench.folder / "out").rglob("*") if path.is_file()]


def _stage(folder: Path, victim: str) -> str:
    file = folder / (victim.removeprefix("rank ") or "none")
    return file.read_text() if file.exists() else ""


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _gone_after(run: str, since: float) -> float:
    """Seconds until no process of a run was left; a minute at most."""
    while processes_of(run) and time.monotonic() < since + 60:
        time.sleep(0.02)
    return time.monotonic() - since


def in_shared_memory() -> set[str]:
    """The files in this machine's shared memory, without the semaphores that other programs' pools use."""
    folder = Path("/dev/shm")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if not name.startswith("sem.mp-")}


def _is_whole(path: Path) -> bool:
    """Whether a picture or latents can be read to the end; other files are nobody's output."""
    try:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.get_tensor("latents")
        else:
            return path.name.endswith(".tmp")  # never under an output's name; counted at the end
    except Exception:
        return False
    return True


def _misses(row: Row, broken: Sequence[str], shared: set[str]) -> Iterator[str]:
    """The goals that a row misses."""
    if row.victim.startswith("rank"):
        yield from _rank_misses(row)
    elif row.victim == "launcher" and row.code != -signal.SIGKILL:
        yield "the launcher outlived its kill"
    limit = LEAVE_SECONDS if row.code == 0 else END_SECONDS
    if row.seconds > limit:
        yield f"over {limit:g} s"
    if row.lines > MOST_LINES:
        yield "too many lines"
    if broken:
        yield f"broken: {', '.join(broken)}"
    if shared:
        yield f"shared memory left: {', '.join(sorted(shared))}"


def _rank_misses(row: Row) -> Iterator[str]:
    if row.code == 0 and row.pictures == 1:
        return  # it had done its work
    if row.code != 1:
        yield f"exit code {row.code}"
    rank, _, stage = row.named.partition(" ")
    if f"rank {rank}" != row.victim:
        yield "wrong rank"
    elif stage != row.stage and stage not in _PHASES:
        yield "wrong stage"


_WIDTHS = dict(
    zip(
        (
            "number",
            "moment",
            "victim",
            "stage",
            "named",
            "code",
            "seconds",
            "lines",
            "pictures",
            "latents",
            "load",
        ),
        (8, 9, 20, 15, 18, 6, 9, 7, 10, 9, 7),
        strict=True,
    )
) | {"misses": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of what chance decides")
    parser.add_argument("--out", type=Path, default=RESULTS / "random_kills.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vaepp-kills-") as folder:
        kills = Kills(Bench(Path(folder), LIMITS), random.Random(arguments.seed))
        kills.measure()
        print(f"a run takes {kills.length:.1f} s")
        print_line({name: name for name in _WIDTHS}, _WIDTHS)
        rows = []
        for number in range(1, arguments.runs + 1):
            rows.append(kills.kill(number))
            print_line(attrs.asdict(rows[-1]), _WIDTHS)
        left = kills.leftovers()
    missed = sum(bool(row.misses) for row in rows)
    print(f"{len(rows)} kills, {missed} of them missed a goal; left behind: {', '.join(left) or 'nothing'}")
    content = {
        "environment": environment(),
        "run_seconds": kills.length,
        "left": left,
        "rows": [attrs.asdict(row) for row in rows],
    }
    write(arguments.out, content)
    raise SystemExit(1 if missed or left else 0)


if __name__ == "__main__":
    main()
