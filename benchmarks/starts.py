"""Faults while ranks start, and under torchrun: `make starts`, or `python -m benchmarks.starts`.

Ranks of a small Z-Image checkpoint are started by hand, as a launcher would: one never comes, one believes in
a job of another size, one is there twice, the port is a stranger's; or one has another spec, version or set
of plugins. Then torchrun starts them, alone or as two agents, and a rank is killed, stuck, or raises. Exits
with 1 where a row misses a goal: the cause named, exit codes that are not 0, all processes gone within 10 s
(after the limit, where somebody is waited for), one voice, and no picture.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs

from benchmarks.faults import RESULTS, Bench, killed_after, left_after, print_line
from benchmarks.report import environment, write

BOOT, EXCHANGE, GONE = 10.0, 10.0, 10.0
LIMITS = {"boot": BOOT, "load": 300.0, "request": 300.0, "exchange": EXCHANGE, "decode": 5.0}

_LONGEST = 120.0
"""How long a run may take from its start, in seconds."""

OTHER_VERSION = "other-version"
"""A folder of the run's that makes another version of vaepp of this one."""

Place = tuple[int, int]
"""`RANK` and `WORLD_SIZE` of one process."""


@attrs.frozen(kw_only=True)
class Case:
    """One fault.

    Attributes:
        name: what goes wrong.
        words: what must be said on stderr, as a pattern.
        places: the processes that are started by hand; of none, torchrun starts two ranks.
        ranks: as many as the spec asks for.
        stranger: whether another program listens at the port.
        agents: of torchrun.
        overrides: rank 1's own, as `--set` takes them.
        variables: rank 1's own.
        fault: what the plugin injects into rank 1 in `decode`, if anything.
        waits: how long a limit makes the others wait, in seconds.
    """

    name: str
    words: str
    places: Sequence[Place] = ()
    ranks: int = 2
    stranger: bool = False
    agents: int = 1
    overrides: Sequence[str] = ()
    variables: Mapping[str, str] = attrs.field(factory=dict)
    fault: str = ""
    waits: float = 0.0


CASES = (
    Case(
        name="rank 1 never comes",
        words=r"rank 0 waited for rank 1 \(start\)",
        places=[(0, 2)],
        waits=BOOT,
    ),
    Case(
        name="rank 1 believes in 3 ranks",
        words=r"the launcher started 3 \(WORLD_SIZE\)",
        places=[(0, 2), (1, 3)],
        waits=BOOT,
    ),
    Case(
        name="rank 1 is there twice",
        words=r"two processes say that they are rank 1",
        places=[(0, 4), (1, 4), (1, 4), (2, 4)],
        ranks=4,
    ),
    Case(
        name="the port is a stranger's",
        words=r"rank 0 cannot listen at",
        places=[(0, 2), (1, 2)],
        stranger=True,
        waits=BOOT,
    ),
    Case(
        name="another seed on rank 1",
        words=r"do not agree before loading: call.* on rank 0 and .* on rank 1",
        places=[(0, 2), (1, 2)],
        overrides=["call.seed=9"],
    ),
    Case(
        name="another dtype on rank 1",
        words=r'model.dtype is "float32" on rank 0 and "bfloat16" on rank 1',
        places=[(0, 2), (1, 2)],
        overrides=["model.dtype=bfloat16"],
    ),
    Case(
        name="another vaepp on rank 1",
        words=r"the software is .* on rank 0 and vaepp 9.9.* on rank 1",
        places=[(0, 2), (1, 2)],
        variables={"PYTHONPATH": OTHER_VERSION},
    ),
    Case(
        name="a plugin less on rank 1",
        words=r"plugin wan is .* on rank 0 and not there on rank 1",
        places=[(0, 2), (1, 2)],
        variables={"VAEPP_PLUGINS_BLOCK": "wan"},
    ),
    Case(name="torchrun, rank 1 killed", words=r"Signal 9 \(SIGKILL\)", fault="KILL"),
    Case(name="torchrun, rank 1 raises", words=r"rank 1 failed in stage decode: ValueError", fault="raise"),
    Case(
        name="torchrun, rank 1 sleeps",
        words=r"rank 1 failed in stage decode: it runs and does not come further|waited for rank 1",
        fault="sleep",
        waits=EXCHANGE,
    ),
    Case(
        name="two agents, rank 1 killed",
        words=r"Signal 9 \(SIGKILL\)",
        agents=2,
        fault="KILL",
        waits=EXCHANGE,  # between collectives nothing breaks on the other machine
    ),
    Case(
        name="two agents, rank 1 sleeps",
        words=r"rank 1 failed in stage decode: it runs and does not come further|waited for rank 1",
        agents=2,
        fault="sleep",
        waits=EXCHANGE,
    ),
)


@attrs.frozen(kw_only=True)
class Row:
    """What came of one fault.

    Attributes:
        name: what went wrong.
        seconds: from the fault, or from when ranks can have joined, to the end of the last process.
        codes: of the processes that were started.
        voices: blocks of vaepp's on stderr of the machine that said most, a torchrun agent being one.
        left: processes left 2 s later.
        pictures: files written.
        misses: the goals missed.
    """

    name: str
    seconds: float
    codes: Sequence[int]
    voices: int
    left: int
    pictures: int
    misses: Sequence[str]


@attrs.define
class Starts:
    """Runs cases.

    Attributes:
        bench: where.
        ready: seconds that ranks of a whole job take to start and join here.
    """

    bench: Bench
    ready: float = 0.0

    def measure(self) -> None:
        """See that a whole job works, and how long its ranks take to join."""
        self.bench.prepare()
        other = self.bench.folder / OTHER_VERSION
        other.mkdir()
        (other / "sitecustomize.py").write_text("import vaepp_sdk\n\nvaepp_sdk.__version__ = '9.9'\n")
        began, stages = time.monotonic(), self.bench.folder / "stages"
        stages.mkdir()
        whole = Case(name="none", words="", places=[(0, 2), (1, 2)])
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = self._start(whole, port, uuid.uuid4().hex, {}, VAEPP_STAGES=str(stages))
        while not self.ready and any(process.poll() is None for process in processes):
            self.ready = time.monotonic() - began if (stages / "1").exists() else 0.0
            time.sleep(0.05)
        said = [process.communicate(timeout=300)[1] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("\n".join(["a job without any fault failed:", *said]))

    def run(self, case: Case) -> Row:
        """One case, from its start until no process is left."""
        run = uuid.uuid4().hex
        mark, before = self.bench.folder / f"mark-{run}", self._pictures()
        fault = {"kind": case.fault, "stage": "decode", "rank": 1, "mark": str(mark)} if case.fault else {}
        with socket.create_server(("127.0.0.1", 0)) as stranger:
            port = stranger.getsockname()[1]
            if not case.stranger:
                stranger.close()
            began = time.monotonic()
            processes = self._start(case, port, run, fault)
            with killed_after(run, _LONGEST), ThreadPoolExecutor(len(processes)) as readers:
                said = list(readers.map(lambda process: process.communicate()[1], processes))
        ended = time.monotonic()
        row = Row(
            name=case.name,
            seconds=ended - (int(mark.read_text()) / 1e9 if mark.exists() else began + self.ready),
            codes=[process.returncode for process in processes],
            voices=max(len(_VOICE.findall(text)) for text in said),
            left=left_after(run, 2.0),
            pictures=len(self._pictures() - before),
            misses=(),
        )
        return attrs.evolve(row, misses=tuple(_misses(case, row, "\n".join(said))))

    def _start(
        self, case: Case, port: int, run: str, fault: Mapping[str, Any], **extra: str
    ) -> list[subprocess.Popen[str]]:
        command = self.bench.command(case.ranks)
        shared = self.bench.environment(fault, VAEPP_FAULT_RUN=run, PYTHONWARNINGS="ignore", **extra)
        if not case.places:
            agent = [*_torchrun(case.agents, port, run), *command[1:]]
            return [_popen(agent, shared) for _ in range(case.agents)]
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            _popen(
                [*command, *(_own(case) if rank == 1 else ())],
                {
                    **shared,
                    **address,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    **(self._variables(case) if rank == 1 else {}),
                },
            )
            for rank, size in case.places
        ]

    def _variables(self, case: Case) -> dict[str, str]:
        """Rank 1's own; a path is one more, below the folder of the run."""
        found = dict(case.variables)
        if "PYTHONPATH" in found:
            own = str(self.bench.folder / found["PYTHONPATH"])
            found["PYTHONPATH"] = os.pathsep.join([own, self.bench.path])
        return found

    def _pictures(self) -> set[Path]:
        return set((self.bench.folder / "out").glob("*.png"))


def _own(case: Case) -> list[str]:
    return [word for override in case.overrides for word in ("--set", override)]


_VOICE = re.compile(r"^vaepp-run: (?!(?:rank \d+: )?warning)", re.MULTILINE)


def _popen(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _torchrun(agents: int, port: int, run: str) -> list[str]:
    """One agent of so many, with two ranks in all."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={2 // agents}"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={run}"]
    return [*launcher, f"--nnodes={agents}", *meeting, "--local-addr=127.0.0.1"]


def _misses(case: Case, row: Row, said: str) -> Iterator[str]:
    """The goals that a row misses."""
    if not re.search(case.words, said):
        yield "the cause is not named"
    if 0 in row.codes:
        yield "exit code 0"
    if row.seconds > case.waits + GONE:
        yield f"over {case.waits + GONE:g} s"
    if not case.places and row.voices != 1:
        yield "not one voice"
    if row.left:
        yield "processes left"
    if row.pictures:
        yield "a picture of a part of the job"


_WIDTHS = dict(
    zip(("name", "seconds", "codes", "voices", "left", "pictures"), (30, 9, 15, 8, 6, 10), strict=True)
) | {"misses": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--repeat", type=int, default=1, help="how often to run each case")
    parser.add_argument("--out", type=Path, default=RESULTS / "starts.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="vaepp-starts-") as folder:
        starts = Starts(Bench(Path(folder), LIMITS))
        starts.measure()
        print(f"ranks take {starts.ready:.1f} s to join")
        print_line({name: name for name in _WIDTHS}, _WIDTHS)
        for case in CASES:
            for _ in range(arguments.repeat if arguments.only in case.name else 0):
                rows.append(starts.run(case))
                print_line(attrs.asdict(rows[-1]), _WIDTHS)
    missed = sum(bool(row.misses) for row in rows)
    print(f"{len(rows)} faults, {missed} of them missed a goal")
    content = {"environment": environment(), "limits": LIMITS, "ready_seconds": starts.ready}
    write(arguments.out, content, [attrs.asdict(row) for row in rows])
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
