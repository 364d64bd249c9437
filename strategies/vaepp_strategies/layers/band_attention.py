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
    "band_attention",
    "band_attention_block",
    "mix_positions",
    "normalised_positions",
    "project_positions",
]

Project = Callable[[torch.Tensor], torch.Tensor]


def band_attention(attention: Any, bands: Bands, scale: Scale) -> Callable[..., torch.Tensor]:
    """A forward for diffusers' `Attention` with one head and a group normalisation.

    Args:
        attention: self-attention over `(batch, channels, rows, columns)`; see `inspect.unknown_layers`.
        bands: this rank's band.
        scale: the resolution of its input.
    """

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tokens = normalised_positions(attention.group_norm, hidden_states.contiguous(), bands, scale)
        query = attention.to_q(tokens[bands.group.rank])
        mixed = mix_positions(query, torch.cat(tokens, dim=1), attention.to_k.weight)
        result = _picture(attention.to_out[1](attention.to_out[0](attention.to_v(mixed))), hidden_states)
        if attention.residual_connection:
            result = result + hidden_states
        scaled: torch.Tensor = result / attention.rescale_output_factor
        return scaled

    return forward


def band_attention_block(block: Any, bands: Bands, scale: Scale) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `HunyuanImageAttentionBlock`, whose projections are 1x1 convolutions.

    Args:
        block: the layer.
        bands: this rank's band.
        scale: the resolution of its input.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        tokens = normalised_positions(block.norm, values.contiguous(), bands, scale)
        query = project_positions(block.to_q, tokens[bands.group.rank])
        mixed = mix_positions(query, torch.cat(tokens, dim=1), block.to_k.weight.flatten(1))
        return _picture(project_positions(block.proj, project_positions(block.to_v, mixed)), values) + values

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
    return F.scaled_dot_product_attention(query[:, None], everyone[:, None], everyone[:, None], scale=scale)[
        :, 0
    ]


def _picture(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(batch, positions, channels)` in the shape of `like`.

    Contiguous: transposed strides would reach the next convolutions and switch them to other kernels.
    """
    return tokens.transpose(1, 2).reshape(like.shape).contiguous()


def normalised_positions(norm: Any, values: torch.Tensor, bands: Bands, scale: Scale) -> list[torch.Tensor]:
    """Everyone's normalised positions, in rank order, each `(batch, positions, channels)`."""
    batch, channels = values.shape[:2]
    areas = bands.areas(values, scale)
    mine = moments(values, norm.num_groups)
    shapes = [(batch, channels, area) for area in areas]
    everyone, positions = bands.gather_with_bands(mine, values.flatten(2), shapes, "statistics and positions")
    per_position = norm.num_channels // norm.num_groups
    mean, variance = merge_moments([area * per_position for area in areas], everyone)
    return [
        apply_statistics(norm, part[..., None], mean, variance)[..., 0].transpose(1, 2) for part in positions
    ]
