"""Single-head self-attention of a band over the whole picture, at half the bytes of keys and values.

With one head, scores need no keys: `q . (Wk x + bk) = (Wk' q) . x + q . bk`, and the last term is the same
for every position, so softmax does not see it. Values can wait likewise: a weighted mean of `Wv x + bv` is
`Wv (mean of x) + bv`. So ranks exchange the normalised positions alone, and each projects its own queries and
results only: no work is repeated. The positions travel before they are normalised, in the messages that carry
the normalisation's statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.norm import apply_statistics, merge_moments, moments
from vaepp_strategies.layers.parts import Scale

__all__ = [
    "NormalisedPositions",
    "Positions",
    "band_attention",
    "band_attention_block",
    "band_positions",
    "mix_positions",
    "normalised_positions",
    "own_positions",
    "project_positions",
    "tokens_of",
]

NormalisedPositions = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""This rank's own rows as they are, then its own normalised positions and everyone's, each
`(batch, positions, channels)`."""

Positions = Callable[[nn.GroupNorm, torch.Tensor], NormalisedPositions]
"""Normalises attention's input."""


def band_attention(attention: Any, positions: Positions) -> Callable[..., torch.Tensor]:
    """A forward for diffusers' `Attention` with one head and a group normalisation.

    Args:
        attention: self-attention over `(batch, channels, rows, columns)`; see `inspect.unknown_layers`.
        positions: normalises its input.
    """

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        rows, own, everyone = positions(attention.group_norm, hidden_states)
        mixed = mix_positions(attention.to_q(own), everyone, attention.to_k.weight)
        result = _picture(attention.to_out[1](attention.to_out[0](attention.to_v(mixed))), rows)
        if attention.residual_connection:
            result = result + rows
        scaled: torch.Tensor = result / attention.rescale_output_factor
        return scaled

    return forward


def band_attention_block(block: Any, positions: Positions) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `HunyuanImageAttentionBlock`, whose projections are 1x1 convolutions.

    Args:
        block: the layer.
        positions: normalises its input.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        rows, own, everyone = positions(block.norm, values)
        mixed = mix_positions(project_positions(block.to_q, own), everyone, block.to_k.weight.flatten(1))
        return _picture(project_positions(block.proj, project_positions(block.to_v, mixed)), rows) + rows

    return forward


def project_positions(convolution: nn.Conv2d | nn.Conv3d, tokens: torch.Tensor) -> torch.Tensor:
    """A 1x1 or 1x1x1 convolution of `(batch, positions, channels)`."""
    return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)


def mix_positions(query: torch.Tensor, everyone: torch.Tensor, key_weight: torch.Tensor) -> torch.Tensor:
    """Each own position's mean of everyone's, weighted by softmax: `(batch, positions, channels)`.

    Args:
        query: own queries, `(batch, own positions, inner width)`.
        everyone: everyone's normalised positions, `(batch, positions, channels)`.
        key_weight: the weight of the key projection, `(inner width, channels)`.
    """
    # One head: a query against a position's key is this vector against the position itself.
    query, scale = query @ key_weight, query.shape[-1] ** -0.5
    # Fused kernels want the channels of a position side by side. The others keep all scores in memory.
    everyone = everyone.contiguous()[:, None]
    return F.scaled_dot_product_attention(query[:, None], everyone, everyone, scale=scale)[:, 0]


def _picture(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(batch, positions, channels)` in the shape of `like`.

    Contiguous: transposed strides would reach the next convolutions and switch them to other kernels.
    """
    return tokens.transpose(1, 2).reshape(like.shape).contiguous()


def tokens_of(picture: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, rows, columns)` as `(batch, positions, channels)`."""
    return picture.flatten(2).transpose(1, 2)


def band_positions(bands: Bands, scale: Scale) -> Positions:
    """What attention reads, where each rank holds its band.

    Args:
        bands: this rank's band.
        scale: the resolution of the attention's input.
    """

    def normalised(norm: nn.GroupNorm, values: torch.Tensor) -> NormalisedPositions:
        tokens = normalised_positions(norm, values.contiguous(), bands, scale)
        return values, tokens[bands.group.rank], torch.cat(tokens, dim=1)

    return normalised


def own_positions(bands: Bands) -> Positions:
    """What attention reads, where every rank holds the whole picture at the latent's resolution.

    Args:
        bands: this rank's band.
    """
    part = bands.parts.parts[bands.group.rank]

    def normalised(norm: nn.GroupNorm, values: torch.Tensor) -> NormalisedPositions:
        normed = norm(values)
        own = values.narrow(bands.axis, part.start, part.length)
        return own, tokens_of(normed.narrow(bands.axis, part.start, part.length)), tokens_of(normed)

    return normalised


def normalised_positions(norm: Any, values: torch.Tensor, bands: Bands, scale: Scale) -> list[torch.Tensor]:
    """Everyone's normalised positions, in rank order, each `(batch, positions, channels)`.

    They travel with the statistics, before they are normalised.
    """
    band, areas = values.flatten(2), bands.areas(values, scale)
    mine = moments(values, norm.num_groups)
    shapes = [(*band.shape[:2], area) for area in areas]
    everyone, positions = bands.gather_with_bands(
        mine, [band] * bands.ranks, shapes, "statistics and positions"
    )
    per_position = norm.num_channels // norm.num_groups
    mean, variance = merge_moments([area * per_position for area in areas], everyone)
    return [tokens_of(apply_statistics(norm, part[..., None], mean, variance)) for part in positions]
