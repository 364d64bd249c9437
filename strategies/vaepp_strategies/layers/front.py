"""Layers before the attention, run on a window of the latent that is larger than this rank's band."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import nn

from vaepp_strategies.layers.band_attention import NormalisedPositions, Positions, tokens_of
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.norm import apply_statistics, merge_moments, moments
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import NO_ROWS

__all__ = ["FrontRows", "front_group_norm", "front_positions"]


@attrs.frozen(kw_only=True)
class FrontRows:
    """Rows along the split axis, each as a first row and a count within what this rank holds.

    Attributes:
        band: this rank's own.
        window: those whose values are right: all but the margins.
        sent: by reader, those of the band that the reader lacks; a count of 0 where it lacks none.
        received: by source, how many rows come from it.
        whole: whether the window is the whole picture, on every rank.
    """

    band: tuple[int, int]
    window: tuple[int, int]
    sent: tuple[tuple[int, int], ...]
    received: tuple[int, ...]
    whole: bool


def front_group_norm(
    norm: nn.GroupNorm, bands: Bands, rows: FrontRows
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `norm` on a window; each rank's band counts once in the statistics.

    Args:
        norm: the layer.
        bands: this rank's band.
        rows: what this rank holds.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        mine = moments(values.narrow(bands.axis, *rows.band), norm.num_groups)
        everyone, _ = bands.gather_with_rows(mine, values, NO_ROWS, "normalisation statistics")
        return apply_statistics(norm, values, *merge_moments(_counts(norm, values, bands), everyone))

    return forward


def front_positions(bands: Bands, rows: FrontRows) -> Positions:
    """What attention reads, where this rank computed a window of it.

    Args:
        bands: this rank's band.
        rows: what this rank holds.
    """

    def whole(norm: nn.GroupNorm, values: torch.Tensor) -> NormalisedPositions:
        normed = norm(values)
        own = values.narrow(bands.axis, *rows.band)
        return own, tokens_of(normed.narrow(bands.axis, *rows.band)), tokens_of(normed)

    def joined(norm: nn.GroupNorm, values: torch.Tensor) -> NormalisedPositions:
        axis, own = bands.axis, values.narrow(bands.axis, *rows.band)
        given = [values.narrow(axis, *part).contiguous() for part in rows.sent]
        shapes = [_with_rows(values, axis, count) for count in rows.received]
        everyone, received = bands.gather_with_bands(
            moments(own, norm.num_groups), given, shapes, "statistics and positions"
        )
        statistics = merge_moments(_counts(norm, values, bands), everyone)

        others = [part for source, part in enumerate(received) if source != bands.group.rank]
        # Attention does not see the order of positions.
        normed = [
            apply_statistics(norm, part, *statistics)
            for part in (values.narrow(axis, *rows.window), *others)
            if part.numel()
        ]
        mine = normed[0].narrow(axis, rows.band[0] - rows.window[0], rows.band[1])
        return own, tokens_of(mine), torch.cat([tokens_of(part) for part in normed], dim=1)

    return whole if rows.whole else joined


def _counts(norm: nn.GroupNorm, values: torch.Tensor, bands: Bands) -> list[int]:
    """How many values of a group each rank's band holds."""
    per_position = norm.num_channels // norm.num_groups
    return [area * per_position for area in bands.areas(values, Scale(1, 1))]


def _with_rows(values: torch.Tensor, axis: int, count: int) -> tuple[int, ...]:
    shape = list(values.shape)
    shape[axis] = count
    return tuple(shape)
