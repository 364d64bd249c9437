"""Times the blend of tiles and counts each rank's live bytes.

    python -m benchmarks.tile_blend [--pixels 512] [--ranks 1 2 4]

The blend is timed alone, ours beside diffusers' loop on the same tiles; the bytes are those of whole decodes,
tensors born in them, weights and kernel workspaces excluded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from vaepp_strategies.blend import blend_into

from vaepp_sdk import parallelize_vae
from vaepp_sdk.testing import LiveBytes, run_ranks

MIB = 2**20
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512, help="side of the decoded picture")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="how many ranks share a decode")
    parser.add_argument("--repeat", type=int, default=7, help="timings, of which the median is printed")
    arguments = parser.parse_args()
    print_blends(arguments.repeat)
    print_bytes(arguments.pixels, arguments.ranks)


def print_blends(repeat: int) -> None:
    """One line for each tile size and dtype: milliseconds for one seam of each kind."""
    torch.set_num_threads(1)
    print("blend of two seams, 3 channels, 1 thread")
    print(f"{'tile':>6} {'dtype':>10} {'loop ms':>9} {'ours ms':>9} {'ratio':>7}")
    for side in (256, 512, 1024):
        for dtype in DTYPES:
            tiles = [torch.randn(1, 3, side, side).to(dtype) for _ in range(3)]
            loop, ours = compare(_loop, _ours, tiles, side // 4, repeat)
            name = str(dtype).removeprefix("torch.")
            print(f"{side:6} {name:>10} {loop:9.2f} {ours:9.2f} {loop / ours:7.1f}")


def compare(
    one: Callable[..., None], other: Callable[..., None], tiles: list[torch.Tensor], extent: int, repeat: int
) -> tuple[float, float]:
    """Median milliseconds of two functions, timed in turns, after a check that they give the same bits."""
    found = [[tile.clone() for tile in tiles] for _ in range(2)]
    one(*found[0], extent)
    other(*found[1], extent)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the blends differ"
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        for function, taken in zip((one, other), times, strict=True):
            copies = [tile.clone() for tile in tiles]
            start = time.perf_counter()
            function(*copies, extent)
            taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _loop(above: torch.Tensor, left: torch.Tensor, tile: torch.Tensor, extent: int) -> None:
    AutoencoderKL.blend_v(None, above, tile, extent)
    AutoencoderKL.blend_h(None, left, tile, extent)


def _ours(above: torch.Tensor, left: torch.Tensor, tile: torch.Tensor, extent: int) -> None:
    blend_into(above[..., -extent:, :], tile, -2)
    blend_into(left[..., -extent:], tile, -1)


def print_bytes(pixels: int, counts: Sequence[int]) -> None:
    """One line for each way to decode one picture: measured and planned peaks of every rank."""
    print(f"\npeak live MiB of one decode, {pixels} px, tiles of {pixels // 2}, bfloat16")
    full, tiled = one_rank(pixels)
    print(f"{'untiled, 1 rank':>20}: {full / MIB:.1f}")
    print(f"{'diffusers tiles':>20}: {tiled / MIB:.1f} ({tiled / full:.2f} of untiled)")
    for count in counts:
        found = run_ranks(count, several_ranks, pixels, timeout=600)
        ranks = ", ".join(f"{peak / MIB:.1f} (planned {planned / MIB:.1f})" for peak, planned in found)
        print(f"{f'tile, {count} ranks':>20}: {ranks}; worst {max(found)[0] / full:.2f} of untiled")


def build(pixels: int) -> Any:
    """A thin VAE in the layout of Z-Image's, whose tiles are half the picture's side."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=pixels // 2,
    )
    return torch.nn.Module.to(vae, torch.bfloat16).eval()


def latents(pixels: int) -> torch.Tensor:
    return torch.randn(1, 16, pixels // 8, pixels // 8).to(torch.bfloat16)


@torch.no_grad()
def one_rank(pixels: int) -> tuple[int, int]:
    """Peak bytes untiled, and with diffusers' own tiles."""
    vae, z = build(pixels), latents(pixels)
    peaks = []
    for tiling in (False, True):
        vae.use_tiling = tiling
        with LiveBytes([*vae.parameters(), z]) as live:
            vae.decode(z)
        peaks.append(live.peak)
    return peaks[0], peaks[1]


@torch.no_grad()
def several_ranks(rank: int, pixels: int) -> tuple[int, int]:
    """Measured and planned peak bytes of this rank."""
    vae, z = build(pixels), latents(pixels)
    vae.enable_tiling()
    wrapped = parallelize_vae(vae, strategy="tile", output="rank0")
    wrapped.decode(z)  # the first call also plans
    with LiveBytes([*vae.parameters(), z]) as live:
        wrapped.decode(z)
    return live.peak, wrapped.last_plan.peak_bytes[rank]


if __name__ == "__main__":
    main()
