"""Who runs which tile, and which strips move: pure arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import attrs

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import landing_moves
from vaepp_sdk.vae.plan import Box, Move, Window, Work, WorkPlan
from vaepp_strategies.tile_deal import deal
from vaepp_strategies.tile_geometry import Span, lay_frames, lay_tiles
from vaepp_strategies.traced_memory import untiled_bytes

__all__ = ["Seam", "TilePlan", "plan_tiles"]

_FLOAT32 = 4
"""Its bytes."""


@attrs.frozen
class Seam:
    """Where one tile is blended into a later one.

    Attributes:
        first: the earlier tile's window index.
        second: the later tile's window index.
        dim: -2 where the later tile stands below, -1 where it stands to the right, -3 where it is the same
            tile of the next window of frames.
        extent: the rows, columns or frames blended.
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
    at the same time once the level before is finished. A clip that is cut in time has every tile once in each
    window of frames; the windows are joined last, what is kept of a tile with the same tile of the window
    before.

    Attributes:
        rows: the tiles' rows, each a span.
        columns: the tiles' columns, each a span.
        times: the windows of frames, each a span; none where time is not cut.
        tiled: whether rows and columns are cut.
        grain: how many neighbouring rows or columns share one weight of the blend.
        crossings: the seams between tiles of different owners, by level of the earlier tile, then by window
            of frames.
    """

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    times: tuple[Span, ...]
    tiled: bool
    grain: int
    crossings: tuple[tuple[Seam, ...], ...]

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return len(self.rows) + len(self.columns) - 1

    def level(self, index: int) -> int:
        """The level of one tile."""
        return sum(self._place(index)[1:])

    def time(self, index: int) -> int:
        """The window of frames of one tile."""
        return self._place(index)[0]

    def seams_into(self, index: int) -> Iterator[Seam]:
        """The seams with the tile above and the tile to the left, in the order in which they are blended."""
        _, row, column = self._place(index)
        if self.rows[row].blend:
            yield Seam(index - len(self.columns), index, -2, self.rows[row].blend)
        if self.columns[column].blend:
            yield Seam(index - 1, index, -1, self.columns[column].blend)

    def time_seams(self, time: int) -> tuple[Seam, ...]:
        """The seams of one window of frames with the window before it."""
        tiles, extent = len(self.rows) * len(self.columns), self.times[time].blend
        if not extent:
            return ()
        return tuple(
            Seam(index - tiles, index, -3, extent) for index in range(time * tiles, (time + 1) * tiles)
        )

    def tile_shape(self, index: int) -> tuple[int, ...]:
        """The output shape of one tile before it is cropped, but for dropped frames."""
        time, row, column = self._place(index)
        front = (*self.out_shape[:2], self.times[time].out) if self.times else self.out_shape[:-2]
        return (*front, self.rows[row].out, self.columns[column].out)

    def strip_shape(self, seam: Seam) -> tuple[int, ...]:
        """The shape of what the later tile's owner needs of the earlier tile."""
        shape = list(self.tile_shape(seam.first))
        if seam.dim == -3:  # by then, rows and columns are cropped
            shape[-2:] = self.windows[seam.first].target.shape_in(self.out_shape)[-2:]
        shape[seam.dim] = seam.extent
        return tuple(shape)

    def _place(self, index: int) -> tuple[int, int, int]:
        """A tile's window of frames, row and column; tiles are numbered in this order."""
        rest, column = divmod(index, len(self.columns))
        time, row = divmod(rest, len(self.rows))
        return time, row, column


def plan_tiles(facts: VaeFacts, work: Work) -> TilePlan:
    """Deal the tiles and list every message.

    Raises:
        UnsupportedError: the geometry cannot be laid.
    """
    rows, columns = lay_tiles(facts, work)
    times = lay_frames(facts, work)
    grid = facts.tiles(work.direction)
    assert grid is not None  # else no tiles were laid
    tiles = [
        _boxes(time, row, column) for time, row, column in itertools.product(times or (None,), rows, columns)
    ]
    owners = deal([source.volume for source, _ in tiles], work.ranks)
    windows = tuple(
        Window(index, owner, *boxes) for index, (owner, boxes) in enumerate(zip(owners, tiles, strict=True))
    )
    front = facts.out_front(work.direction, work.shape)
    if times:
        front = (*front[:2], _end(times))
    plan = TilePlan(
        strategy="tile",
        work=work,
        windows=windows,
        out_shape=(*front, _end(rows), _end(columns)),
        moves=(),
        peak_bytes=(),
        rows=rows,
        columns=columns,
        times=times,
        tiled=facts.cuts_sides(work.direction, work.shape),
        grain=grid.grain,
        crossings=(),
    )
    plan = attrs.evolve(plan, crossings=_crossings(plan))
    return attrs.evolve(plan, moves=_moves(plan), peak_bytes=_peaks(plan, facts))


def _boxes(time: Span | None, row: Span, column: Span) -> tuple[Box, Box]:
    """What one tile reads, and what is kept of it."""
    read = (time.start, time.length) if time else None
    kept = (time.place, time.kept) if time else None
    source = Box(row.start, column.start, row.length, column.length, read)
    return source, Box(row.place, column.place, row.kept, column.kept, kept)


def _end(spans: Sequence[Span]) -> int:
    """The whole output's length along one axis."""
    return spans[-1].place + spans[-1].kept


def _crossings(plan: TilePlan) -> tuple[tuple[Seam, ...], ...]:
    groups: list[list[Seam]] = [[] for _ in range(plan.levels)]
    for window in plan.windows:
        for seam in plan.seams_into(window.index):
            groups[plan.level(seam.first)].append(seam)
    groups += [list(plan.time_seams(time)) for time in range(1, len(plan.times))]
    owner = [window.owner for window in plan.windows]
    return tuple(tuple(seam for seam in group if owner[seam.first] != owner[seam.second]) for group in groups)


def _moves(plan: TilePlan) -> tuple[Move, ...]:
    owner = [window.owner for window in plan.windows]
    seams = tuple(
        Move(level, "seam", owner[seam.first], owner[seam.second], _nbytes(plan, plan.strip_shape(seam)))
        for level, crossing in enumerate(plan.crossings)
        for seam in crossing
    )
    pieces = {window.index: plan.piece_bytes(window) for window in plan.windows}
    work = plan.work
    return seams + landing_moves(plan.windows, pieces, work.output, work.world_size, len(plan.crossings))


def _peaks(plan: TilePlan, facts: VaeFacts) -> tuple[int, ...]:
    return tuple(_peak(plan, facts, rank) for rank in range(plan.work.ranks))


def _peak(plan: TilePlan, facts: VaeFacts, rank: int) -> int:
    """A rank's live bytes while it runs its tiles, blends them, or lands the pieces, whichever is most."""
    done, running = 0, 0
    for window in plan.owned(rank):
        running = max(running, done + _running(plan, facts, window.source))
        done += _nbytes(plan, plan.tile_shape(window.index))
    own = sum(_nbytes(plan, plan.piece_shape(window)) for window in plan.owned(rank))
    return max(running, done + _blending(plan, rank), own + _landing(plan, rank))


def _blending(plan: TilePlan, rank: int) -> int:
    """What stands beside all tiles of a rank while they are blended and cropped."""
    owner = [window.owner for window in plan.windows]
    inside = [seam for window in plan.windows for seam in plan.seams_into(window.index)]
    between = [seam for time in range(1, len(plan.times)) for seam in plan.time_seams(time)]

    def strips(seams: Iterable[Seam], *, sent: bool) -> list[int]:
        mine = (seam for seam in seams if owner[seam.second] == rank or (sent and owner[seam.first] == rank))
        return [_nbytes(plan, plan.strip_shape(seam)) for seam in mine]

    widest = max(strips([*inside, *between], sent=False), default=0)
    travelling = max((sum(strips(crossing, sent=True)) for crossing in plan.crossings), default=0)
    cropped = max((_nbytes(plan, plan.piece_shape(window)) for window in plan.owned(rank)), default=0)
    # Two products of a strip; each is made in float32 and then rounded, where the dtype is narrower.
    products = 2 if plan.work.itemsize >= _FLOAT32 else 4
    return travelling + max(products * widest, cropped)


def _running(plan: TilePlan, facts: VaeFacts, source: Box) -> int:
    """Live bytes while one tile is decoded or encoded; of a picture, by the estimate that needs no trace."""
    work = attrs.evolve(plan.work, shape=source.shape_in(plan.work.shape))
    return untiled_bytes(facts, work, traced=facts.temporal_ratio > 0)


def _landing(plan: TilePlan, rank: int) -> int:
    """What stands beside a rank's own pieces: where the output lands, all of it, and what arrives for it."""
    work = plan.work
    if work.output == "sharded" or (work.output == "rank0" and rank):
        return 0
    return 2 * work.landed_bytes(plan.out_shape) - sum(plan.piece_bytes(one) for one in plan.owned(rank))


def _nbytes(plan: TilePlan, shape: Sequence[int]) -> int:
    return math.prod(shape) * plan.work.itemsize
