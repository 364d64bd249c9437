"""A band of a clip and all that stands around it in one tensor, which a convolution reads without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

__all__ = ["PadMode", "surrounded"]

PadMode = Literal["constant", "replicate", "reflect"]
"""Zeros, copies of the edge, or what stands behind the edge, mirrored."""

Pair = tuple[int, int]


def surrounded(
    band: torch.Tensor,
    earlier: torch.Tensor | None,
    around: tuple[torch.Tensor | None, torch.Tensor | None],
    axis: int,
    beside: Sequence[Pair],
    space_mode: PadMode,
    time_mode: PadMode,
) -> torch.Tensor:
    """Copy a band, its earlier frames and the neighbours' rows into one tensor, and pad what is left of it.

    Args:
        band: `(batch, channels, frames, rows, columns)`.
        earlier: frames before the band's, of its rows and columns.
        around: the rows above and below the band, of the earlier frames too; None beyond the picture's edge.
        axis: the split axis, -2 or -1; the rows `around` stand along it.
        beside: how much stands before and after the band's frames, rows and columns, padding included.
        space_mode: padding of rows and columns.
        time_mode: padding of frames.
    """
    frames = 0 if earlier is None else earlier.shape[2]
    sizes = [size + sum(pair) for size, pair in zip(band.shape[2:], beside, strict=True)]
    room = band.new_empty([*band.shape[:2], *sizes])
    now = room.narrow(2, beside[0][0] - frames, frames + band.shape[2])
    across = -1 if axis == -2 else -2
    lines = now.narrow(across, beside[across][0], band.shape[across])

    own = lines.narrow(axis, beside[axis][0], band.shape[axis])
    own.narrow(2, frames, band.shape[2]).copy_(band)
    if earlier is not None:
        own.narrow(2, 0, frames).copy_(earlier)
    padding = list(beside[axis])
    for side, known in enumerate(around):
        if known is not None:
            start = 0 if side == 0 else lines.shape[axis] - known.shape[axis]
            lines.narrow(axis, start, known.shape[axis]).copy_(known)
            padding[side] = 0

    _pad(lines, axis, (padding[0], padding[1]), space_mode)
    _pad(now, across, beside[across], space_mode)
    _pad(room, 2, (beside[0][0] - frames, beside[0][1]), time_mode)
    return room


def _pad(room: torch.Tensor, axis: int, counts: Pair, mode: PadMode) -> None:
    """Write the first and the last places along an axis."""
    before, after = counts
    length = room.shape[axis]
    for start, count, edge, inner in (
        (0, before, before, before + 1),
        (length - after, after, length - after - 1, length - 2 * after - 1),
    ):
        place = room.narrow(axis, start, count)
        if mode == "constant":
            place.zero_()
        elif mode == "reflect":
            place.copy_(room.narrow(axis, inner, count).flip(axis))
        else:
            place.copy_(room.narrow(axis, edge, 1).expand_as(place))
