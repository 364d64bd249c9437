"""Group normalisation of a clip whose scales and shifts come from the latent, as in CogVideoX's decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vaepp_strategies.layers.band_norm import band_group_norm
from vaepp_strategies.layers.bands import Bands, RowMap
from vaepp_strategies.layers.clip_conv import clip_convolution
from vaepp_strategies.layers.joined import nearest_rows
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import Reach

__all__ = ["band_guided_decoder", "band_guided_norm"]


def band_guided_decoder(decoder: Any, bands: Bands, name: str) -> Callable[..., Any]:
    """A forward for the decoder: the latent's rows that its first layer reads are kept for its norms.

    Args:
        decoder: the layer that hands the latent to both.
        bands: this rank's band.
        name: names the exchange in errors.
    """
    own, reach = type(decoder).forward, clip_convolution(decoder.conv_in).window(bands.axis).reach

    def forward(latent: torch.Tensor, *args: Any, **named: Any) -> Any:
        if bands.carried(latent) is None:
            bands.carry(latent, bands.fetch(latent, reach, f"{name}.conv_in"))
        return own(decoder, latent, *args, **named)

    return forward


def band_guided_norm(norm: Any, bands: Bands, reach: Reach, scale: Scale) -> Callable[..., Any]:
    """A forward for `norm`; the neighbours' rows, not yet normalised, ride with their statistics.

    Args:
        norm: a layer with `norm_layer`, and with `conv_y` and `conv_b`, which read single positions.
        bands: this rank's band.
        reach: the rows that ride, in no more rows of the latent than the decoder's first layer reads.
        scale: the resolution of its input.
    """
    axis, normalise = bands.axis, band_group_norm(norm.norm_layer, bands, reach, scale)

    def guided(
        normed: torch.Tensor, guide: torch.Tensor, cache: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        scales, kept_scales = norm.conv_y(guide, conv_cache=cache.get("conv_y"))
        shifts, kept_shifts = norm.conv_b(guide, conv_cache=cache.get("conv_b"))
        return normed * scales + shifts, {"conv_y": kept_scales, "conv_b": kept_shifts}

    def beside(latent: torch.Tensor | None, factor: int, side: int) -> RowMap:
        """What `guided` is for rows on one side of the band, where the latent has these."""

        def rows(normed: torch.Tensor) -> torch.Tensor:
            assert latent is not None, "beyond an edge of the picture there are no rows"
            count = normed.shape[axis]
            near = nearest_rows(latent, axis, -(-count // factor), side)
            size = list(normed.shape[-3:])
            size[axis] = near.shape[axis] * factor
            return guided(normed, nearest_rows(_enlarged(near, size), axis, count, side), {})[0]

        return rows

    def forward(values: torch.Tensor, latent: torch.Tensor, conv_cache: Any = None) -> Any:
        normed = normalise(values)
        result, cache = guided(normed, _enlarged(latent, normed.shape[-3:]), conv_cache or {})
        halo, around = bands.carried(normed), bands.carried(latent)
        if halo is not None:
            assert around is not None, "the decoder keeps the rows around the latent"
            factor, (above, below) = values.shape[axis] // latent.shape[axis], around.rows()
            bands.carry(result, halo.mapped(beside(above, factor, -1), beside(below, factor, 1)))
        return result, cache

    return forward


def _enlarged(latent: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The latent at a layer's size, as the class does it: the first of an odd number of frames alone."""
    frames, *sides = size
    if frames == 1 or frames % 2 == 0:
        return F.interpolate(latent, size=tuple(size))
    parts = (
        F.interpolate(latent[:, :, :1], size=(1, *sides)),
        F.interpolate(latent[:, :, 1:], size=(frames - 1, *sides)),
    )
    return torch.cat(parts, dim=2)
