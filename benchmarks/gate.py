"""What the gate before each stage costs: `python -m benchmarks.gate`.

Real gloo ranks meet at a gate many times over, with the facts of a stage; the median of the slowest rank
counts. Exits with 1 where it takes more than 2 ms on 4 ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import timedelta
from pathlib import Path

from benchmarks.report import environment, write
from vaepp_sdk.parallel.gate import Gate
from vaepp_sdk.testing import run_ranks

RANKS, ROUNDS, MOST_MS = 4, 500, 2.0
RESULTS = Path(__file__).resolve().parent / "results"


def meet(rank: int, rounds: int) -> list[float]:
    """Milliseconds of each gate on this rank."""
    gate, found = Gate(timedelta(seconds=60)), []
    facts = {"the stage": "decode", "the request": "0123456789abcdef"}
    for _ in range(rounds):
        began = time.perf_counter()
        gate.agree("decode", facts, {f"the latents of replica {rank // 2}": "float32 [1, 16, 144, 144]"})
        found.append((time.perf_counter() - began) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--out", type=Path, default=RESULTS / "gate.json")
    arguments = parser.parse_args()
    ranks = run_ranks(arguments.ranks, meet, ROUNDS)
    slowest = [max(times) for times in zip(*ranks, strict=True)]
    median, late = statistics.median(slowest), statistics.quantiles(slowest, n=20)[-1]
    print(f"{ROUNDS} gates of {arguments.ranks} ranks: median {median:.2f} ms, 95th percentile {late:.2f} ms")
    figures = {"ranks": arguments.ranks, "rounds": ROUNDS, "median_ms": median, "late_ms": late}
    write(arguments.out, {"environment": environment(), **figures})
    raise SystemExit(1 if median > MOST_MS else 0)


if __name__ == "__main__":
    main()
