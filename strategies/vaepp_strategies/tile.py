"""The `tile` strategy: the VAE's own tiles, dealt by cost, blended as on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_sdk import Option, StrategyEntry, hookimpl

VAEPP_API = 1


def _tile_conflict(options: Mapping[str, Any]) -> tuple[str, str] | None:
    """See `StrategyEntry.conflict`: what else may be wrong with tiles depends on the VAE."""
    if options.get("tile_overlap_factor") == 1:
        return "tile_overlap_factor is 1", "it must be below 1: tiles have to advance"
    return None


_ENTRY = StrategyEntry(
    name="tile",
    factory="vaepp_strategies.tile_run:TileStrategy",
    promise=(
        "bit-identical (torch.equal) to the same VAE's tiled decode or encode on one rank, same tile geometry"
    ),
    options=(
        Option(
            name="tile_size",
            kind="integer",
            minimum=1,
            help="A tile's side in pixels, a multiple of the pixels per latent; the VAE's own where unset.",
        ),
        Option(
            name="tile_overlap_factor",
            kind="number",
            minimum=0,
            maximum=1,
            help="The part of a tile that its neighbour covers too, below 1; the VAE's own where unset.",
        ),
    ),
    uses_tiling=True,
    conflict=_tile_conflict,
    unfit="vaepp_strategies.tile_geometry:unfit",
    lighter="vaepp_strategies.lighter:below_tile",
)


@hookimpl
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Register the strategy."""
    register(_ENTRY)
