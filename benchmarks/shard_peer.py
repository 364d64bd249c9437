"""`shard` beside DistVAE's row sharding on real ranks, in one run: `python -m benchmarks.shard_peer`.

DistVAE is no dependency: `pip install --no-deps DistVAE==0.1.0` first, or it is left out. A VAE with random
weights decodes the same latent both ways, and the picture lands on every rank, as DistVAE always does it.
Both are counted alike, in what they hand to `torch.distributed`, in operations and in live bytes, and timed
in turns. Beside them stands the restatement that `benchmarks.shard_bytes` counts on shapes.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

from benchmarks.cases import WIDTHS, new_vae
from benchmarks.report import MIB, environment, sent, write
from benchmarks.row_peer import RowPeer
from benchmarks.shard_bytes import operations
from benchmarks.wire import counting
from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import LiveBytes, run_ranks

PEER, RESTATED, UNTILED = "DistVAE", "row sharding, restated", "untiled"
_COLUMNS = (
    *("ranks", "what", "MiB", "busiest", "messages", "busiest", "rounds"),
    *("peak", "work", "wall", "cpu", "apart"),
)


@attrs.frozen(kw_only=True)
class Job:
    """One launch.

    Attributes:
        vae: a key of `WIDTHS`.
        pixels: the picture's side.
        dtype: a torch dtype's name.
        repeats: timed runs of each; 0 times nothing.
        peer: whether DistVAE is measured.
    """

    vae: str
    pixels: int
    dtype: str
    repeats: int
    peer: bool

    def made(self, device: str) -> tuple[Any, torch.Tensor]:
        """The VAE and a latent, the same on every rank."""
        torch.manual_seed(0)
        with torch.device(device):
            vae = torch.nn.Module.to(new_vae(self.vae, self.pixels), getattr(torch, self.dtype))
        side = self.pixels // 8
        latent = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(1))
        return vae.eval().requires_grad_(False), latent.to(device, getattr(torch, self.dtype))


Decode = Callable[[], torch.Tensor]


@torch.no_grad()
def measure(rank: int, job: Job) -> dict[str, dict[str, Any]]:
    """One rank's figures, by what was measured; called on every rank of a job."""
    vae, latent = job.made("cpu")
    untiled = _decoding(vae, latent)
    with LiveBytes() as live:
        exact = untiled() if rank == 0 else None
    ways = {"shard": _decoding(parallelize_vae(vae, strategy="shard", output="all"), latent)}
    if job.peer:
        from distvae.vae import parallelize_decoder  # type: ignore[import-not-found]  # not a dependency

        changed = copy.deepcopy(vae)
        parallelize_decoder(changed, dist.group.WORLD)
        ways[PEER] = _decoding(changed, latent)
    found = {UNTILED: {"peak": live.peak}} | {name: _counted(way, exact) for name, way in ways.items()}
    for name, seconds in _timed({UNTILED: untiled} | ways, rank, job.repeats).items():
        found[name] |= seconds
    return found


def _decoding(vae: Any, latent: torch.Tensor) -> Decode:
    def decode() -> torch.Tensor:
        picture: torch.Tensor = vae.decode(latent, return_dict=False)[0]
        return picture

    return decode


def _counted(decode: Decode, exact: torch.Tensor | None) -> dict[str, Any]:
    """What one rank sends, computes and holds, and how far its picture is from the untiled one."""
    decode()  # plans are made by the first call, from a trace whose shapes both counters would count
    # In a run of its own: the counter of operations keeps tensors alive that LiveBytes would count.
    with LiveBytes() as live:
        decode()
    pictures = []
    with counting() as wire:
        work = operations(lambda: pictures.append(decode()))
    found = attrs.asdict(wire) | {"peak": live.peak, "work": work}
    if exact is not None:
        found["apart"] = float((pictures[0] - exact).abs().max() / exact.abs().max())
    return found


def _timed(ways: dict[str, Decode], rank: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each, in turns, so that a slow minute of the machine slows them all down."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, decode in ways.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            if name != UNTILED or rank == 0:
                decode()
            cpu = time.process_time() - cpu
            dist.barrier()
            seconds[name].append((time.perf_counter() - wall, cpu))
    return {
        name: dict(zip(("wall", "cpu"), map(statistics.median, zip(*each, strict=True)), strict=True))
        for name, each in seconds.items()
        if each
    }


def rows(job: Job, ranks: int) -> list[dict[str, Any]]:
    """Run one launch; a row for each thing that was measured, and one for the restatement."""
    vae, latent = job.made("meta")
    with torch.no_grad():
        work = operations(_decoding(vae, latent))
    each = run_ranks(ranks, measure, job, timeout=14400, collective=7200)
    untiled = {"work": work} | each[0].pop(UNTILED)
    found = [_row(ranks, name, [one[name] for one in each], untiled) for name in each[0]]
    restated = [_restated(vae, latent, rank, ranks) for rank in range(ranks)]
    return [*found, _row(ranks, RESTATED, restated, untiled)]


@torch.no_grad()
def _restated(vae: Any, latent: torch.Tensor, rank: int, ranks: int) -> dict[str, Any]:
    peer = RowPeer(rank, ranks)
    work = operations(partial(peer.decode, vae.decoder, latent))
    return {"layers": peer.nbytes, "messages": peer.messages, "rounds": peer.rounds, "work": work}


def _row(ranks: int, name: str, each: Sequence[dict[str, Any]], untiled: dict[str, Any]) -> dict[str, Any]:
    """One row; peak, work and seconds are the busiest rank's, times the ranks: the untiled run's are 1."""
    row = {
        "ranks": ranks,
        "what": name,
        **sent(each, "layers"),
    }
    for figure in ("peak", "work", "wall", "cpu"):
        if figure in each[0] and figure in untiled:
            row[figure] = max(one[figure] for one in each) * ranks / untiled[figure]
    if "picture" in each[0]:
        row["picture_mib"] = sum(one["picture"] for one in each) / MIB
        row["apart"] = each[0]["apart"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", choices=sorted(WIDTHS), default="full")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=0, help="timed runs of each way, in turns")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    peer = importlib.util.find_spec("distvae") is not None
    if not peer:
        print("DistVAE is not installed and is left out: pip install --no-deps DistVAE==0.1.0")
    job = Job(
        vae=arguments.vae,
        pixels=arguments.pixels,
        dtype=arguments.dtype,
        repeats=arguments.repeats,
        peer=peer,
    )
    print("  ".join(f"{name:>9}" if name != "what" else f"{name:24}" for name in _COLUMNS))
    found = []
    for ranks in arguments.ranks:
        for row in rows(job, ranks):
            found.append(row)
            print(_line(row), flush=True)
    if arguments.json:
        where = environment()
        if peer:
            where["versions"]["DistVAE"] = version("DistVAE")
        write(arguments.json, {"environment": where, "job": attrs.asdict(job)}, found)


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['ranks']:9}", f"{row['what']:24}", f"{row['mib']:9.2f}", f"{row['busiest_mib']:9.2f}"]
    cells += [f"{row[name]:9}" for name in ("messages", "busiest_messages", "rounds")]
    cells += [f"{row[name]:9.3f}" if name in row else " " * 9 for name in ("peak", "work", "wall", "cpu")]
    cells += [f"{row['apart']:9.1e}" if "apart" in row else ""]
    return "  ".join(cells).rstrip()


if __name__ == "__main__":
    main()
