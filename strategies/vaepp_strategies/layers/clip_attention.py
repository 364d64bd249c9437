"""Single-head self-attention of a band over whole frames of a clip; `band_attention` says what travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vaepp_strategies.layers.band_attention import mix_positions, normalised_positions, project_positions
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.parts import Scale

__all__ = ["band_causal_attention", "band_causal_attention_block", "band_frame_attention"]

Forward = Callable[[torch.Tensor], torch.Tensor]


def band_frame_attention(block: Any, bands: Bands, scale: Scale) -> Forward:
    """A forward for attention inside each frame, after a normalisation of single positions.

    Args:
        block: a layer over `(batch, channels, frames, rows, columns)` with `norm`, `to_qkv` and `proj`, the
            last two 1x1 convolutions.
        bands: this rank's band.
        scale: the resolution of its input.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        batch, channels, frames = values.shape[:3]
        pictures = values.transpose(1, 2).reshape(batch * frames, channels, *values.shape[-2:])
        own = block.norm(pictures).flatten(2).transpose(1, 2).contiguous()
        everyone = torch.cat(bands.gather(own, bands.areas(pictures, scale), 1, "positions"), dim=1)
        query_weight, key_weight, value_weight = block.to_qkv.weight.flatten(1).chunk(3)
        query_bias, _, value_bias = block.to_qkv.bias.chunk(3)
        mixed = mix_positions(F.linear(own, query_weight, query_bias), everyone, key_weight)
        result = project_positions(block.proj, F.linear(mixed, value_weight, value_bias))
        # Contiguous pictures: transposed strides would switch the next convolutions to other kernels.
        frames_first = result.transpose(1, 2).reshape(batch, frames, channels, *values.shape[-2:])
        return frames_first.contiguous().transpose(1, 2) + values

    return forward


def band_causal_attention(attention: Any, bands: Bands, scale: Scale) -> Forward:
    """A forward for diffusers' `Attention` with one head, over all positions of a frame and those before it.

    Unlike the layer it takes and returns `(batch, channels, frames, rows, columns)`, and needs no mask.

    Args:
        attention: a layer with a group normalisation; see `inspect.unknown_layers`.
        bands: this rank's band.
        scale: the resolution of its input.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        tokens = normalised_positions(attention.group_norm, values.contiguous(), bands, scale)
        query = attention.to_q(tokens[bands.group.rank])
        mixed = _mix_causally(query, tokens, attention.to_k.weight, values.shape[2])
        result = _clip(attention.to_out[1](attention.to_out[0](attention.to_v(mixed))), values)
        if attention.residual_connection:
            result = result + values
        scaled: torch.Tensor = result / attention.rescale_output_factor
        return scaled

    return forward


def band_causal_attention_block(block: Any, bands: Bands, scale: Scale) -> Forward:
    """A forward for causal attention whose projections are 1x1x1 convolutions.

    Args:
        block: a layer with `norm`, which works on single positions, `to_q`, `to_k`, `to_v` and `proj_out`.
        bands: this rank's band.
        scale: the resolution of its input.
    """

    def forward(values: torch.Tensor) -> torch.Tensor:
        own = block.norm(values).flatten(2).transpose(1, 2).contiguous()
        tokens = bands.gather(own, bands.areas(values, scale), 1, "positions")
        query = project_positions(block.to_q, own)
        mixed = _mix_causally(query, tokens, block.to_k.weight.flatten(1), values.shape[2])
        return _clip(project_positions(block.proj_out, project_positions(block.to_v, mixed)), values) + values

    return forward


def _mix_causally(
    query: torch.Tensor, tokens: Sequence[torch.Tensor], key_weight: torch.Tensor, frames: int
) -> torch.Tensor:
    """Each own position's mean of everyone's of its frame and those before: `(batch, positions, channels)`.

    Frame by frame, over what it sees: no mask of all positions by all positions, and half the work.

    Args:
        query: own queries, `(batch, frames times own positions, inner width)`.
        tokens: everyone's normalised positions, each `(batch, frames times positions, channels)`.
        key_weight: the weight of the key projection, `(inner width, channels)`.
        frames: how many frames there are.
    """
    by_frame = torch.cat([part.unflatten(1, (frames, -1)) for part in tokens], dim=2)
    positions, everyone = by_frame.shape[2], by_frame.flatten(1, 2)
    mixed = [
        mix_positions(own, everyone[:, : (frame + 1) * positions], key_weight)
        for frame, own in enumerate(query.chunk(frames, dim=1))
    ]
    return torch.cat(mixed, dim=1)


def _clip(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(batch, positions, channels)` in the shape of `like`, contiguous."""
    return tokens.transpose(1, 2).reshape(like.shape).contiguous()
