"""Multi-scale linear attention of a band over the whole picture: one small sum over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vaepp_strategies.layers.bands import Bands

__all__ = ["band_linear_attention"]


def band_linear_attention(attention: Any, bands: Bands) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for diffusers' `SanaMultiscaleLinearAttention`.

    Its keys and values meet in one small matrix for each head, a sum over positions, so that each rank adds
    its own part. Where a picture has so few positions that the layer itself turns to the quadratic form, the
    linear one gives the same numbers up to rounding. The convolutions that it calls must be replaced too.

    Args:
        attention: the layer.
        bands: this rank's band.
    """

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = _projected(attention, hidden_states)
        # A row of ones beside the values sums the keys, by which the result is divided.
        mine = F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(-1, -2)
        mixed = bands.sum(mine, "products of values and keys") @ query
        mixed = mixed[:, :, :-1] / (mixed[:, :, -1:] + attention.eps)
        mixed = mixed.to(hidden_states.dtype).reshape(hidden_states.shape[0], -1, *hidden_states.shape[-2:])
        out: torch.Tensor = attention.to_out(mixed.movedim(1, -1))
        if attention.norm_type == "rms_norm":
            normed = attention.norm_out(out).movedim(-1, 1)
        else:
            normed = attention.norm_out(out.movedim(-1, 1))
        result: torch.Tensor = normed.contiguous()
        return result + hidden_states if attention.residual_connection else result

    return forward


def _projected(
    attention: Any, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of every scale, `(batch, heads, head width, positions)`, in float32."""
    last = hidden_states.movedim(1, -1)
    joined = torch.cat([attention.to_q(last), attention.to_k(last), attention.to_v(last)], dim=-1).movedim(
        -1, 1
    )
    joined = joined.contiguous()
    scales = torch.cat([joined, *(block(joined) for block in attention.to_qkv_multiscale)], dim=1)
    width = 3 * attention.attention_head_dim
    heads = scales.float().reshape(scales.shape[0], -1, width, scales.shape[-2] * scales.shape[-1])
    query, key, value = heads.chunk(3, dim=2)
    return attention.nonlinearity(query), attention.nonlinearity(key), value
