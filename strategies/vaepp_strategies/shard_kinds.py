"""The layers that `shard` replaces, by the name of their class: what a trace of calls is read by."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "CLIP_CONVOLUTIONS",
    "CLIP_INTERPOLATING",
    "COVERING",
    "GIVERS",
    "HOLDING_CONVOLUTIONS",
    "INTERPOLATING",
    "MASKED_ATTENTION",
    "PADS",
    "POSITION_ATTENTION",
    "UPSAMPLES",
]

HOLDING_CONVOLUTIONS = (
    "HunyuanVideo15CausalConv3d",
    "HunyuanVideoCausalConv3d",
    "LTX2VideoCausalConv3d",
    "LTXVideoCausalConv3d",
)
"""Those that keep the convolution itself in a layer of their own."""

CLIP_CONVOLUTIONS = ("Conv3d", "QwenImageCausalConv3d", "WanCausalConv3d", *HOLDING_CONVOLUTIONS)
"""Convolutions over frames, rows and columns, padded by half their kernel along rows and columns."""

CLIP_INTERPOLATING = ("HunyuanVideoUpsampleCausal3D",)
"""Nearest interpolation of a clip, in front of a convolution of its own."""

INTERPOLATING = (*CLIP_INTERPOLATING, "Upsample2D")
"""Nearest interpolation in front of a convolution of their own."""

UPSAMPLES = ("QwenImageUpsample", "Upsample", "WanUpsample", *INTERPOLATING)
"""Nearest interpolation."""

PADS = ("ZeroPad2d",)
"""Padding in front of a convolution that has none of its own."""

GIVERS = ("GroupNorm", *UPSAMPLES, *PADS)
"""Layers that can fetch the rows which a later layer needs."""

POSITION_ATTENTION = ("HunyuanVideo15AttnBlock", "QwenImageAttentionBlock", "WanAttentionBlock")
"""Single-head attention after a normalisation that works position by position."""

MASKED_ATTENTION: Mapping[str, int] = {"HunyuanVideo15AttnBlock": 1, "HunyuanVideoMidBlock3D": 3}
"""Layers whose own code masks all positions by all positions; how many values it holds for each pair at once.

The second makes its mask in float32: three values of two bytes with the result. On a band nothing is masked.
"""

COVERING: Mapping[str, tuple[str, ...]] = {
    "Attention": ("GroupNorm",),
    "Downsample2D": (),
    "HunyuanImageAttentionBlock": (),
    "SanaMultiscaleLinearAttention": ("Conv2d",),
    **dict.fromkeys((*POSITION_ATTENTION, *HOLDING_CONVOLUTIONS), ()),
}
"""Layers replaced as a whole, each with the kinds of layer it still calls that exchange themselves."""
