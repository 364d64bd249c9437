"""Who runs which tile, and which strips move: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import landing_moves
from vaepp_sdk.vae.plan import Box, Move, Window, Work, WorkPlan
from vaepp_strategies.tile_deal import deal
from vaepp_strategies.tile_geometry import Span, lay_tiles

__all__ = ["Seam", "TilePlan", "plan_tiles"]


@attrs.frozen
class Seam:
    """Where one tile is blended into a later one.

    Attributes:
        first: the earlier tile's window index.
        second: the later tile's window index.
        dim: -2 where the later tile stands below, -1 where it stands to the right.
        extent: the rows or columns blended.
    """

    first: int
    second: int
    dim: int
    extent: int


@attrs.frozen(kw_only=True)
class TilePlan(WorkPlan):
    """A work plan whose windows are tiles.

    diffusers blends tile after tile in row-major order, each with the finished tile above, then with the
    finished tile to its left. Nothing else is read, so all tiles of one level, row + column, can be blended
    at the same time once the level before is finished.

    Attributes:
        rows: the tiles' rows, each a span.
        columns: the tiles' columns, each a span.
        crossings: the seams between tiles of different owners, by level of the earlier tile.
    """

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    crossings: tuple[tuple[Seam, ...], ...]

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return len(self.rows) + len(self.columns) - 1

    def level(self, index: int) -> int:
        """The level of one tile."""
        return sum(divmod(index, len(self.columns)))

    def seams_into(self, index: int) -> Iterator[Seam]:
        """The seams with the tile above and the tile to the left, in the order in which they are blended."""
        return _seams_into(index, self.rows, self.columns)

    def tile_shape(self, index: int) -> tuple[int, ...]:
        """The output shape of one tile before it is cropped."""
        row, column = divmod(index, len(self.columns))
        return (*self.out_shape[:-2], self.rows[row].out, self.columns[column].out)

    def strip_shape(self, seam: Seam) -> tuple[int, ...]:
        """The shape of what the later tile's owner needs of the earlier tile."""
        *front, height, width = self.tile_shape(seam.first)
        return (*front, seam.extent, width) if seam.dim == -2 else (*front, height, seam.extent)


def plan_tiles(facts: VaeFacts, work: Work) -> TilePlan:
    """Deal the tiles and list every message.

    Raises:
        UnsupportedError: the geometry cannot be laid.
    """
    rows, columns = lay_tiles(facts, work)
    owners = deal([row.length * column.length for row in rows for column in columns], work.ranks)
    windows = tuple(
        _window(index, owner, rows[index // len(columns)], columns[index % len(columns)])
        for index, owner in enumerate(owners)
    )
    sides = (rows[-1].place + rows[-1].kept, columns[-1].place + columns[-1].kept)
    plan = TilePlan(
        strategy="tile",
        work=work,
        windows=windows,
        out_shape=(*facts.out_shape(work.direction, work.shape)[:-2], *sides),
        moves=(),
        peak_bytes=(),
        rows=rows,
        columns=columns,
        crossings=_crossings(rows, columns, owners),
    )
    return attrs.evolve(plan, moves=_moves(plan), peak_bytes=_peaks(plan, facts))


def _window(index: int, owner: int, row: Span, column: Span) -> Window:
    source = Box(row.start, column.start, row.length, column.length)
    return Window(index, owner, source, Box(row.place, column.place, row.kept, column.kept))


def _seams_into(index: int, rows: Sequence[Span], columns: Sequence[Span]) -> Iterator[Seam]:
    row, column = divmod(index, len(columns))
    if rows[row].blend:
        yield Seam(index - len(columns), index, -2, rows[row].blend)
    if columns[column].blend:
        yield Seam(index - 1, index, -1, columns[column].blend)


def _crossings(
    rows: Sequence[Span], columns: Sequence[Span], owners: Sequence[int]
) -> tuple[tuple[Seam, ...], ...]:
    levels: list[list[Seam]] = [[] for _ in range(len(rows) + len(columns) - 1)]
    for index in range(len(owners)):
        for seam in _seams_into(index, rows, columns):
            if owners[seam.first] != owners[seam.second]:
                levels[sum(divmod(seam.first, len(columns)))].append(seam)
    return tuple(tuple(level) for level in levels)


def _moves(plan: TilePlan) -> tuple[Move, ...]:
    owner = [window.owner for window in plan.windows]
    seams = tuple(
        Move(level, "seam", owner[seam.first], owner[seam.second], _nbytes(plan, plan.strip_shape(seam)))
        for level, crossing in enumerate(plan.crossings)
        for seam in crossing
    )
    pieces = {window.index: plan.piece_bytes(window) for window in plan.windows}
    work = plan.work
    return seams + landing_moves(plan.windows, pieces, work.output, work.world_size, plan.levels)


def _peaks(plan: TilePlan, facts: VaeFacts) -> tuple[int, ...]:
    return tuple(_peak(plan, facts, rank) for rank in range(plan.work.ranks))


def _peak(plan: TilePlan, facts: VaeFacts, rank: int) -> int:
    """A rank's live bytes while it runs its last tile, or while the pieces land if that is more."""
    owned = plan.owned(rank)
    tiles = sum(_nbytes(plan, plan.tile_shape(window.index)) for window in owned)
    pixels = max((_pixels(plan, window) for window in owned), default=0)
    values = int(plan.work.shape[0] * pixels * facts.peak_values_per_pixel)
    landed = plan.work.output == "all" or (plan.work.output == "rank0" and rank == 0)
    whole = _nbytes(plan, plan.out_shape) if landed else 0
    pieces = sum(plan.piece_bytes(window) for window in owned)
    return max(tiles + values * plan.work.itemsize, pieces + whole)


def _pixels(plan: TilePlan, window: Window) -> int:
    """The picture's side of one tile: what it reads to encode, what it yields to decode."""
    if plan.work.direction == "encode":
        return window.source.area
    return math.prod(plan.tile_shape(window.index)[-2:])


def _nbytes(plan: TilePlan, shape: Sequence[int]) -> int:
    return math.prod(shape) * plan.work.itemsize
