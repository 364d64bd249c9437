"""Runs a tile plan: tensors and messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vaepp_sdk.parallel.view import Recv, Send, VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed, land
from vaepp_sdk.vae.plan import Window, Work
from vaepp_strategies.blend import blend_into
from vaepp_strategies.tile_geometry import check_geometry, replaced_facts
from vaepp_strategies.tile_plan import Seam, TilePlan, plan_tiles

__all__ = ["TileStrategy"]

Tiles = dict[int, torch.Tensor]
"""Tiles, or what is kept of them, by window index."""

Strips = dict[Seam, torch.Tensor]
"""What other ranks' tiles have sent, by seam."""


class TileStrategy:
    """Runs the VAE's own tiles on several ranks; bit-identical to its tiled decode and encode on one.

    Args:
        tile_size: a tile's side in pixels, or None for the VAE's own.
        tile_overlap_factor: the part of a tile that its neighbour covers too, or None for the VAE's own.
    """

    def __init__(self, tile_size: int | None = None, tile_overlap_factor: float | None = None) -> None:
        self._tile_size = tile_size
        self._overlap = tile_overlap_factor

    def plan(self, facts: VaeFacts, work: Work) -> TilePlan:
        """See `Strategy.plan`."""
        return plan_tiles(replaced_facts(facts, self._tile_size, self._overlap), work)

    def check(self, adapter: VaeAdapter) -> None:
        """See `Strategy.check`: tiles need nothing of a VAE's layers; what was asked of them must fit it."""
        check_geometry(adapter.facts(), self._tile_size, self._overlap)

    def decode(self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: TilePlan) -> Landed:
        """See `Strategy.decode`."""
        adapter = adapter.on_tiles() if plan.tiled else adapter
        pieces = _pieces(adapter.decode_window, latent, group, plan)
        for index in pieces:
            pieces[index] = adapter.finish_decode(pieces[index])
        return land(pieces, group, plan, latent.dtype, latent.device)

    def encode(self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: TilePlan) -> Landed:
        """See `Strategy.encode`."""
        adapter = adapter.on_tiles() if plan.tiled else adapter
        pieces = _pieces(adapter.encode_window, picture, group, plan)
        return land(pieces, group, plan, picture.dtype, picture.device)


@torch.no_grad()
def _pieces(
    run_window: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, group: VaeGroup, plan: TilePlan
) -> Tiles:
    """Run this rank's tiles, blend them and keep what stays of each."""
    owned = plan.owned(group.rank)
    tiles: Tiles = {}
    for done, window in enumerate(owned, start=1):
        tiles[window.index] = _without_dropped(
            run_window(value[(..., *window.source.index)]), window.index, plan
        )
        group.progress(done, len(owned))
    by_level: list[list[Window]] = [[] for _ in range(plan.levels)]
    for window in owned:
        by_level[plan.level(window.index)].append(window)
    pieces: Tiles = {}
    strips: Strips = {}
    for level, windows in enumerate(by_level):
        _blend(windows, tiles, strips, plan)
        strips = _passed_on(tiles, level, value, group, plan)
        # This level has read what it needs of the one before.
        for window in by_level[level - 1] if level else ():
            pieces[window.index] = _kept(tiles.pop(window.index), window)
    for window in by_level[-1]:
        pieces[window.index] = _kept(tiles.pop(window.index), window)
    _join_times(pieces, value, group, plan)
    return pieces


def _without_dropped(tile: torch.Tensor, index: int, plan: TilePlan) -> torch.Tensor:
    """The output frames of one tile that take part in the joining of windows of frames."""
    if not plan.times:
        return tile
    span = plan.times[plan.time(index)]
    return tile.narrow(-3, span.skip, span.out)


def _join_times(pieces: Tiles, like: torch.Tensor, group: VaeGroup, plan: TilePlan) -> None:
    """Blend what is kept of each tile with the same tile of the window of frames before; then crop it."""
    for time in range(1, len(plan.times)):
        strips = _passed_on(pieces, plan.levels + time - 1, like, group, plan)
        for seam in plan.time_seams(time):
            if seam.second in pieces:
                strip = strips[seam] if seam in strips else _strip(pieces[seam.first], seam)
                blend_into(strip, pieces[seam.second], seam.dim)
    for window in plan.owned(group.rank) if plan.times else ():
        frames = plan.times[plan.time(window.index)].kept
        pieces[window.index] = pieces[window.index].narrow(-3, 0, frames).contiguous()


def _blend(windows: Sequence[Window], tiles: Tiles, strips: Strips, plan: TilePlan) -> None:
    """Blend the tiles of one level, in place, with the tiles above and to the left of them.

    Args:
        windows: this rank's tiles of the level.
        tiles: this rank's tiles.
        strips: what other ranks' tiles of the level before have sent.
        plan: the plan.
    """
    for window in windows:
        for seam in plan.seams_into(window.index):
            strip = strips[seam] if seam in strips else _strip(tiles[seam.first], seam)
            blend_into(strip, tiles[window.index], seam.dim, plan.grain)


def _passed_on(tiles: Tiles, level: int, like: torch.Tensor, group: VaeGroup, plan: TilePlan) -> Strips:
    """Send the strips of a finished level, or window of frames, to their readers; returns what arrives."""
    sends: list[Send] = []
    recvs: list[Recv] = []
    arrived: Strips = {}
    for seam in plan.crossings[level]:
        source, reader = plan.windows[seam.first].owner, plan.windows[seam.second].owner
        if source == group.rank:
            sends.append(Send(_strip(tiles[seam.first], seam).contiguous(), reader))
        elif reader == group.rank:
            arrived[seam] = like.new_empty(plan.strip_shape(seam))
            recvs.append(Recv(arrived[seam], source))
    group.exchange(sends, recvs, f"tile seams, level {level}")
    return arrived


def _strip(tile: torch.Tensor, seam: Seam) -> torch.Tensor:
    """The last rows or columns of a tile, as a view."""
    return tile.narrow(seam.dim, tile.shape[seam.dim] - seam.extent, seam.extent)


def _kept(tile: torch.Tensor, window: Window) -> torch.Tensor:
    """The part that stays, copied where it is not all, so that the rest of the tile can be freed."""
    part = tile[..., : window.target.height, : window.target.width]
    return part if part.shape == tile.shape else part.contiguous()
