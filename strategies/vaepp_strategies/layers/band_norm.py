"""GroupNorm of a band with the whole picture's statistics, and rows for the next convolution on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vaepp_strategies.layers.bands import Bands, RowMap
from vaepp_strategies.layers.joined import activate_joined
from vaepp_strategies.layers.norm import apply_statistics, merge_moments, moments
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import Reach

__all__ = ["band_frame_norm", "band_group_norm", "band_pointwise"]


def band_group_norm(
    norm: nn.GroupNorm, bands: Bands, reach: Reach, scale: Scale
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `norm`; the neighbours' rows, not yet normalised, ride with their statistics.

    With the merged statistics this rank normalises those rows as their owner does, so the convolution behind
    the norm needs no message of its own.

    Args:
        norm: the layer.
        bands: this rank's band.
        reach: the rows that ride; none where an earlier layer gave those around the input.
        scale: the resolution of its input.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        mine = moments(values, norm.num_groups)
        everyone, riding = bands.gather_with_rows(mine, values, reach, "normalisation statistics")
        per_position = norm.num_channels // norm.num_groups
        counts = [area * per_position for area in bands.areas(values, scale)]
        mean, variance = merge_moments(counts, everyone)

        def normalise(rows: torch.Tensor) -> torch.Tensor:
            return apply_statistics(norm, rows, mean, variance)

        carried = bands.carried(values)
        halo = riding if carried is None else carried
        result = normalise(values)
        if reach or carried is not None:
            bands.carry(result, halo.mapped(normalise))
        return result

    return forward


def band_frame_norm(
    norm: nn.GroupNorm, bands: Bands, reach: Reach, scale: Scale
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `norm` on every frame of a clip; the statistics of all frames travel together.

    Args:
        norm: the layer.
        bands: this rank's band.
        reach: the rows that ride; none where an earlier layer gave those around the input.
        scale: the resolution of its input, `(batch, channels, frames, rows, columns)`.
    """
    normalise = band_group_norm(norm, bands, reach, scale)

    def pictures(clip: torch.Tensor) -> torch.Tensor:
        return clip.transpose(1, 2).flatten(0, 1)

    def forward(clip: torch.Tensor) -> torch.Tensor:
        return bands.mapped(normalise(bands.mapped(clip, pictures)), _clips_of(clip.shape[2]))

    return forward


def _clips_of(count: int) -> RowMap:
    """Pictures as clips of so many frames; it must not keep a clip alive, for rows are kept with it."""

    def clips(frames: torch.Tensor) -> torch.Tensor:
        by_clip: torch.Tensor = frames.unflatten(0, (-1, count)).transpose(1, 2)
        return by_clip

    return clips


def band_pointwise(
    layer: nn.Module, bands: Bands, reach: Reach, name: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for a layer that works position by position, on a band and on the rows around it.

    Args:
        layer: the layer.
        bands: this rank's band.
        reach: the rows to fetch for a later layer, where fewer bytes move before this one than behind it.
        name: names the exchange in errors.
    """
    own = type(layer).forward

    def forward(values: torch.Tensor) -> torch.Tensor:
        halo = bands.fetch(values, reach, name) if reach else bands.carried(values)
        joins = isinstance(layer, nn.SiLU) and values.dim() == 4 and values.is_contiguous()
        joined = None
        if joins and halo is not None and halo.arrived:
            joined = activate_joined(values, halo, bands.axis)
        if joined is not None:
            bands.carry(*joined)
            return joined[0]
        result: torch.Tensor = own(layer, values)
        if halo is not None:
            # Dropout returns its very input.
            bands.carry(result, halo if result is values else halo.mapped(lambda rows: own(layer, rows)))
        return result

    return forward
