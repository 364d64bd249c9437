"""Layers on a band that give the very bits that they give on the whole picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_sdk.vae.plan import split_evenly
from vaepp_strategies.layers.conv import convolution_window, convolve_rows
from vaepp_strategies.layers.kernels import KernelCheck
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, Window
from vaepp_strategies.layers.whole import WholeBands, empty_as

__all__ = [
    "channel_shares",
    "reference_group_norm",
    "reference_rows",
    "reference_upsample",
    "reference_whole",
]

Forward = Callable[..., Any]


def reference_whole(
    layer: Any, bands: WholeBands, scale: Scale, out_scale: Scale, known: bool, kept: bool, name: str
) -> Forward:
    """A forward that runs a layer on the whole picture on every rank, as it is, and takes the band of that.

    Args:
        layer: any layer; what it calls must not be replaced.
        bands: this rank's band.
        scale: the resolution of its input.
        out_scale: the resolution of its output.
        known: every rank holds the whole input already.
        kept: a later layer reads the whole output.
        name: names the exchange in errors.
    """
    own = type(layer).forward

    def forward(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        whole = bands.kept(values) if known else bands.gather_whole(values, scale, name)
        in_place = getattr(layer, "inplace", False)
        result: torch.Tensor = own(layer, whole.clone() if in_place else whole, *args, **kwargs)
        band = bands.own_rows(result, out_scale)
        if in_place:
            band = values.copy_(band)
        if kept:
            bands.keep(band, result)
        return band

    return forward


def reference_rows(
    layer: Any, bands: WholeBands, scale: Scale, known: bool, name: str, check: KernelCheck
) -> Forward:
    """A forward for a convolution that joins the neighbours' rows to the band and convolves them together.

    Recomputing the rows at a seam alone would be cheaper, and would take other kernels: short strips do.

    Args:
        layer: an `nn.Conv2d`, or diffusers' `Downsample2D` with padding 0.
        bands: this rank's band.
        scale: the resolution of its input.
        known: every rank holds the whole input already.
        name: names the exchange in errors.
        check: told what came out.
    """
    axis, own = bands.axis, type(layer).forward
    if isinstance(layer, nn.Conv2d):
        window = convolution_window(layer, axis)

        def convolve(rows: torch.Tensor) -> torch.Tensor:
            return convolve_rows(layer, rows, axis)
    else:
        window, across = DOWNSAMPLE_WINDOW, (0, 0, 0, 1) if axis == -1 else (0, 1, 0, 0)

        def convolve(rows: torch.Tensor) -> torch.Tensor:
            return nn.Conv2d.forward(layer.conv, F.pad(rows, across))

    def forward(values: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        reach = window.reach
        if known:
            above, below = bands.rows_around(values, scale, reach.above, reach.below)
        else:
            halo = bands.fetch(values, reach, name)
            above, below = halo.rows()
        result = convolve(_with_rows(values, above, below, axis, window))
        check.band(name, layer, own, values, (above, below), result, bands, scale)
        return result

    return forward


def _with_rows(
    band: torch.Tensor, above: torch.Tensor | None, below: torch.Tensor | None, axis: int, window: Window
) -> torch.Tensor:
    """A band with the rows around it, zeros at the picture's edges, laid out as the band is."""
    lead = window.lead if above is None else above.shape[axis]
    trail = window.trail if below is None else below.shape[axis]
    shape, length = list(band.shape), band.shape[axis]
    shape[axis] = lead + length + trail
    wide = empty_as(band, shape)
    for start, size, rows in ((0, lead, above), (lead, length, band), (lead + length, trail, below)):
        room = wide.narrow(axis, start, size)
        if rows is None:
            room.zero_()
        else:
            room.copy_(rows)
    return wide


def channel_shares(channels: int, groups: int, ranks: int) -> list[tuple[int, int]]:
    """Every rank's first channel and number of channels; no group is cut, and the last may get none."""
    width = channels // groups
    shares = [(start * width, size * width) for start, size in split_evenly(groups, ranks)]
    return shares + [(channels, 0)] * (ranks - len(shares))


def reference_group_norm(
    norm: nn.GroupNorm, bands: WholeBands, scale: Scale, name: str, check: KernelCheck
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `norm` by its own kernel: each rank normalises whole groups and gives them back.

    Args:
        norm: the layer.
        bands: this rank's band.
        scale: the resolution of its input.
        name: names the exchange in errors.
        check: told what came out.
    """
    shares = channel_shares(norm.num_channels, norm.num_groups, bands.ranks)
    first, size = shares[bands.group.rank]
    groups = size * norm.num_groups // norm.num_channels
    own = slice(first, first + size)

    def forward(values: torch.Tensor) -> torch.Tensor:
        mine = bands.to_channels(values, scale, shares, name)
        if groups:
            weight = None if norm.weight is None else norm.weight[own]
            bias = None if norm.bias is None else norm.bias[own]
            normed = F.group_norm(mine, groups, weight, bias, norm.eps)
            check.channels(name, norm, mine, normed, first)
        else:
            normed = mine
        del mine
        return bands.to_bands(normed, values, scale, shares, name)

    return forward


def reference_upsample(block: Any, bands: WholeBands, scale: Scale) -> Forward:
    """A forward for diffusers' `Upsample2D`, which makes very large inputs contiguous.

    The size of the whole picture counts, not that of the band.
    """
    own = type(block).forward

    def forward(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch, channels = values.shape[:2]
        if 2 * batch * channels * sum(bands.areas(values, scale)) > 2**31:
            values = values.contiguous()
        result: torch.Tensor = own(block, values, *args, **kwargs)
        return result

    return forward
