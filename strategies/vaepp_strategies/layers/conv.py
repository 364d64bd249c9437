"""Convolution of a band: the band alone first, then the rows at its seams once more.

No copy of the band with its neighbours' rows is made, so the peak stays at the band's share, and the rows can
travel while the band is convolved. Where the layer before wrote band and rows into one tensor, that is
convolved, and nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.joined import nearest_rows
from vaepp_strategies.layers.reach import NO_ROWS, Reach, Window
from vaepp_strategies.layers.strided import convolve

__all__ = [
    "band_convolution",
    "convolution_window",
    "convolve_band",
    "convolve_rows",
    "last_rows",
]

Convolve = Callable[[torch.Tensor], torch.Tensor]


def _zero_rows(band: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """Rows of zeros beyond the picture's edge."""
    shape = list(band.shape)
    shape[axis] = count
    return band.new_zeros(shape)


def convolution_window(convolution: nn.Conv2d, axis: int) -> Window:
    """How a convolution works along an axis, -2 or -1, of its input."""
    padding = convolution.padding
    assert not isinstance(padding, str), "padding is given as numbers"
    return Window(convolution.kernel_size[axis], convolution.stride[axis], padding[axis], padding[axis])


def convolve_rows(convolution: nn.Conv2d, rows: torch.Tensor, axis: int) -> torch.Tensor:
    """Convolve without padding along `axis`; across it, with the layer's own."""
    padding = [int(size) for size in convolution.padding]
    padding[axis] = 0
    return convolve(convolution, rows, padding)


def convolve_band(
    band: torch.Tensor,
    halo: Halo,
    axis: int,
    window: Window,
    whole: Convolve,
    rows: Convolve,
    give: Reach = NO_ROWS,
    earlier: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Halo]:
    """Convolve a band as part of the whole picture, or of the whole frames of a clip.

    Args:
        band: this rank's rows, at least as many as the window's reach.
        halo: the neighbours' rows around them: those of the window's reach, and `give` more; of the
            `earlier` frames too.
        axis: the split axis.
        window: the convolution along that axis.
        whole: convolves a tensor with the layer's padding on all sides.
        rows: convolves without padding along the split axis.
        give: rows beyond the band to compute as well; only where the stride is 1.
        earlier: frames before the band's, which `whole` knows of and `rows` does not.

    Returns:
        The band's output, and the rows of `give` around it.
    """
    length, reach = band.shape[axis], window.reach
    beside = 0 if halo.joined is None else (halo.joined.shape[axis] - length) // 2
    if halo.joined is not None and window.stride == 1 and beside == window.lead == window.trail:
        return rows(halo.joined), _beyond(band, halo, axis, window, rows, give)
    top, bottom = -(-reach.above // window.stride), -(-reach.below // window.stride)
    top_rows = (top - 1) * window.stride - window.lead + window.kernel
    bottom_rows = (bottom - 1) * window.stride + window.kernel - reach.below
    if length < max(top_rows, bottom_rows):
        joined = _with_earlier(band, earlier, axis, 0, length)
        return _convolve_short(joined, halo, axis, window, rows, give)
    out = whole(band)
    above, below = halo.rows()
    beyond_above = beyond_below = None
    if above is not None:
        own = _with_earlier(band, earlier, axis, 0, top_rows)
        seam = rows(torch.cat([nearest_rows(above, axis, reach.above + give.above, -1), own], axis))
        out.narrow(axis, 0, top).copy_(last_rows(seam, axis, top))
        beyond_above = seam.narrow(axis, 0, give.above)
    if below is not None:
        own = _with_earlier(band, earlier, axis, length - bottom_rows, bottom_rows)
        seam = rows(torch.cat([own, nearest_rows(below, axis, reach.below + give.below, 1)], axis))
        last_rows(out, axis, bottom).copy_(seam.narrow(axis, 0, bottom))
        beyond_below = last_rows(seam, axis, give.below)
    return out, Halo(beyond_above, beyond_below)


def _beyond(band: torch.Tensor, halo: Halo, axis: int, window: Window, rows: Convolve, give: Reach) -> Halo:
    """The rows of `give` around the output alone."""
    if not give:
        return Halo(None, None)
    above, below = halo.rows()
    if above is not None:
        near = nearest_rows(above, axis, window.reach.above + give.above, -1)
        above = rows(torch.cat([near, band.narrow(axis, 0, window.trail)], axis))
    if below is not None:
        near = nearest_rows(below, axis, window.reach.below + give.below, 1)
        below = rows(torch.cat([last_rows(band, axis, window.lead), near], axis))
    return Halo(above, below)


def _with_earlier(
    band: torch.Tensor, earlier: torch.Tensor | None, axis: int, start: int, count: int
) -> torch.Tensor:
    """Some rows of a band, behind those of the frames before."""
    rows = band.narrow(axis, start, count)
    return rows if earlier is None else torch.cat([earlier.narrow(axis, start, count), rows], dim=2)


def _convolve_short(
    band: torch.Tensor, halo: Halo, axis: int, window: Window, rows: Convolve, give: Reach
) -> tuple[torch.Tensor, Halo]:
    """Convolve a band too short for its seams to be told apart; its copy is as short."""
    above, below = halo.rows()

    if above is None:
        before, first = _zero_rows(band, axis, window.lead), 0
    else:
        before, first = nearest_rows(above, axis, window.reach.above + give.above, -1), give.above
    if below is None:
        after, last = _zero_rows(band, axis, window.trail), 0
    else:
        after, last = nearest_rows(below, axis, window.reach.below + give.below, 1), give.below
    wide = rows(torch.cat([before, band, after], axis))
    out = wide.narrow(axis, first, wide.shape[axis] - first - last).contiguous()
    beyond_above = None if above is None else wide.narrow(axis, 0, first)
    beyond_below = None if below is None else last_rows(wide, axis, last)
    return out, Halo(beyond_above, beyond_below)


def band_convolution(
    convolution: nn.Conv2d, bands: Bands, name: str, window: Window, give: Reach
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `convolution` that works on this rank's band of the picture.

    Args:
        convolution: the layer, or one whose input another layer pads; then it pads it here instead.
        bands: this rank's band.
        name: names the exchange in errors.
        window: how it works along the split axis, and along the other one; padding of others included.
        give: rows beyond the band that a later layer reads of its output.
    """
    axis = bands.axis
    own = convolution_window(convolution, axis)
    sides = (window.lead - own.lead, window.trail - own.trail)
    padded = any(sides)
    across = (0, 0, *sides) if axis == -1 else (*sides, 0, 0)

    def whole(values: torch.Tensor) -> torch.Tensor:
        padding = [int(size) for size in convolution.padding]
        return convolve(convolution, F.pad(values, sides * 2) if padded else values, padding)

    def rows(strip: torch.Tensor) -> torch.Tensor:
        return convolve_rows(convolution, F.pad(strip, across) if padded else strip, axis)

    def forward(values: torch.Tensor) -> torch.Tensor:
        halo = bands.carried(values) or bands.fetch(values, window.reach + give, name)
        out, beyond = convolve_band(values, halo, axis, window, whole, rows, give)
        if give:
            bands.carry(out, beyond)
        return out

    return forward


def last_rows(values: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """The last rows of a tensor, as a view."""
    return values.narrow(axis, values.shape[axis] - count, count)
