"""Up- and downsampling of a band."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.conv import convolution_window, convolve_band
from vaepp_strategies.layers.joined import double_joined
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, Reach
from vaepp_strategies.layers.strided import convolve

__all__ = [
    "band_clip_upsample",
    "band_doubling_block",
    "band_downsample",
    "band_pad",
    "band_padded_convolution",
    "band_upsample",
    "band_upsample_block",
]


def band_upsample(
    upsample: nn.Upsample, bands: Bands, reach: Reach, name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for a nearest `nn.Upsample`; the rows for the next layer travel before they are doubled.

    Args:
        upsample: the layer, or one of a subclass, with a whole scale factor.
        bands: this rank's band.
        reach: what is needed of the neighbours' input rows, where no earlier layer fetched it.
        name: names the exchange in errors.
    """
    own = type(upsample).forward

    def forward(values: torch.Tensor) -> torch.Tensor:
        return _carry_through(values, lambda rows: own(upsample, rows), bands, reach, name)

    return forward


def band_pad(bands: Bands, reach: Reach, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for padding in front of a convolution that pads its band itself: only the rows travel here.

    Args:
        bands: this rank's band.
        reach: what the convolution needs of the neighbours' rows, where no earlier layer fetched it.
        name: names the exchange in errors.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        if reach:
            bands.carry(values, bands.fetch(values, reach, name))
        return values

    return forward


def band_upsample_block(block: Any, bands: Bands, reach: Reach, name: str) -> Callable[..., torch.Tensor]:
    """A forward for diffusers' `Upsample2D`: nearest interpolation by 2, then its convolution, if it has one.

    The convolution must be replaced too; it finds the rows around its input carried.
    """

    def forward(values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if not block.use_conv:
            return _carry_through(values, _double, bands, reach, name)
        return _doubled_convolved(values, block.conv, bands, reach, name)

    return forward


def band_doubling_block(block: Any, bands: Bands, reach: Reach, name: str) -> Callable[..., torch.Tensor]:
    """A forward for a `DCUpBlock2d` that interpolates by 2 in front of its convolution.

    The convolution must be replaced too; it finds the rows around its input carried.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        result = _doubled_convolved(values, block.conv, bands, reach, name)
        if not block.shortcut:
            return result
        return result + F.pixel_shuffle(values.repeat_interleave(block.repeats, dim=1), block.factor)

    return forward


def _double(rows: torch.Tensor) -> torch.Tensor:
    return F.interpolate(rows, scale_factor=2.0, mode="nearest")


def _doubled_convolved(
    values: torch.Tensor, convolution: nn.Conv2d, bands: Bands, reach: Reach, name: str
) -> torch.Tensor:
    """Double rows and columns of a band, and convolve that; the rows around it travel before."""
    halo = _halo(values, bands, reach, name)
    if halo is None or not values.is_contiguous():
        doubled, around = _double(values), halo and halo.mapped(_double)
    else:
        lead = convolution_window(convolution, bands.axis).lead
        doubled, around = double_joined(values, halo, bands.axis, lead, _double)
    if around is not None:
        bands.carry(doubled, around)
    result: torch.Tensor = convolution(doubled)
    return result


def band_clip_upsample(block: Any, bands: Bands, reach: Reach, name: str) -> Callable[..., torch.Tensor]:
    """A forward for nearest interpolation of a clip whose first frame stays one, then a convolution.

    The convolution must be replaced too; it finds the rows around its input carried.

    Args:
        block: a layer with `upsample_factor`, for frames, rows and columns, and `conv`.
        bands: this rank's band.
        reach: what is needed of the neighbours' input rows, where no earlier layer fetched it.
        name: names the exchange in errors.
    """
    factor = block.upsample_factor

    def enlarge(clip: torch.Tensor) -> torch.Tensor:
        first = F.interpolate(clip[:, :, 0], scale_factor=factor[1:], mode="nearest").unsqueeze(2)
        if clip.shape[2] == 1:
            return first
        # Interpolation of a clip wants it contiguous.
        others = F.interpolate(clip[:, :, 1:].contiguous(), scale_factor=factor, mode="nearest")
        return torch.cat([first, others], dim=2)

    def forward(values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = block.conv(_carry_through(values, enlarge, bands, reach, name))
        return result

    return forward


def band_downsample(block: Any, bands: Bands, name: str) -> Callable[..., torch.Tensor]:
    """A forward for diffusers' `Downsample2D` with padding 0: a band needs one row of the next one only."""
    convolution: nn.Conv2d = block.conv
    across = (0, 0, 0, 1) if bands.axis == -1 else (0, 1, 0, 0)

    def whole(values: torch.Tensor) -> torch.Tensor:
        return convolve(convolution, F.pad(values, (0, 1, 0, 1)), (0, 0))

    def rows(strip: torch.Tensor) -> torch.Tensor:
        return convolve(convolution, F.pad(strip, across), (0, 0))

    def forward(values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        halo = bands.carried(values) or bands.fetch(values, DOWNSAMPLE_WINDOW.reach, name)
        return convolve_band(values, halo, bands.axis, DOWNSAMPLE_WINDOW, whole, rows)[0]

    return forward


def band_padded_convolution(
    convolution: nn.Conv2d, bands: Bands, name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for a convolution with stride 2 whose input has a row and a column of padding at its end.

    The next band's first row takes the place of that row.

    Args:
        convolution: the layer, without padding of its own.
        bands: this rank's band.
        name: names the exchange in errors.
    """
    axis = bands.axis
    across = -1 if axis == -2 else -2

    def forward(padded: torch.Tensor) -> torch.Tensor:
        own = padded.narrow(axis, 0, padded.shape[axis] - 1).narrow(across, 0, padded.shape[across] - 1)
        halo = bands.fetch(own, DOWNSAMPLE_WINDOW.reach, name)
        _, below = halo.rows()
        if below is not None:
            # No one else has this tensor: the layer made it to pad.
            padded.narrow(axis, -1, 1).narrow(across, 0, own.shape[across]).copy_(below)
        return convolve(convolution, padded, (0, 0))

    return forward


def _carry_through(
    values: torch.Tensor,
    layer: Callable[[torch.Tensor], torch.Tensor],
    bands: Bands,
    reach: Reach,
    name: str,
) -> torch.Tensor:
    """Run a layer on a band and on the rows around it; both are then at the layer's new resolution."""
    halo = _halo(values, bands, reach, name)
    result = layer(values)
    if halo is not None:
        bands.carry(result, halo.mapped(layer))
    return result


def _halo(values: torch.Tensor, bands: Bands, reach: Reach, name: str) -> Halo | None:
    """The rows around a layer's input, from an earlier layer or under way from the neighbours."""
    halo = bands.carried(values)
    return bands.fetch(values, reach, name) if halo is None and reach else halo
