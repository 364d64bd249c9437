"""The CPU benchmark: `make bench`, or `python -m benchmarks.run`.

Everything is a ratio against one rank in the same launch, because absolute times of a CPU say little about a
GPU. Ranks run on one thread each; with fewer cores than ranks, only the `compute` column shows the gain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cases import Case, measure
from benchmarks.report import print_table, rows, save
from vaepp_sdk.testing import run_ranks

STRATEGIES = ("tile", "patch", "shard")
RESULTS = Path(__file__).resolve().parent / "results"


def cases(ranks: list[int], sizes: list[int], repeats: int) -> list[Case]:
    return [
        Case(
            vae="thin",
            sample_size=256,
            pixels=pixels,
            dtype="float32",
            ranks=count,
            strategies=STRATEGIES,
            repeats=repeats,
            device="cpu",
        )
        for count in ranks
        for pixels in sizes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 384], help="pixels; tiles fire above 256"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    arguments = parser.parse_args()
    measured = cases(arguments.ranks, arguments.sizes, arguments.repeats)
    found = []
    for case in measured:
        found += rows(case, run_ranks(case.ranks, measure, case, timeout=3600, collective=1800))
    print_table(found)
    save(arguments.out, found, measured)


if __name__ == "__main__":
    main()
