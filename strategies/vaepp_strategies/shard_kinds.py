"""The layers that `shard` replaces, by the name of their class: what a trace of calls is read by."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ATTENTION",
    "CACHED_CONVOLUTIONS",
    "CLIP_CONVOLUTIONS",
    "CLIP_INTERPOLATING",
    "COVERING",
    "FRAME_NORMS",
    "GIVERS",
    "GUIDED_NORMS",
    "HANDING_BACK",
    "HOLDING_CONVOLUTIONS",
    "INTERPOLATING",
    "MASKED_ATTENTION",
    "MODULATED",
    "PADDING_DOWNSAMPLES",
    "PADS",
    "POSITION_ATTENTION",
    "UPSAMPLES",
    "UPSAMPLES_BY_CHOICE",
]

HANDING_BACK = ("CogVideoXCausalConv3d",)
"""Convolutions that return frames for their next call beside their output."""

HOLDING_CONVOLUTIONS = (
    *HANDING_BACK,
    "HunyuanVideo15CausalConv3d",
    "HunyuanVideoCausalConv3d",
    "LTX2VideoCausalConv3d",
    "LTXVideoCausalConv3d",
)
"""Those that keep the convolution itself in a layer of their own."""

CACHED_CONVOLUTIONS = ("QwenImageCausalConv3d", "WanCausalConv3d")
"""Those that are given frames of their last call, and put them and padding in front of their input."""

CLIP_CONVOLUTIONS = (
    "CogVideoXSafeConv3d",
    "Conv3d",
    *CACHED_CONVOLUTIONS,
    *HOLDING_CONVOLUTIONS,
)
"""Convolutions over frames, rows and columns, padded by half their kernel along rows and columns.

Not at all where their stride is as long as their kernel.
"""

CLIP_INTERPOLATING = ("HunyuanVideoUpsampleCausal3D",)
"""Nearest interpolation of a clip, in front of a convolution of its own."""

INTERPOLATING = (*CLIP_INTERPOLATING, "Upsample2D")
"""Nearest interpolation in front of a convolution of their own."""

UPSAMPLES = ("QwenImageUpsample", "Upsample", "WanUpsample", *INTERPOLATING)
"""Nearest interpolation."""

UPSAMPLES_BY_CHOICE = ("DCUpBlock2d",)
"""Nearest interpolation in front of a convolution of their own, where their `interpolate` is set."""

PADS = ("ZeroPad2d",)
"""Padding in front of a convolution that has none of its own."""

PADDING_DOWNSAMPLES = ("CogVideoXDownsample3D",)
"""Layers that pad a row and a column at the end of every frame, and then call their convolution."""

FRAME_NORMS = ("MochiChunkedGroupNorm3D",)
"""Group normalisation of each frame on its own."""

MODULATED: Mapping[str, tuple[str, ...]] = {"LTXVideoResnetBlock3d": ("RMSNorm", "SiLU")}
"""Residual blocks that move axes, and scale channels, between these layers and the ones before them."""

POSITION_ATTENTION = ("HunyuanVideo15AttnBlock", "QwenImageAttentionBlock", "WanAttentionBlock")
"""Single-head attention after a normalisation that works position by position."""

ATTENTION = (
    *POSITION_ATTENTION,
    "Attention",
    "HunyuanImageAttentionBlock",
    "SanaMultiscaleLinearAttention",
)
"""Layers in which positions read each other."""

GUIDED_NORMS = ("CogVideoXSpatialNorm3D",)
"""Normalisations that read the latent beside their input."""

GIVERS = ("GroupNorm", *FRAME_NORMS, *GUIDED_NORMS, *PADS)
"""Layers, beside those that interpolate, that can fetch the rows which a later layer needs."""

MASKED_ATTENTION: Mapping[str, int] = {"HunyuanVideo15AttnBlock": 1, "HunyuanVideoMidBlock3D": 3}
"""Layers whose own code masks all positions by all positions; how many values it holds for each pair at once.

The second makes its mask in float32: three values of two bytes with the result. On a band nothing is masked.
"""

COVERING: Mapping[str, tuple[str, ...]] = {
    "Attention": ("GroupNorm",),
    "Downsample2D": (),
    "HunyuanImageAttentionBlock": (),
    "SanaMultiscaleLinearAttention": ("Conv2d",),
    **dict.fromkeys((*POSITION_ATTENTION, *FRAME_NORMS, *GUIDED_NORMS, *HOLDING_CONVOLUTIONS), ()),
}
"""Layers replaced as a whole, each with the kinds of layer it still calls that exchange themselves."""
