"""Reads the rows of a layer's input a block at a time, from a band, its neighbours' rows, and beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
import torch

from vaepp_strategies.layers.bands import Halo

__all__ = ["RowMap", "RowSource", "Rows", "read_rows", "row_count", "unchanged"]

RowMap = Callable[[torch.Tensor], torch.Tensor]


class RowSource(Protocol):
    """A band that is not stored; its rows are computed when they are read."""

    @property
    def length(self) -> int:
        """How many rows it has."""
        ...

    def read(self, first: int, last: int) -> torch.Tensor:
        """The rows from `first` up to, not including, `last`; not to be written to."""
        ...


def row_count(band: torch.Tensor | RowSource, axis: int) -> int:
    """How many rows a band has."""
    return band.shape[axis] if isinstance(band, torch.Tensor) else band.length


def read_rows(band: torch.Tensor | RowSource, axis: int, first: int, last: int) -> torch.Tensor:
    """Some of a band's rows; not to be written to."""
    if isinstance(band, torch.Tensor):
        return band.narrow(axis, first, last - first)
    return band.read(first, last)


def unchanged(rows: torch.Tensor) -> torch.Tensor:
    """The rows as they are."""
    return rows


@attrs.define(eq=False, kw_only=True)
class Rows:
    """The input of a layer, made from a band row by row when it is read; no copy of all of it exists.

    Rows count from the band's first one, after `layer`; those above it are negative. Beyond the picture they
    are zero, as a convolution pads them.

    Attributes:
        band: what this rank holds, or makes again whenever it is read.
        axis: the axis of the rows: -2, or -1 where columns are split.
        halo: holds the neighbours' rows around the band.
        above: those above it; None at the picture's edge.
        below: those below it.
        layer: makes the input's rows of the band's, each row from its own.
        factor: rows that `layer` makes of one.
    """

    band: torch.Tensor | RowSource
    axis: int
    halo: Halo
    above: torch.Tensor | None = attrs.field(init=False)
    below: torch.Tensor | None = attrs.field(init=False)
    layer: RowMap = unchanged
    factor: int = 1
    _kept: torch.Tensor | None = attrs.field(default=None, init=False)
    _kept_end: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        """Wait for the neighbours' rows."""
        self.above, self.below = self.halo.rows()

    def read(self, first: int, last: int) -> torch.Tensor:
        """The input's rows from `first` up to, not including, `last`; at least one lies in the picture."""
        start, end = max(first, -_length(self.above, self.axis) * self.factor), last
        end = min(last, (row_count(self.band, self.axis) + _length(self.below, self.axis)) * self.factor)
        origin = start // self.factor
        rows = self.layer(self._raw(origin, -(-end // self.factor)))
        rows = rows.narrow(self.axis, start - origin * self.factor, end - start)
        if (first, last) == (start, end):
            return rows
        return torch.cat(
            [_zeros(rows, self.axis, start - first), rows, _zeros(rows, self.axis, last - end)], self.axis
        )

    def keep(self, end: int, count: int) -> None:
        """Copy the `count` rows before `end`: the band's rows before it will be written over.

        Later reads may go back as far as these rows.
        """
        first = max(end - count, -_length(self.above, self.axis))
        self._kept, self._kept_end = self._raw(first, end).clone(), end

    def _raw(self, first: int, last: int) -> torch.Tensor:
        """Rows as the band and its neighbours have them."""
        length = row_count(self.band, self.axis)
        pieces = []
        kept, begin = _length(self._kept, self.axis), self._kept_end
        if self._kept is not None and first < begin:
            pieces.append(self._kept.narrow(self.axis, first - begin + kept, min(last, begin) - first))
            first = begin
        if self.above is not None and first < 0:
            pieces.append(
                self.above.narrow(self.axis, self.above.shape[self.axis] + first, min(last, 0) - first)
            )
        inside = max(first, 0), min(last, length)
        if inside[0] < inside[1]:
            pieces.append(read_rows(self.band, self.axis, *inside))
        if self.below is not None and last > length:
            start = max(first, length)
            pieces.append(self.below.narrow(self.axis, start - length, last - start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)


def _length(rows: torch.Tensor | None, axis: int) -> int:
    return 0 if rows is None else rows.shape[axis]


def _zeros(like: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    shape = list(like.shape)
    shape[axis] = count
    return like.new_zeros(shape)
