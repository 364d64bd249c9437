"""Where tiles start and end, as diffusers lays them: pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import TileGrid, VaeFacts
from vaepp_sdk.vae.plan import Work

__all__ = ["Span", "lay_tiles", "replaced_facts"]


@attrs.frozen
class Span:
    """One tile along one axis.

    Attributes:
        start: its first input row or column.
        length: its input rows or columns, clipped at the edge.
        out: its output rows or columns.
        kept: how many of them stay in the whole output.
        place: where they start there.
        blend: how many are blended with the tile before; 0 for the first.
    """

    start: int
    length: int
    out: int
    kept: int
    place: int
    blend: int


def replaced_facts(facts: VaeFacts, tile_size: int | None, overlap: float | None) -> VaeFacts:
    """The facts of the same VAE with another tile geometry.

    Args:
        facts: the VAE's own.
        tile_size: a tile's side in pixels, or None for the VAE's own.
        overlap: the part of a tile that its neighbour covers too, or None for the VAE's own.

    Raises:
        UnsupportedError: the tile size is no multiple of the VAE's pixels per latent, or the class's own
            tiling has no overlap factor to replace.
    """
    if tile_size is None and overlap is None:
        return facts
    ratio = facts.spatial_ratio
    if tile_size is not None and (tile_size < ratio or tile_size % ratio):
        raise UnsupportedError(
            f"tile_size is {tile_size}; it must be a positive multiple of {ratio}, the pixels per latent of "
            f"{facts.vae_class}; nearest: {max(1, round(tile_size / ratio)) * ratio}"
        )
    return attrs.evolve(
        facts,
        # Whoever names a tile size wants tiles, whatever the VAE's own switch says.
        use_tiling=facts.use_tiling or tile_size is not None,
        decode_tiles=_replaced(
            facts, facts.decode_tiles, tile_size and tile_size // ratio, tile_size, overlap
        ),
        encode_tiles=_replaced(
            facts, facts.encode_tiles, tile_size, tile_size and tile_size // ratio, overlap
        ),
    )


def _replaced(
    facts: VaeFacts, grid: TileGrid | None, tile: int | None, out_tile: int | None, overlap: float | None
) -> TileGrid | None:
    """One direction's grid with another tile, overlap, or both."""
    if grid is None:
        return None
    overlap = grid.overlap if overlap is None else overlap
    if overlap is None:
        raise UnsupportedError(
            f"the tiling of {facts.vae_class} has no overlap factor; leave the options out"
        )
    own_out = (grid.keep[0] + grid.blend[0], grid.keep[1] + grid.blend[1])
    return TileGrid.overlapping(
        (tile, tile) if tile else grid.tile, (out_tile, out_tile) if out_tile else own_out, overlap
    )


def lay_tiles(facts: VaeFacts, work: Work) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The rows and columns of tiles for one piece of work; one tile where the VAE's tiling does not fire.

    Raises:
        UnsupportedError: the VAE's tiling is not known, makes no progress, or leaves a tile without output.
    """
    grid = facts.tiles(work.direction)
    if grid is None:
        raise UnsupportedError(f"the tiling of {facts.vae_class} is not known; choose another strategy")
    fires = facts.tiling_fires(work.direction, work.shape)
    return _axis(facts, work, grid, 0, fires), _axis(facts, work, grid, 1, fires)


def _axis(facts: VaeFacts, work: Work, grid: TileGrid, axis: int, fires: bool) -> tuple[Span, ...]:
    side = work.shape[axis - 2]
    tile, step = (grid.tile[axis], grid.step[axis]) if fires else (side, side)
    if step < 1 or grid.keep[axis] < 1:
        raise UnsupportedError(
            f"tiles of {tile} with an overlap factor of {grid.overlap} advance by {step}; "
            f"make the tiles larger, or the factor at most {1 - 1 / max(tile, 1):g}"
        )

    def out(length: int) -> int:
        return facts.out_length(work.direction, length)

    if not fires:
        return (Span(0, side, out(side), out(side), 0, 0),)
    spans = _spans(side, tile, step, grid.blend[axis], grid.keep[axis], out)
    if spans[-1].out < 1:
        raise UnsupportedError(
            f"the last tile of a side of {side} has {spans[-1].length}, less than one latent of "
            f"{facts.spatial_ratio}: {facts.vae_class} cannot {work.direction} it; change the size by "
            f"{spans[-1].length} or the tile size"
        )
    return spans


def _spans(
    side: int, tile: int, step: int, blend: int, keep: int, out: Callable[[int], int]
) -> tuple[Span, ...]:
    spans: list[Span] = []
    for start in range(0, side, step):
        length = min(tile, side - start)
        size = out(length)
        before = spans[-1] if spans else None
        spans.append(
            Span(
                start=start,
                length=length,
                out=size,
                kept=min(size, keep),
                # Kept parts are laid end to end: where roundings make a step and a kept part differ, the
                # whole output is as much larger or smaller as diffusers' is.
                place=before.place + before.kept if before else 0,
                blend=max(0, min(before.out, size, blend)) if before else 0,
            )
        )
    return tuple(spans)
