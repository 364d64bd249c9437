"""Many requests of mixed sizes in one pool of ranks: `make soak`, or `python -m benchmarks.soak`.

After each request it counts, for the caller and for every rank: resident memory, open files, threads, process
groups, and files in shared memory. Counts must stay at what they are after two rounds of all sizes; memory
may grow by 5 % over the second half. Exits with 1 where something grew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from vaepp_plugins.tiny_z_image import build

from benchmarks.plugging import announce
from benchmarks.report import environment, write
from vaepp_sdk import Pipeline

SIZES = ((128, 96), (64, 64), (96, 160), (192, 192), (128, 128))
"""Rows and columns of the pictures; the small VAE tiles those above 64."""

GROWTH = 1.05
RESULTS = Path(__file__).resolve().parent / "results"


@attrs.frozen(kw_only=True)
class Sample:
    """What one process holds.

    Attributes:
        rank: its rank; -1 for the caller.
        resident: resident memory in bytes.
        files: open file descriptors.
        threads: threads.
        groups: process groups; 0 for the caller, which has none.
    """

    rank: int
    resident: int
    files: int
    threads: int
    groups: int


def sample(pid: int, rank: int, folder: Path) -> Sample:
    """Look at one process from outside."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    counted = folder / f"groups-{rank}"
    return Sample(
        rank=rank,
        resident=int(fields["VmRSS"].split()[0]) * 1024,
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(fields["Threads"]),
        groups=int(counted.read_text()) if counted.exists() else 0,
    )


def rank_processes() -> list[int]:
    """The process ids of this process's children, in the order in which they were started: the ranks'."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found += [(int(fields[19]), int(entry.name))] if int(fields[1]) == os.getpid() else []
    return [pid for _, pid in sorted(found)]


def shared_files() -> int:
    """Files in the machine's shared memory, without semaphores, of which a pool makes none."""
    files = Path("/dev/shm").iterdir() if Path("/dev/shm").is_dir() else ()
    return sum(not file.name.startswith("sem.") for file in files)


def soak(folder: Path, requests: int, ranks: int) -> list[dict[str, Any]]:
    """Serve the requests; what every process held after each.

    Args:
        folder: an empty folder.
        requests: how many; the sizes take turns, one picture and two pictures too.
        ranks: of tensor parallelism, which all share the VAE's work.
    """
    path = announce("soak", "benchmarks.soak_plugin", folder)
    os.environ |= {"VAEPP_SOAK": str(folder), "PYTHONPATH": path}
    sys.path[:] = path.split(os.pathsep)
    build(folder / "model")
    spec = {
        "model": {"id": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "parallel": {"tensor_parallel_size": ranks, "vae_patch_parallel_size": ranks},
        "call": {"prompt": "a cup", "num_inference_steps": 2, "max_sequence_length": 64},
    }
    found = []
    with Pipeline.from_spec(spec) as pipe:
        for number in range(requests):
            height, width = SIZES[number % len(SIZES)]
            began = time.perf_counter()
            prompts = ["a cup"] * (1 + number // len(SIZES) % 2)
            result = pipe(prompt=prompts, height=height, width=width, seed=number)
            seconds = time.perf_counter() - began
            assert [image.size for image in result.images] == [(width, height)] * len(prompts)
            pids = [os.getpid(), *rank_processes()]
            assert len(pids) == 1 + ranks, "this process has no other children"
            samples = [sample(pid, rank, folder) for rank, pid in enumerate(pids, start=-1)]
            found.append(
                {"seconds": seconds, "shared": shared_files(), "held": [attrs.asdict(one) for one in samples]}
            )
    return found


def growths(found: Sequence[dict[str, Any]]) -> list[str]:
    """What grew, a line each."""
    settled = 2 * len(SIZES)
    problems = []
    first, last = found[settled - 1], found[-1]
    if last["shared"] > first["shared"]:
        problems.append(f"files in shared memory: {first['shared']} to {last['shared']}")
    for place, (before, after) in enumerate(zip(first["held"], last["held"], strict=True)):
        who = "the caller" if before["rank"] < 0 else f"rank {before['rank']}"
        problems += [
            f"{who}: {name}: {before[name]} to {after[name]}"
            for name in ("files", "threads", "groups")
            if after[name] > before[name]
        ]
        middle, end = (_resident(found, place, part) for part in (0.5, 1.0))
        if end > GROWTH * middle:
            problems.append(f"{who}: resident memory: {middle >> 20} MiB to {end >> 20} MiB")
    return problems


def _resident(found: Sequence[dict[str, Any]], place: int, part: float) -> int:
    """A process's resident memory in the round of all sizes that ends at a part of the run."""
    end = int(part * len(found))
    return int(statistics.median(one["held"][place]["resident"] for one in found[end - len(SIZES) : end]))


def _show(found: Sequence[dict[str, Any]]) -> None:
    print("request  process     resident MiB  files  threads  groups  shared files")
    for number in (2 * len(SIZES) - 1, len(found) // 2, len(found) - 1):
        for one in found[number]["held"]:
            who = "caller" if one["rank"] < 0 else f"rank {one['rank']}"
            print(
                f"{number + 1:<9}{who:<12}{one['resident'] >> 20:<14}{one['files']:<7}{one['threads']:<9}"
                f"{one['groups']:<8}{found[number]['shared']}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    arguments = parser.parse_args()
    if arguments.requests < 4 * len(SIZES):
        parser.error(f"--requests must be at least {4 * len(SIZES)}, four rounds of all sizes")
    with tempfile.TemporaryDirectory(prefix="vaepp-soak-") as folder:
        found = soak(Path(folder), arguments.requests, arguments.ranks)
    _show(found)
    problems = growths(found)
    print("\n".join(["grew:", *problems]) if problems else f"{len(found)} requests, and nothing grew")
    content = {"environment": environment(), "problems": problems, "requests": found}
    write(arguments.out, content)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
