"""What the benchmarks measure: one VAE, one size, one number of ranks, every strategy beside one rank."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from diffusers.utils import logging
from torch import nn

from vaepp_sdk import VaeEntry
from vaepp_sdk.entries import load_object
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.registry import default_registry
from vaepp_sdk.testing import LiveBytes
from vaepp_sdk.vae.chooser import StrategyChooser
from vaepp_sdk.vae.wrapper import ParallelVAE

__all__ = ["WIDTHS", "Case", "full_vae", "measure", "new_vae"]

WIDTHS = {"full": (128, 256, 512, 512), "thin": (32, 64, 128, 128), "tiny": (8, 16, 16, 16)}
"""Channels of each level; `full` is the VAE of Flux and Z-Image."""

WAIT = timedelta(minutes=30)


@attrs.frozen(kw_only=True)
class Case:
    """One launch.

    Attributes:
        vae: a key of `WIDTHS`.
        sample_size: the VAE's tile, in pixels; tiling fires above it.
        pixels: the picture's side.
        dtype: a torch dtype's name.
        ranks: ranks of the job, all of which share the VAE.
        strategies: what is measured beside the plain VAE.
        repeats: timed runs of each; the median is reported.
        device: `cpu` or `cuda`.
        backend: what carries the messages, `gloo` or `nccl`.
    """

    vae: str
    sample_size: int
    pixels: int
    dtype: str
    ranks: int
    strategies: tuple[str, ...]
    repeats: int
    device: str
    backend: str = "gloo"


def measure(rank: int, case: Case) -> dict[str, Any]:
    """One rank's figures, by what was measured; called on every rank of a job."""
    device = _device(rank, case)
    vae = _vae(case, device)
    side = case.pixels // 8
    latent = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(1))
    latent = latent.to(device, getattr(torch, case.dtype))
    # A run of the process group's own backend; where it is gloo that is the job itself.
    process_group = dist.new_group(backend=case.backend) if case.backend != "gloo" else None
    found: dict[str, Any] = {}
    pictures: dict[str, torch.Tensor] = {}
    for name, tiling in (("untiled", False), ("tiled", True)):
        vae.use_tiling = tiling
        if rank == 0:
            found[name] = _timed(lambda: vae.decode(latent).sample, case, pictures, name)
        dist.barrier()
    for strategy in case.strategies:
        found[strategy] = _strategy(vae, strategy, latent, case, process_group, pictures)
    return found


def _strategy(
    vae: Any,
    strategy: str,
    latent: torch.Tensor,
    case: Case,
    process_group: dist.ProcessGroup | None,
    pictures: dict[str, torch.Tensor],
) -> dict[str, Any]:
    vae.use_tiling = True  # each strategy takes from it what it needs
    parallel, group = _parallel(vae, strategy, case, process_group)
    result = _timed(lambda: parallel.decode(latent).sample, case, pictures, strategy)
    group.traffic.reset()
    parallel.decode(latent)
    result |= {"messages": group.traffic.messages, "bytes": group.traffic.nbytes}
    result["alone"] = _alone(parallel, latent, group, case)
    if group.rank == 0:
        untiled, tiled, mine = (pictures[name].float() for name in ("untiled", "tiled", strategy))
        result["equal_to_tiled"] = torch.equal(pictures["tiled"], pictures[strategy])
        spread = (untiled.max() - untiled.min()).item()
        result["mean_from_untiled"] = (mine - untiled).abs().mean().item() / spread
        result["max_from_untiled"] = (mine - untiled).abs().max().item() / spread
        del untiled, tiled, mine
    return result


def _parallel(
    vae: Any, strategy: str, case: Case, process_group: dist.ProcessGroup | None
) -> tuple[ParallelVAE, VaeGroup]:
    """The drop-in, built from its parts so that its traffic can be read and one rank is served too."""
    registry = default_registry()
    entry: VaeEntry = registry.vae(type(vae))
    chooser = StrategyChooser(registry, strategy, entry.strategies, entry.pick)
    group = VaeGroup.over(process_group, case.ranks, WAIT)
    adapter = load_object(entry.adapter, entry.name)(vae)
    return ParallelVAE(adapter, group, chooser, "rank0"), group


def _timed(
    decode: Callable[[], torch.Tensor], case: Case, pictures: dict[str, torch.Tensor], name: str
) -> dict[str, Any]:
    """Peak memory of one run, then the median time of several; the last picture is kept."""
    with torch.no_grad():
        decode()  # plans, kernels and their workspaces are made by the first call
    with torch.no_grad(), _peak(case) as peak:
        pictures[name] = decode().cpu()
    seconds = []
    for _ in range(case.repeats):
        with torch.no_grad():
            seconds.append(_seconds(decode, case))
    return {"peak": peak[0], "seconds": statistics.median(seconds), "all_seconds": seconds}


def _alone(parallel: ParallelVAE, latent: torch.Tensor, group: VaeGroup, case: Case) -> float:
    """Seconds this rank computes for its own windows, with the machine to itself and nothing exchanged."""
    plan = parallel.last_plan
    assert plan is not None
    windows = [latent[(..., *window.source.slices)] for window in plan.owned(group.rank)]
    adapter = load_object(default_registry().vae(type(parallel.vae)).adapter, "benchmark")(parallel.vae)

    def run() -> None:
        for window in windows:
            adapter.decode_window(window)

    seconds = 0.0
    for turn in range(group.world_size):
        dist.barrier()
        if turn == group.rank:
            with torch.no_grad():
                run()
                seconds = statistics.median(_seconds(run, case) for _ in range(case.repeats))
    dist.barrier()
    return seconds


def _seconds(run: Callable[[], Any], case: Case) -> float:
    _finish(case)
    start = time.perf_counter()
    run()
    _finish(case)
    return time.perf_counter() - start


def _finish(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _peak(case: Case) -> Iterator[list[int]]:
    """The bytes born inside the block at their peak: the allocator's on a GPU, live tensors on a CPU."""
    found: list[int] = []
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    with LiveBytes() as live:
        yield found
    found.append(live.peak)


def _device(rank: int, case: Case) -> torch.device:
    if case.device != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _vae(case: Case, device: torch.device) -> Any:
    """A VAE with random weights, the same on every rank."""
    logging.set_verbosity_error()  # or it warns of a cast to the type the model already has
    torch.manual_seed(0)
    return new_vae(case.vae, case.sample_size).to(device, getattr(torch, case.dtype)).eval()


def new_vae(name: str, sample_size: int = 1024) -> Any:
    """A VAE with fresh random weights on torch's default device.

    Args:
        name: a key of `WIDTHS`.
        sample_size: its tile, in pixels.
    """
    widths = WIDTHS[name]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=min(32, widths[0] // 2),
        sample_size=sample_size,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):  # plain affines would hide errors in shared statistics
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return vae


def full_vae() -> Any:
    """The full-width VAE without weights, whose shapes can be counted."""
    with torch.device("meta"):
        return new_vae("full")
