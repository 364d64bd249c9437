"""What to try where a rank's memory is not enough: bands in row blocks, then tiles, then smaller tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vaepp_sdk import Rung
from vaepp_sdk.vae.facts import TileGrid, VaeFacts
from vaepp_sdk.vae.plan import Work

__all__ = ["below_patch", "below_shard", "below_tile"]

_ROW_BLOCKS = (2, 4, 8, 16, 32)
_SMALLEST = 8
"""How many times smaller than the VAE's own a tile gets at most: a tile needs context to look right."""


def below_patch(options: Mapping[str, Any], facts: VaeFacts, work: Work) -> list[Rung]:
    """The ways down from `patch`; none keeps its halo, which costs memory."""
    del options
    return below_shard({}, facts, work)


def below_shard(options: Mapping[str, Any], facts: VaeFacts, work: Work) -> list[Rung]:
    """The ways down from `shard`: row blocks, activations computed again, tiles; equal bits end there."""
    more = [count for count in _ROW_BLOCKS if count > options.get("row_blocks", 1)]
    blocks = [Rung("shard", {"row_blocks": count}) for count in more]
    leanest = Rung("shard", {"row_blocks": _ROW_BLOCKS[-1], "recompute": "always"})
    return [*blocks, leanest, Rung("tile"), *below_tile({}, facts, work)]


def below_tile(options: Mapping[str, Any], facts: VaeFacts, work: Work) -> list[Rung]:
    """The ways down from `tile`: tiles of half the side, and half of that."""
    grid = facts.tiles(work.direction)
    if grid is None:
        return []
    own = max(grid.tile) * (facts.spatial_ratio if work.direction == "decode" else 1)
    overlap = options.get("tile_overlap_factor", grid.overlap)
    if overlap is None:  # a class that states steps: what it has
        overlap = max(grid.blend) / (max(grid.blend) + max(grid.keep))
    sizes = _halves(options.get("tile_size") or own, own // _SMALLEST, facts.spatial_ratio)
    return [
        Rung("tile", {**options, "tile_size": size, **_fitting(size // facts.spatial_ratio, overlap, grid)})
        for size in sizes
    ]


def _fitting(latents: int, overlap: float, grid: TileGrid) -> dict[str, float]:
    """The overlap with which tiles of so many latents advance by whole ones: small tiles overlap by more."""
    fitting = math.ceil(latents * overlap) / latents
    return {} if fitting == grid.overlap else {"tile_overlap_factor": fitting}


def _halves(size: int, least: int, unit: int) -> Iterator[int]:
    """Half of a size and half of that, in whole units, down to the least."""
    while (size := size // 2 // unit * unit) >= max(least, unit):
        yield size
