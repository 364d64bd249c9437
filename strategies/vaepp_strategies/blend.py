"""The linear blend of neighbouring tiles, all rows at once and still the bits of diffusers' loop."""

from __future__ import annotations

import torch

__all__ = ["blend_into", "blend_weights"]


def blend_weights(extent: int, like: torch.Tensor, grain: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the earlier and the later tile, row by row.

    diffusers multiplies each row by a Python float. torch rounds that float once, to the type in which the
    multiplication is done: float32 for float32 and everything narrower, float64 for float64. So the weights
    are made in float64 and rounded to that type.

    Args:
        extent: how many rows or columns are blended.
        like: a tensor of the blended dtype and device.
        grain: how many neighbours share one weight.

    Returns:
        Two tensors of shape `(extent,)`.
    """
    later = torch.arange(extent, dtype=torch.float64).div(grain, rounding_mode="floor") * grain / extent
    dtype = torch.promote_types(like.dtype, torch.float32)
    return (1 - later).to(like.device, dtype), later.to(like.device, dtype)


def blend_into(strip: torch.Tensor, tile: torch.Tensor, dim: int, grain: int = 1) -> None:
    """Blend the end of an earlier tile into the start of a later one, in place.

    Args:
        strip: the earlier tile's last rows, columns or frames, as many as are blended.
        tile: the later tile; its first rows, columns or frames are replaced.
        dim: -3 to blend frames, -2 to blend rows, -1 to blend columns.
        grain: how many neighbours share one weight.
    """
    extent = strip.shape[dim]
    shape = (extent, *[1] * (-dim - 1))
    before, after = (weight.view(shape) for weight in blend_weights(extent, tile, grain))
    target = tile.narrow(dim, 0, extent)
    # Each product is rounded to the tiles' dtype before the sum, as separate operations round it.
    mixed = (strip * before).to(tile.dtype)
    mixed += (target * after).to(tile.dtype)
    target.copy_(mixed)
