"""GroupNorm over a picture whose parts are held by several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.exchange import Exchange

__all__ = ["apply_statistics", "chunk_values", "merge_moments", "moments", "shared_group_norm"]

CHUNK_VALUES = 1 << 21
"""Values widened to float64 at a time, at most: 16 MiB."""

_FEW_VALUES = 1 << 16
"""Values widened at a time, at least, where there are so many: a chunk costs the launches of some kernels."""

_WIDE = 8
"""Bytes of a float64."""


def chunk_values(count: int, itemsize: int, groups: int) -> int:
    """How many values `moments` widens at a time: whole groups, in no more bytes than all have, or few.

    Args:
        count: all values.
        itemsize: bytes of one.
        groups: how many groups they form.
    """
    return min(count, -(-count // groups) * _groups_at_once(count, itemsize, groups))


def _groups_at_once(count: int, itemsize: int, groups: int) -> int:
    most = min(CHUNK_VALUES, max(_FEW_VALUES, count * itemsize // _WIDE))
    return max(1, most * groups // max(1, count))


def moments(values: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and summed squared deviation of every group, in float64.

    Two passes over widened values, so nothing cancels where the mean is far greater than the deviation.

    Args:
        values: `(batch, channels, rows, columns)`, any float dtype; a view will do.
        groups: how many groups the channels form.

    Returns:
        `(2, batch, groups)`: means, then sums of squared deviations.
    """
    batch, channels = values.shape[:2]
    by_group = values.unflatten(1, (groups, channels // groups))
    result = torch.empty((2, batch, groups), dtype=torch.float64, device=values.device)
    step = _groups_at_once(values.numel(), values.element_size(), groups)
    for first in range(0, groups, step):
        chunk = by_group[:, first : first + step]
        wide = chunk.to(torch.float64, copy=True, memory_format=torch.contiguous_format).flatten(2)
        means = wide.mean(dim=-1)
        result[0, :, first : first + step] = means
        result[1, :, first : first + step] = wide.sub_(means.unsqueeze(-1)).square_().sum(dim=-1)
        del wide  # before the next chunk is copied
    return result


def merge_moments(counts: Sequence[int], parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of a whole from those of its parts (Chan, Golub and LeVeque's update), in order.

    The order is fixed, so every rank that merges the same parts gets the same bits.

    Args:
        counts: how many values each part's moments cover.
        parts: each part's `(2, ...)` moments, float64, as `moments` gives them.

    Returns:
        The mean and the biased variance, each of shape `(...)`, float64.
    """
    total, (mean, squares) = counts[0], parts[0]
    for count, (other_mean, other_squares) in zip(counts[1:], parts[1:], strict=True):
        delta = other_mean - mean
        joined = total + count
        mean = mean + delta * (count / joined)
        squares = squares + other_squares + delta * delta * (total * count / joined)
        total = joined
    return mean, squares / total


def apply_statistics(
    norm: nn.GroupNorm, values: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    """Normalise with given statistics and apply the layer's affine parameters.

    One kernel, no temporary as large as the input: batch normalisation in eval mode, the batch folded into
    the channels, reads low precision values with float32 statistics.

    Args:
        norm: the layer: its groups, eps and parameters.
        values: `(batch, channels, rows, columns)`.
        mean: `(batch, groups)`, float64.
        variance: `(batch, groups)`, float64.

    Returns:
        The layer's output, in the shape and dtype of `values`.
    """
    batch, channels = values.shape[:2]
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32

    def spread(statistic: torch.Tensor) -> torch.Tensor:
        return statistic.to(dtype).repeat_interleave(channels // norm.num_groups, dim=1).flatten()

    def repeated(parameter: torch.Tensor | None) -> torch.Tensor | None:
        return None if parameter is None else parameter.to(dtype).repeat(batch)

    folded = values.reshape(1, batch * channels, *values.shape[2:])
    result = F.batch_norm(
        folded,
        spread(mean),
        spread(variance),
        repeated(norm.weight),
        repeated(norm.bias),
        training=False,
        eps=norm.eps,
    )
    return result.view(values.shape)


def shared_group_norm(norm: nn.GroupNorm, exchange: Exchange) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `norm` that normalises with the whole picture's statistics.

    Each rank contributes its own core once; what it holds besides is normalised with the same statistics.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        mine = moments(exchange.core(values), norm.num_groups)
        everyone = exchange.group.all_gather(mine, exchange.ranks, "normalisation statistics")
        per_position = norm.num_channels // norm.num_groups
        counts = [area * per_position for area in exchange.core_areas(values)]
        return apply_statistics(norm, values, *merge_moments(counts, everyone))

    return forward
