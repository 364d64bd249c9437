"""A layer's output and the rows around it in one tensor, so that a convolution computes no row twice."""

from __future__ import annotations

import attrs
import torch

from vaepp_strategies.layers.bands import Halo, RowMap

__all__ = ["activate_joined", "double_joined", "nearest_rows"]


@attrs.frozen(eq=False)
class _Room:
    """One tensor, and its parts as views: as many rows above the band as below."""

    joined: torch.Tensor
    above: torch.Tensor
    band: torch.Tensor
    below: torch.Tensor

    @classmethod
    def beside(cls, like: torch.Tensor, shape: list[int], axis: int, beside: int) -> _Room:
        length = shape[axis]
        whole = [*shape]
        whole[axis] = length + 2 * beside
        joined = like.new_empty(whole)
        return cls(joined, *joined.split([beside, length, beside], axis))


def activate_joined(values: torch.Tensor, halo: Halo, axis: int) -> tuple[torch.Tensor, Halo] | None:
    """SiLU of a band and of the rows around it.

    Args:
        values: the band, contiguous.
        halo: the rows around it; they have arrived.
        axis: the split axis.

    Returns:
        The band's output, a view, and its halo; None where more rows are known on one side than on the other.
    """
    above, below = halo.rows()
    counts = {part.shape[axis] for part in (above, below) if part is not None}
    if len(counts) != 1:
        return None
    room = _Room.beside(values, list(values.shape), axis, counts.pop())
    for source, place in ((above, room.above), (values, room.band), (below, room.below)):
        if source is None:
            place.zero_()  # as a convolution pads its input, which SiLU leaves zero
        else:
            torch.ops.aten.silu.out(source, out=place)
    return room.band, Halo(
        None if above is None else room.above, None if below is None else room.below, joined=room.joined
    )


def double_joined(
    values: torch.Tensor, halo: Halo, axis: int, beside: int, double: RowMap
) -> tuple[torch.Tensor, Halo]:
    """A band at twice its rows and columns, and the nearest rows around it.

    The band is written first: the rows may still be under way.

    Args:
        values: the band, contiguous.
        halo: the rows around it, before they are doubled.
        axis: the split axis.
        beside: how many doubled rows stand beside the band.
        double: doubles rows and columns.

    Returns:
        The band's output, a view, and its halo: all rows that `halo` gives.
    """
    rows, columns = values.shape[-2:]
    room = _Room.beside(values, [*values.shape[:-2], 2 * rows, 2 * columns], axis, beside)
    room.band.unflatten(-2, (rows, 2)).unflatten(-1, (columns, 2)).copy_(values[..., :, None, :, None])
    above, below = halo.mapped(double).rows()
    for part, place, side in ((above, room.above, -1), (below, room.below, 1)):
        if part is None:
            place.zero_()  # as a convolution pads its input
        else:
            place.copy_(nearest_rows(part, axis, beside, side))
    return room.band, Halo(above, below, joined=room.joined)


def nearest_rows(halo: torch.Tensor, axis: int, count: int, side: int) -> torch.Tensor:
    """The rows of a halo nearest to the band, above it (-1) or below it (1).

    Where the picture ends before `count` rows, zero padding follows, as it does for the whole picture.
    """
    missing = count - halo.shape[axis]
    if missing > 0:
        shape = list(halo.shape)
        shape[axis] = missing
        padding = halo.new_zeros(shape)
        return torch.cat([padding, halo] if side < 0 else [halo, padding], axis)
    return halo.narrow(axis, halo.shape[axis] - count if side < 0 else 0, count)
