"""What `shard` costs beside the untiled and the tiled VAE: `python -m benchmarks.shard`.

Peaks and work are times the number of ranks, against the untiled run on one: 1.00 is an exact share. Work is
counted in floating point operations and bytes are counted on the wire, so neither depends on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.utils.flop_counter import FlopCounterMode
from vaepp_plugins.vae_kl import KLAdapter

from benchmarks.cases import WIDTHS, new_vae
from benchmarks.report import MIB, environment
from vaepp_sdk.entries import load_object
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.registry import default_registry
from vaepp_sdk.testing import LiveBytes, run_ranks
from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.plan import Work

__all__ = ["Job", "measure"]


@attrs.frozen(kw_only=True)
class Job:
    """One launch; `tile` is the VAE's tile in pixels.

    `what` is `untiled`, `tiled` or a strategy, and behind a colon its options: `shard:row_blocks=16`. One
    without a name is its `deterministic`: `shard:reference`.
    """

    what: str
    vae: str
    pixels: int
    direction: Direction
    ranks: int
    dtype: str
    tile: int


def measure(rank: int, job: Job) -> dict[str, Any]:
    """One rank's peak, work, CPU time and traffic."""
    dtype = getattr(torch, job.dtype)
    torch.manual_seed(0)
    vae = torch.nn.Module.to(new_vae(job.vae, job.tile), dtype).eval().requires_grad_(False)
    vae.use_tiling = job.what in ("tiled", "tile")
    decoding = job.direction == "decode"
    side = job.pixels // 8 if decoding else job.pixels
    value = torch.randn(1, 16 if decoding else 3, side, side, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    if job.what in ("untiled", "tiled"):
        method = vae.decode if decoding else vae.encode
        return _counted(lambda: method(value, return_dict=False))
    return _strategy(rank, job, vae, value)


def _strategy(rank: int, job: Job, vae: Any, value: torch.Tensor) -> dict[str, Any]:
    adapter = KLAdapter(vae)
    name, _, settings = job.what.partition(":")
    options = _options(settings)
    strategy: Any = load_object(default_registry().strategy(name).factory, name)(**options)
    group = VaeGroup.over(None, job.ranks, timedelta(hours=1))
    work = Work(
        direction=job.direction,
        shape=tuple(value.shape),
        itemsize=value.element_size(),
        ranks=job.ranks,
        world_size=job.ranks,
        output="rank0",
    )
    plan = strategy.plan(adapter.facts(), work)
    run = strategy.decode if job.direction == "decode" else strategy.encode

    def run_once() -> None:
        group.traffic.reset()
        run(adapter, value, group, plan)

    if "deterministic" in options:  # the first run checks kernels besides
        run_once()
    found = _counted(run_once)
    kinds: Counter[str] = Counter()
    for move in plan.moves:
        if move.src == rank:
            kinds[move.kind] += move.nbytes
    rounds = len({move.round for move in plan.moves})
    return found | {
        "messages": group.traffic.messages,
        "bytes": group.traffic.nbytes,
        "kinds": dict(kinds),
        "rounds": rounds,
    }


def _options(settings: str) -> dict[str, Any]:
    """Options as they stand behind the colon, separated by commas."""
    found: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.rpartition("=")
        found[name or "deterministic"] = int(value) if value.isdecimal() else value
    return found


@torch.no_grad()
def _counted(run: Any) -> dict[str, Any]:
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    # One after the other: the counter of operations keeps tensors alive that LiveBytes would count.
    with LiveBytes() as live:
        run()
    with FlopCounterMode(display=False) as work:
        run()
    return {"peak": live.peak, "work": work.get_total_flops(), "seconds": seconds}


def row(job: Job, parts: Sequence[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """The busiest rank's figures, against the untiled run on one rank."""
    sent = max(parts, key=lambda part: part.get("bytes", 0))
    return {
        "direction": job.direction,
        "px": job.pixels,
        "what": job.what,
        "ranks": len(parts),
        "peak x ranks": max(part["peak"] for part in parts) / base["peak"] * len(parts),
        "work x ranks": max(part["work"] for part in parts) / base["work"] * len(parts),
        "x cpu time": max(part["seconds"] for part in parts) / base["seconds"],
        "rounds": sent.get("rounds", 0),
        "messages": sent.get("messages", 0),
        "MiB": sent.get("bytes", 0) / MIB,
        "of which": {kind: round(size / MIB, 3) for kind, size in sent.get("kinds", {}).items()},
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table."""
    for line in [list(rows[0]), *(list(found.values()) for found in rows)]:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line]
        print("  ".join(cell.rjust(12) for cell in cells))
    print("\nThe busiest rank's figures; messages and MiB are those of the rank that sends most.")
    print("cpu time: seconds of computing, waiting excluded; both counters slow every run down.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", choices=sorted(WIDTHS), default="thin")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--directions", nargs="+", default=["decode", "encode"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tile", type=int, default=256, help="the VAE's tile, in pixels")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["shard", "tile"],
        help="as in shard:row_blocks=16,recompute=always",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for pixels in arguments.sizes:
        for direction in arguments.directions:

            def launch(what: str, ranks: int, pixels: int = pixels, direction: Any = direction) -> Any:
                job = Job(
                    what=what,
                    vae=arguments.vae,
                    pixels=pixels,
                    direction=direction,
                    ranks=ranks,
                    dtype=arguments.dtype,
                    tile=arguments.tile,
                )
                return job, run_ranks(ranks, measure, job, timeout=7200, collective=3600)

            job, (base,) = launch("untiled", 1)
            found.append(row(job, [base], base))
            job, tiled = launch("tiled", 1)
            found.append(row(job, tiled, base))
            for ranks, strategy in itertools.product(arguments.ranks, arguments.strategies):
                job, parts = launch(strategy, ranks)
                found.append(row(job, parts, base))
    print_rows(found)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "rows": found}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
