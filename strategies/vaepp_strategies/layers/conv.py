"""Convolution of a band: the band alone first, then the rows at its seams once more.

No copy of the band with its neighbours' rows is made, so the peak stays at the band's share, and the rows can
travel while the band is convolved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.reach import Window

__all__ = ["band_convolution", "convolution_window", "convolve_band", "convolve_rows"]

Convolve = Callable[[torch.Tensor], torch.Tensor]


def convolution_window(convolution: nn.Conv2d, axis: int) -> Window:
    """How a convolution works along an axis, -2 or -1, of its input."""
    padding = convolution.padding
    assert not isinstance(padding, str), "padding is given as numbers"
    return Window(convolution.kernel_size[axis], convolution.stride[axis], padding[axis], padding[axis])


def convolve_rows(convolution: nn.Conv2d, rows: torch.Tensor, axis: int) -> torch.Tensor:
    """Convolve without padding along `axis`; across it, with the layer's own."""
    padding = [int(size) for size in convolution.padding]
    padding[axis] = 0
    return F.conv2d(
        rows,
        convolution.weight,
        convolution.bias,
        convolution.stride,
        padding,
        convolution.dilation,
        convolution.groups,
    )


def convolve_band(
    band: torch.Tensor, halo: Halo, axis: int, window: Window, whole: Convolve, rows: Convolve
) -> torch.Tensor:
    """Convolve a band as part of the whole picture.

    Args:
        band: this rank's rows, at least as many as the window's reach.
        halo: the neighbours' rows around them.
        axis: the split axis.
        window: the convolution along that axis.
        whole: convolves a tensor with zero padding on all sides.
        rows: convolves without padding along the split axis.
    """
    own = band.shape[axis]
    top = -(-window.reach.above // window.stride)
    bottom = -(-window.reach.below // window.stride)
    top_rows = (top - 1) * window.stride - window.lead + window.kernel
    bottom_rows = (bottom - 1) * window.stride + window.kernel - window.reach.below
    if own < max(top_rows, bottom_rows):
        return rows(_padded(band, halo, axis, window))
    out = whole(band)
    above, below = halo.rows()
    if above is not None:
        strip = torch.cat([_last(above, axis, window.reach.above), band.narrow(axis, 0, top_rows)], axis)
        out.narrow(axis, 0, top).copy_(rows(strip))
    if below is not None:
        strip = torch.cat([_last(band, axis, bottom_rows), below.narrow(axis, 0, window.reach.below)], axis)
        _last(out, axis, bottom).copy_(rows(strip))
    return out


def band_convolution(
    convolution: nn.Conv2d, bands: Bands, name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `convolution` that works on this rank's band of the picture."""
    axis = bands.axis
    window = convolution_window(convolution, axis)

    def whole(values: torch.Tensor) -> torch.Tensor:
        return nn.Conv2d.forward(convolution, values)

    def rows(strip: torch.Tensor) -> torch.Tensor:
        return convolve_rows(convolution, strip, axis)

    def forward(values: torch.Tensor) -> torch.Tensor:
        halo = bands.carried(values) or bands.fetch(values, window.reach, name)
        return convolve_band(values, halo, axis, window, whole, rows)

    return forward


def _padded(band: torch.Tensor, halo: Halo, axis: int, window: Window) -> torch.Tensor:
    """A band too short for its seams to be told apart, between its neighbours' rows or zero padding."""
    above, below = halo.rows()

    def zeros(count: int) -> torch.Tensor:
        shape = list(band.shape)
        shape[axis] = count
        return band.new_zeros(shape)

    before = zeros(window.lead) if above is None else _last(above, axis, window.reach.above)
    after = zeros(window.trail) if below is None else below.narrow(axis, 0, window.reach.below)
    return torch.cat([before, band, after], axis)


def _last(values: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    return values.narrow(axis, values.shape[axis] - count, count)
