"""Nearest interpolation by 2 and the 3x3 convolution behind it, in 4/9 of the work.

Of the nine values that such a convolution reads, rows and columns of four are the same: their weights can be
added first. What is left is a 2x2 convolution of the picture as it was for each of four outputs: even and odd
rows, even and odd columns. Equal up to rounding: the sums of weights are rounded to their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.reach import Reach

__all__ = ["band_doubled_convolution", "convolve_doubled"]


def band_doubled_convolution(
    block: Any, bands: Bands, reach: Reach, name: str, give: Reach
) -> Callable[..., torch.Tensor]:
    """A forward for diffusers' `Upsample2D` with a convolution of 3x3.

    Args:
        block: the layer; forward hooks on its convolution do not run.
        bands: this rank's band.
        reach: what is needed of the neighbours' input rows, where no earlier layer fetched it.
        name: names the exchange in errors.
        give: rows beyond the band that a later layer reads of its output; one at most.
    """

    def forward(values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        halo = bands.carried(values) or bands.fetch(values, reach, name)
        out, beyond = convolve_doubled(block.conv, values, halo, bands.axis, give)
        if give:
            bands.carry(out, beyond)
        return out

    return forward


def convolve_doubled(
    convolution: nn.Conv2d, values: torch.Tensor, halo: Halo, axis: int, give: Reach
) -> tuple[torch.Tensor, Halo]:
    """Convolve a band as if its rows and columns were doubled first.

    Args:
        convolution: 3x3, with stride 1 and padding 1.
        values: the band, `(batch, channels, rows, columns)`.
        halo: the row above the band and that below it.
        axis: the split axis.
        give: doubled rows beyond the band to compute as well, 0 or 1 on each side.

    Returns:
        The band's output, and the rows of `give` around it.
    """
    room = _surrounded(values, halo, axis)
    above, below = (part is not None for part in halo.rows())
    gives = (int(bool(give.above and above)), int(bool(give.below and below)))
    length, shape = values.shape[axis], [*values.shape[:1], convolution.out_channels, *values.shape[2:]]
    shape[-2:] = [2 * size for size in shape[-2:]]
    out = values.new_empty(shape)
    shape[axis] = 1
    beyond = [out.new_empty(shape) if given else None for given in gives]
    across = -1 if axis == -2 else -2
    for odd in (0, 1):
        # Even rows of the output read the row above theirs, odd ones that below; `give` asks for one more.
        first, last = (1 - gives[0], length + 2) if odd else (0, length + 1 + gives[1])
        read = room.narrow(axis, first, last - first)
        merged = _merged(convolution.weight, axis, odd)
        for side in (0, 1):
            lines = read.narrow(across, side, values.shape[across] + 1)
            weight = _merged(merged, across, side).to(convolution.weight.dtype)
            found = F.conv2d(lines, weight, convolution.bias, groups=convolution.groups)
            _every_second(out, axis, odd, across, side).copy_(
                found.narrow(axis, gives[0] if odd else 0, length)
            )
            seam = beyond[0 if odd else 1]
            if seam is not None:
                row = found.narrow(axis, 0 if odd else length, 1)
                _every_second(seam, axis, None, across, side).copy_(row)
    return out, Halo(beyond[0], beyond[1])


def _surrounded(values: torch.Tensor, halo: Halo, axis: int) -> torch.Tensor:
    """A band with one row or column around it on every side, zeros beyond the picture's edges."""
    room = values.new_zeros([*values.shape[:2], *(size + 2 for size in values.shape[2:])])
    lines = room.narrow(-1 if axis == -2 else -2, 1, values.shape[-1 if axis == -2 else -2])
    lines.narrow(axis, 1, values.shape[axis]).copy_(values)
    above, below = halo.rows()
    if above is not None:
        lines.narrow(axis, 0, 1).copy_(above.narrow(axis, above.shape[axis] - 1, 1))
    if below is not None:
        lines.narrow(axis, values.shape[axis] + 1, 1).copy_(below.narrow(axis, 0, 1))
    return room


def _merged(weight: torch.Tensor, axis: int, odd: int) -> torch.Tensor:
    """The two weights along an axis that are left of three, in float32 at least: two read the same row."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    one, two, three = wide.split(1, axis)
    return torch.cat([one + two, three] if odd else [one, two + three], axis)


def _every_second(out: torch.Tensor, axis: int, odd: int | None, across: int, side: int) -> torch.Tensor:
    """The places of one of the four outputs; all along `axis` where `odd` is None."""
    index = [slice(None)] * out.ndim
    index[out.ndim + across] = slice(side, None, 2)
    if odd is not None:
        index[out.ndim + axis] = slice(odd, None, 2)
    return out[tuple(index)]
