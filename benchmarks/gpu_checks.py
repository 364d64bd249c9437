"""The one command for a machine with a GPU: `python -m benchmarks.gpu_checks`.

The VAE of Flux and Z-Image with random weights, from 1024 to 4096 px in bfloat16: every strategy beside one
rank, with each rank's memory peak from the allocator and each rank's compute time. Ranks share the cards over
gloo where there are fewer cards than ranks, and use NCCL where there are enough; one rank over NCCL is always
run. Ends with exit code 1 where `tile` is not bit-identical to the tiled decode on one rank.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, measure
from benchmarks.report import print_table, rows, save
from vaepp_sdk.testing import run_ranks

STRATEGIES = ("tile", "patch", "shard")


def gpu_cases(sizes: list[int], ranks: list[int], repeats: int) -> list[Case]:
    cards = torch.cuda.device_count()
    return [
        Case(
            vae="full",
            sample_size=1024,
            pixels=pixels,
            dtype="bfloat16",
            ranks=count,
            strategies=STRATEGIES,
            repeats=repeats,
            device="cuda",
            backend="nccl" if count <= cards else "gloo",
        )
        for count in ranks
        for pixels in sizes
    ]


def smoke_cases() -> list[Case]:
    """The same code on a CPU, at a size that proves only that it runs."""
    shape = {"vae": "tiny", "sample_size": 64, "pixels": 96, "dtype": "float32"}
    return [
        Case(ranks=count, strategies=STRATEGIES, repeats=1, device="cpu", **shape)  # type: ignore[arg-type]
        for count in (1, 2)
    ]


def broken_promises(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must hold on any machine and does not."""
    return [
        f"tile at {row['pixels']} px on {row['ranks']} ranks differs from the tiled decode on one rank"
        for row in found
        if row["what"] == "tile" and not row["equal_to_tiled"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1152, 2048, 4096], help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-smoke", action="store_true", help="a tiny run without a GPU")
    arguments = parser.parse_args()
    if not arguments.cpu_smoke and not torch.cuda.is_available():
        sys.exit("gpu_checks needs a CUDA device and torch sees none; --cpu-smoke tries the code without one")
    measured = (
        smoke_cases()
        if arguments.cpu_smoke
        else gpu_cases(arguments.sizes, arguments.ranks, arguments.repeats)
    )
    found: list[dict[str, Any]] = []
    for case in measured:
        print(f"{case.vae} VAE, {case.pixels} px, {case.ranks} ranks over {case.backend} ...", flush=True)
        found += rows(case, run_ranks(case.ranks, measure, case, timeout=3600, collective=1800))
    print_table(found)
    save(Path(os.environ.get("OUT", "out")) / "gpu_checks.json", found, measured)
    broken = broken_promises(found)
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
