"""Work plans: who does what, and what must move. Pure data, computed by every rank alone.

Every rank computes the same plan from facts that all ranks share, so no metadata is ever exchanged; the same
plan feeds execution, tests and reports.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import attrs

from vaepp_sdk.vae.facts import Direction

__all__ = ["EVERYONE", "Box", "Move", "Output", "Window", "Work", "WorkPlan", "split_evenly"]

Output = Literal["rank0", "all", "sharded"]

EVERYONE = -1
"""The destination of a move that reaches every rank of the DiT group (a broadcast)."""


@attrs.frozen
class Box:
    """A rectangle of rows and columns, through all frames or through some of them.

    Attributes:
        top: its first row.
        left: its first column.
        height: its rows.
        width: its columns.
        frames: its first frame and how many; None is all of them, or no frame axis.
    """

    top: int
    left: int
    height: int
    width: int
    frames: tuple[int, int] | None = None

    @property
    def area(self) -> int:
        """Rows times columns."""
        return self.height * self.width

    @property
    def volume(self) -> int:
        """Rows times columns, times its frames where it names them."""
        return self.area * (self.frames[1] if self.frames else 1)

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rectangle as row and column slices."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """Slices of a tensor's last three axes, as in `tensor[(..., *box.index)]`.

        Where the box names no frames the first takes all, be it of frames or, in a picture, of channels.
        """
        frames = slice(None) if self.frames is None else slice(self.frames[0], sum(self.frames))
        return frames, *self.slices

    def shape_in(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this part of a tensor of shape `(batch, channels, [frames,] rows, columns)`."""
        front = tuple(whole[:-2]) if self.frames is None else (*whole[:-3], self.frames[1])
        return (*front, self.height, self.width)


@attrs.frozen
class Window:
    """One rank's piece of work.

    Attributes:
        index: the window's number; windows are numbered in row-major order.
        owner: the rank that computes it.
        source: what it reads, in input units, context included.
        target: what it contributes to the output, in output units. The targets of all windows cover the
            output once.
    """

    index: int
    owner: int
    source: Box
    target: Box


@attrs.frozen
class Move:
    """One message.

    Attributes:
        round: moves of one round are posted together.
        kind: what it carries, as in `seam` or `output`.
        src: the sending rank.
        dst: the receiving rank, or `EVERYONE`.
        nbytes: its exact size.
    """

    round: int
    kind: str
    src: int
    dst: int
    nbytes: int


@attrs.frozen(kw_only=True)
class Work:
    """What is asked of a strategy.

    Attributes:
        direction: decode or encode.
        shape: the input's shape, `(batch, channels, [frames,] rows, columns)`.
        itemsize: bytes per value of the computation's dtype.
        ranks: how many ranks share the work: the VAE PP size.
        world_size: the size of the DiT group.
        output: where the result lands.
        landed_itemsize: bytes per value of what lands, where pieces are finished before they travel; None
            where they land as they were computed.
    """

    direction: Direction
    shape: tuple[int, ...]
    itemsize: int
    ranks: int
    world_size: int
    output: Output
    landed_itemsize: int | None = None

    def landed_bytes(self, shape: Sequence[int]) -> int:
        """The size of so much of the output as it lands."""
        return math.prod(shape) * (self.itemsize if self.landed_itemsize is None else self.landed_itemsize)


@attrs.frozen(kw_only=True)
class WorkPlan:
    """Who does what. Strategies subclass it with what they need besides.

    Attributes:
        strategy: the strategy's name.
        work: what was asked.
        windows: every piece of work.
        out_shape: the whole output's shape.
        moves: every message that decoding or encoding will send, in order of rounds.
        peak_bytes: predicted live bytes of each VAE rank at its peak, weights excluded: an estimate.
    """

    strategy: str
    work: Work
    windows: tuple[Window, ...]
    out_shape: tuple[int, ...]
    moves: tuple[Move, ...]
    peak_bytes: tuple[int, ...]

    def owned(self, rank: int) -> tuple[Window, ...]:
        """The windows of one rank, in row-major order."""
        return tuple(window for window in self.windows if window.owner == rank)

    def cost(self, rank: int) -> int:
        """The input rows times columns times frames one rank works through, context included."""
        return sum(window.source.volume for window in self.owned(rank))

    def bytes_sent(self, rank: int | None = None) -> int:
        """Bytes one rank sends, or all ranks together; a broadcast counts once for each receiver."""
        receivers = self.work.world_size - 1
        return sum(
            move.nbytes * (receivers if move.dst == EVERYONE else 1)
            for move in self.moves
            if rank is None or move.src == rank
        )

    def piece_shape(self, window: Window) -> tuple[int, ...]:
        """The shape of one window's part of the output."""
        return window.target.shape_in(self.out_shape)

    def piece_bytes(self, window: Window) -> int:
        """The size of one window's part of the output, as it lands."""
        return self.work.landed_bytes(self.piece_shape(window))

    @property
    def digest(self) -> str:
        """A short fingerprint: equal plans have equal digests on every rank."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def split_evenly(length: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Cut `length` into at most `parts` neighbouring pieces `(start, size)` whose sizes differ by at most 1.

    None is empty: where `length < parts` there are `length` pieces of size 1. Larger pieces come first.
    """
    count = max(1, min(length, parts))
    size, extra = divmod(length, count)
    sizes: Sequence[int] = [size + 1] * extra + [size] * (count - extra)
    starts = [sum(sizes[:index]) for index in range(count)]
    return tuple(zip(starts, sizes, strict=True))
