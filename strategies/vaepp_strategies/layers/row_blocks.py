"""Layers over a band in blocks of rows: what they need beside their input and output is a block's worth."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from vaepp_sdk.vae.plan import split_evenly
from vaepp_strategies.layers.norm import apply_statistics, merge_moments, moments
from vaepp_strategies.layers.reach import Reach, Window
from vaepp_strategies.layers.rows import RowMap, Rows, RowSource, read_rows, row_count

__all__ = [
    "Filled",
    "Recomputed",
    "activated",
    "block_moments",
    "convolve_beyond",
    "convolve_blocks",
    "convolve_in_place",
    "convolve_onto",
]

Finish = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Given a block of the output and its first and last row: the block to store."""


@attrs.define(eq=False, kw_only=True)
class Recomputed:
    """The output of a convolution, computed again whenever it is read; see `RowSource`.

    What was read last is held until the next read, which computes only the rows that are new: reads from the
    first row to the last repeat nothing.

    Attributes:
        rows: the convolution's input.
        convolve: convolves rows without padding along their axis.
        window: the convolution along that axis; its stride is 1.
        length: rows of the output.
    """

    rows: Rows
    convolve: RowMap
    window: Window
    length: int
    _held: torch.Tensor | None = attrs.field(default=None, init=False)
    _first: int = attrs.field(default=0, init=False)

    def read(self, first: int, last: int) -> torch.Tensor:
        """The rows from `first` up to, not including, `last`; not to be written to."""
        axis, held, start = self.rows.axis, self._held, self._first
        end = start + (0 if held is None else held.shape[axis])
        if held is None or not start <= first < end:
            self._held = held = None  # before the next rows are made
            self._held = self._convolved(first, last)
        elif end < last:
            kept = held.narrow(axis, first - start, end - first).clone()
            self._held = held = None
            self._held = torch.cat([kept, self._convolved(end, last)], axis)
        else:
            return held.narrow(axis, first - start, last - first)
        self._first = first
        return self._held

    def edges(self, reach: Reach) -> torch.Tensor:
        """The first rows, as many as `reach` is below, and the last, as many as it is above; at least one."""
        last = self.read(self.length - max(1, reach.above), self.length).clone()
        if not reach.below:
            return last
        return torch.cat([self.read(0, reach.below), last], self.rows.axis)

    def beyond(self, give: Reach) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As `convolve_beyond`."""
        return convolve_beyond(self.rows, self.convolve, self.window, self.length, give)

    def _convolved(self, first: int, last: int) -> torch.Tensor:
        return self.convolve(_read(self.rows, self.window, first, last))


def block_moments(values: torch.Tensor | RowSource, groups: int, axis: int, blocks: int) -> torch.Tensor:
    """As `norm.moments`, with float64 copies of one block only; equal up to float64's rounding."""
    counts, parts = [], []
    for first, size in split_evenly(row_count(values, axis), blocks):
        piece = read_rows(values, axis, first, first + size)
        counts.append(piece.numel() // (piece.shape[0] * groups))
        parts.append(moments(piece, groups))
        del piece  # before the next one is made
    mean, variance = merge_moments(counts, parts)
    return torch.stack([mean, variance * sum(counts)])


def activated(
    norm: nn.GroupNorm, activation: nn.Module, mean: torch.Tensor, variance: torch.Tensor
) -> RowMap:
    """Normalisation with known statistics and the activation behind it, row by row.

    Args:
        norm: the layer.
        activation: works position by position.
        mean: `(batch, groups)`, float64.
        variance: likewise.
    """

    def layer(rows: torch.Tensor) -> torch.Tensor:
        normed = apply_statistics(norm, rows, mean, variance)
        if type(activation) is nn.SiLU:
            return F.silu(normed, inplace=True)  # nobody else holds it
        result: torch.Tensor = activation(normed)
        return result

    return layer


@attrs.define(eq=False)
class Filled:
    """A band that is filled a block at a time; the first block says how it looks.

    Attributes:
        axis: the axis of the rows.
        length: how many rows it will have.
    """

    axis: int
    length: int
    _whole: torch.Tensor | None = attrs.field(default=None, init=False)

    @property
    def whole(self) -> torch.Tensor:
        """The band, once its first block is there."""
        assert self._whole is not None, "a band has rows"
        return self._whole

    def put(self, block: torch.Tensor, first: int) -> None:
        """Store a block whose first row is `first`."""
        if self._whole is None:
            shape = list(block.shape)
            shape[self.axis] = self.length
            self._whole = block.new_empty(shape)
        self._whole.narrow(self.axis, first, block.shape[self.axis]).copy_(block)


def convolve_blocks(
    rows: Rows,
    convolve: RowMap,
    window: Window,
    length: int,
    blocks: int,
    beside: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Convolve a band.

    Args:
        rows: the convolution's input.
        convolve: convolves rows without padding along their axis.
        window: the convolution along that axis.
        length: rows of the output.
        blocks: how many blocks it is made in.
        beside: called for each block, with its first row and its size, after it was made.

    Returns:
        The band's output.
    """
    out = Filled(rows.axis, length)
    for first, size in split_evenly(length, blocks):
        out.put(convolve(_read(rows, window, first, first + size)), first)
        if beside is not None:
            beside(first, size)
    return out.whole


def convolve_beyond(
    rows: Rows, convolve: RowMap, window: Window, length: int, give: Reach
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The output's rows of `give` above and below a band; None where the picture ends, or none are asked."""
    above = below = None
    if give.above and rows.above is not None:
        above = convolve(_read(rows, window, -give.above, 0))
    if give.below and rows.below is not None:
        below = convolve(_read(rows, window, length, length + give.below))
    return above, below


def convolve_onto(
    out: torch.Tensor, rows: Rows, convolve: RowMap, window: Window, blocks: int, finish: Finish
) -> None:
    """Convolve a band, and write the output over a tensor that the next blocks of `rows` are not made of.

    Args:
        out: takes the output.
        rows: the convolution's input.
        convolve: convolves rows without padding along their axis.
        window: the convolution along that axis.
        blocks: how many blocks it is made in.
        finish: what is done to each block of the output before it is stored.
    """
    for first, size in split_evenly(out.shape[rows.axis], blocks):
        block = convolve(_read(rows, window, first, first + size))
        out.narrow(rows.axis, first, size).copy_(finish(block, first, size))
        del block


def convolve_in_place(rows: Rows, convolve: RowMap, window: Window, blocks: int, finish: Finish) -> None:
    """Convolve a band, with as many channels out as in and stride 1, and write the output over it.

    Args:
        rows: the convolution's input.
        convolve: convolves rows without padding along their axis.
        window: the convolution along that axis.
        blocks: how many blocks it is made in.
        finish: what is done to each block of the output before it is stored.
    """
    band = rows.band
    assert isinstance(band, torch.Tensor), "only what is stored can be written over"
    for first, size in split_evenly(band.shape[rows.axis], blocks):
        block = convolve(_read(rows, window, first, first + size))
        rows.keep(first + size, window.lead)
        band.narrow(rows.axis, first, size).copy_(finish(block, first, size))
        del block


def _read(rows: Rows, window: Window, first: int, last: int) -> torch.Tensor:
    """The input's rows that the output's rows from `first` to `last` are made of."""
    start = first * window.stride - window.lead
    return rows.read(start, start + (last - 1 - first) * window.stride + window.kernel)
