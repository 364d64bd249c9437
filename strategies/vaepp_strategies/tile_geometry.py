"""Where tiles start and end, as diffusers lays them: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import TileGrid, VaeFacts
from vaepp_sdk.vae.plan import Work

__all__ = ["Span", "check_geometry", "lay_frames", "lay_tiles", "replaced_facts", "unfit"]


@attrs.frozen
class Span:
    """One tile along one axis.

    Attributes:
        start: its first input row, column or frame.
        length: its input rows, columns or frames, clipped at the edge.
        out: its output rows, columns or frames.
        kept: how many of them stay in the whole output.
        place: where they start there.
        blend: how many are blended with the tile before; 0 for the first.
        skip: how many output frames before `out` are dropped.
    """

    start: int
    length: int
    out: int
    kept: int
    place: int
    blend: int
    skip: int = 0


def check_geometry(facts: VaeFacts, tile_size: int | None, overlap: float | None) -> None:
    """Refuse another tile geometry that does not fit a VAE; see `replaced_facts`.

    Raises:
        UnsupportedError: it does not, or its tiles do not advance.
    """
    grid = replaced_facts(facts, tile_size, overlap).decode_tiles
    if grid is not None and (tile_size or overlap):
        _check_advance(grid, 0)
        _check_advance(grid, 1)


def unfit(options: Mapping[str, Any], facts: VaeFacts) -> tuple[str, str] | None:
    """See `StrategyEntry.unfit`."""
    try:
        check_geometry(facts, options.get("tile_size"), options.get("tile_overlap_factor"))
    except UnsupportedError as error:
        found, _, fix = str(error).partition("; ")
        return found, fix
    return None


def replaced_facts(facts: VaeFacts, tile_size: int | None, overlap: float | None) -> VaeFacts:
    """The facts of the same VAE with another tile geometry.

    Args:
        facts: the VAE's own.
        tile_size: a tile's side in pixels, or None for the VAE's own.
        overlap: the part of a tile that its neighbour covers too, or None for the VAE's own.

    Raises:
        UnsupportedError: the tile size is no multiple of the VAE's pixels per latent, or the class's own
            tiling has no overlap factor to replace, or tiles would not advance by whole latents.
    """
    if tile_size is None and overlap is None:
        return facts
    ratio = facts.spatial_ratio
    if tile_size is not None and (tile_size < ratio or tile_size % ratio):
        raise UnsupportedError(
            f"tile_size is {tile_size}; it must be a positive multiple of {ratio}, the pixels per latent of "
            f"{facts.vae_class}; nearest: {max(1, round(tile_size / ratio)) * ratio}"
        )
    decode = _replaced(facts, facts.decode_tiles, tile_size and tile_size // ratio, tile_size, overlap)
    _refuse_shifts(decode, ratio)
    return attrs.evolve(
        facts,
        # Whoever names a tile size wants tiles, whatever the VAE's own switch says.
        use_tiling=facts.use_tiling or tile_size is not None,
        decode_tiles=decode,
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
    replaced = TileGrid.overlapping(
        (tile, tile) if tile else grid.tile, (out_tile, out_tile) if out_tile else own_out, overlap
    )
    # How clips are cut in time, and the other ways of the class, are as before.
    return attrs.evolve(
        grid,
        tile=replaced.tile,
        step=replaced.step,
        blend=replaced.blend,
        keep=replaced.keep,
        overlap=overlap,
        above=None,
    )


def _refuse_shifts(grid: TileGrid | None, ratio: int) -> None:
    """Refuse tiles that advance by less than is kept of them: what they join to would have another size.

    A class that has such attributes does so itself; here the geometry was asked for.

    Args:
        grid: the tiling of decode; that of encode has the same latents.
        ratio: pixels per latent.

    Raises:
        UnsupportedError: with the overlap that would work.
    """
    if grid is None or _advances_whole(grid, ratio):
        return
    tile, overlap, parts = grid.tile, grid.overlap or 0.0, math.gcd(*grid.tile)
    out = (tile[0] * ratio, tile[1] * ratio)
    larger = (part / parts for part in range(1, parts) if part > overlap * parts)
    fitting = [some for some in larger if _advances_whole(TileGrid.overlapping(tile, out, some), ratio)]
    remedy = f"tile_overlap_factor = {fitting[0]} does, or choose larger" if fitting else "choose larger"
    raise UnsupportedError(
        f"tiles of {tile[0]} x {tile[1]} latents that overlap by {overlap:g} do not advance by whole "
        f"latents; {remedy} ones"
    )


def _advances_whole(grid: TileGrid, ratio: int) -> bool:
    return grid.keep == (grid.step[0] * ratio, grid.step[1] * ratio)


def lay_tiles(facts: VaeFacts, work: Work) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The rows and columns of tiles for one piece of work; one tile where the VAE's tiling does not fire.

    Raises:
        UnsupportedError: the VAE's tiling is not known, fails in diffusers itself, makes no progress, or
            leaves a tile that the VAE cannot take.
    """
    grid = facts.tiles(work.direction)
    if grid is None:
        raise UnsupportedError(f"the tiling of {facts.vae_class} is not known; choose another strategy")
    fires = facts.cuts_sides(work.direction, work.shape)
    if fires and grid.broken:
        raise UnsupportedError(f"{facts.vae_class} cannot {work.direction} in tiles: {grid.broken}")
    rows, columns = _axis(facts, work, grid, 0, fires), _axis(facts, work, grid, 1, fires)
    latents = [span.length if work.direction == "decode" else span.out for span in (*rows, *columns)]
    if min(latents) < grid.least:
        raise UnsupportedError(
            f"{facts.vae_class} cannot {work.direction} {work.shape[-2]} x {work.shape[-1]}: a tile would "
            f"have a side of {min(latents)} latents, and it takes {grid.least} or more; change the size or "
            "the tiles"
        )
    return rows, columns


def _check_advance(grid: TileGrid, axis: int) -> None:
    """Refuse tiles that do not advance along an axis.

    Raises:
        UnsupportedError: with the overlap that would work.
    """
    tile, step = grid.tile[axis], grid.step[axis]
    if step < 1 or grid.keep[axis] < 1:
        factor = f" with an overlap factor of {grid.overlap}" if grid.overlap is not None else ""
        remedy = f"the factor must be at most {1 - 1 / tile:g}" if factor and tile else "choose larger tiles"
        raise UnsupportedError(f"tiles of {tile}{factor} advance by {step}; {remedy}")


def _axis(facts: VaeFacts, work: Work, grid: TileGrid, axis: int, fires: bool) -> tuple[Span, ...]:
    side, ratio = work.shape[axis - 2], facts.spatial_ratio
    if not fires:
        size = facts.out_length(work.direction, side)
        return (Span(0, side, size, size, 0, 0),)
    _check_advance(grid, axis)
    tile, step = grid.tile[axis], grid.step[axis]

    def out(length: int) -> int:
        padded = -(-length // facts.encode_unit) * facts.encode_unit if grid.pads else length
        return facts.out_length(work.direction, padded)

    limit = (side * ratio if work.direction == "decode" else side // ratio) if grid.crops else None
    spans = _spans(side, tile, step, grid.blend[axis], grid.keep[axis], out, limit)
    if spans[-1].out < 1:
        raise UnsupportedError(
            f"the last tile of a side of {side} has {spans[-1].length}, less than one latent of "
            f"{facts.spatial_ratio}: {facts.vae_class} cannot {work.direction} it; change the size by "
            f"{spans[-1].length} or the tile size"
        )
    return spans


def _spans(
    side: int, tile: int, step: int, blend: int, keep: int, out: Callable[[int], int], limit: int | None
) -> tuple[Span, ...]:
    spans: list[Span] = []
    for start in range(0, side, step):
        length = min(tile, side - start)
        size = out(length)
        before = spans[-1] if spans else None
        # Kept parts are laid end to end: where roundings make a step and a kept part differ, the whole
        # output is as much larger or smaller as diffusers' is.
        place = before.place + before.kept if before else 0
        if limit is not None and place >= limit:
            break  # nothing of this tile, nor of a later one, would stay
        spans.append(
            Span(
                start=start,
                length=length,
                out=size,
                kept=min(size, keep, size if limit is None else limit - place),
                place=place,
                blend=max(0, min(before.out, size, blend)) if before else 0,
            )
        )
    return tuple(spans)


def lay_frames(facts: VaeFacts, work: Work) -> tuple[Span, ...]:
    """The windows of frames of a clip that the VAE cuts in time; none where it runs in one piece.

    Raises:
        UnsupportedError: the windows make no progress, or hold frames that the VAE cannot take.
    """
    grid = facts.tiles(work.direction)
    if grid is None or grid.time is None or not facts.cuts_frames(work.direction, work.shape):
        return ()
    cut, frames = grid.time, work.shape[2]
    if cut.step < 1 or cut.keep < 1:
        raise UnsupportedError(
            f"windows of {cut.tile} frames of {facts.vae_class} advance by {cut.step}; choose a larger step"
        )
    limit = facts.out_frames(work.direction, frames)
    spans: list[Span] = []
    for start in range(0, frames, cut.step):
        first = not spans
        length = min(cut.tile + 1, frames - start)
        size = facts.out_frames(work.direction, length) - (0 if first else 1)
        place = 0 if first else spans[-1].place + spans[-1].kept
        kept = min(size, cut.keep + (1 if first else 0), limit - place)
        if kept < 1:
            break  # a last window of one frame, or what follows the whole clip
        skip = 0 if first or cut.drops == "last" else 1
        blend = 0 if first else max(0, min(spans[-1].out, size, cut.blend))
        spans.append(Span(start, length, size, kept, place, blend, skip))
    return tuple(spans)
