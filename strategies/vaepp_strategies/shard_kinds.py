"""The layers that `shard` replaces, by the name of their class: what a trace of calls is read by."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CLIP_CONVOLUTIONS", "COVERING", "GIVERS", "PADS", "POSITION_ATTENTION", "UPSAMPLES"]

CLIP_CONVOLUTIONS = ("Conv3d", "QwenImageCausalConv3d", "WanCausalConv3d")
"""Convolutions over frames, rows and columns, padded by half their kernel along rows and columns."""

UPSAMPLES = ("QwenImageUpsample", "Upsample", "Upsample2D", "WanUpsample")
"""Nearest interpolation."""

PADS = ("ZeroPad2d",)
"""Padding in front of a convolution that has none of its own."""

GIVERS = ("GroupNorm", *UPSAMPLES, *PADS)
"""Layers that can fetch the rows which a later layer needs."""

POSITION_ATTENTION = ("QwenImageAttentionBlock", "WanAttentionBlock")
"""Single-head attention of each frame, after a normalisation that works position by position."""

COVERING: Mapping[str, tuple[str, ...]] = {
    "Attention": ("GroupNorm",),
    "Downsample2D": (),
    "HunyuanImageAttentionBlock": (),
    "SanaMultiscaleLinearAttention": ("Conv2d",),
    **dict.fromkeys(POSITION_ATTENTION, ()),
}
"""Layers replaced as a whole, each with the kinds of layer it still calls that exchange themselves."""
