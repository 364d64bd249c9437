"""The layers of video VAEs that `shard` knows: what is refused of each, and what each runs on a band."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as cog
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hunyuan
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as hunyuan15
from diffusers.models.autoencoders import autoencoder_kl_ltx as ltx
from diffusers.models.autoencoders import autoencoder_kl_ltx2 as ltx2
from diffusers.models.autoencoders import autoencoder_kl_mochi as mochi
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.embeddings import (
    PixArtAlphaCombinedTimestepSizeEmbeddings,
    TimestepEmbedding,
    Timesteps,
)
from diffusers.models.normalization import LpNorm
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import nn

from vaepp_strategies.layers.band_norm import band_frame_norm
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.clip_attention import (
    band_causal_attention,
    band_causal_attention_block,
    band_frame_attention,
)
from vaepp_strategies.layers.clip_conv import CLIP_LAYERS, band_clip_convolution, clip_convolution
from vaepp_strategies.layers.guided_norm import band_guided_decoder, band_guided_norm
from vaepp_strategies.layers.inspect import Check
from vaepp_strategies.layers.modulated import band_modulated_residual
from vaepp_strategies.layers.reach import NO_ROWS, Reach
from vaepp_strategies.layers.resample import band_clip_upsample, band_pad
from vaepp_strategies.shard_steps import ShardStep

__all__ = ["SHARD_CLIP_LAYERS", "check_upsample", "clip_forward"]

Forward = Callable[..., Any]


def _check_convolution(layer: nn.Module) -> str | None:
    clip = clip_convolution(layer)
    own = clip.convolution
    (kernel, across), stride = own.kernel_size[1:], own.stride[1:]
    # Padding that the layer in front of it does for it is read from that layer.
    modes = ("zeros", "reflect") if clip.further == "causal" else ("zeros",)
    if set(own.dilation) != {1} or own.padding_mode not in modes:
        return f"its dilation is {own.dilation} and its padding mode {own.padding_mode!r}"
    square = kernel == across and len(set(stride)) == 1 and len(set(clip.space)) == 1
    if square and kernel == stride[0] and clip.space[0] == 0:
        return None  # it takes the rows of a latent together
    square = square and clip.space[0] == kernel // 2
    if not square or kernel % 2 == 0 or stride[0] > min(2, kernel):
        return f"its kernel is {own.kernel_size}, its stride {own.stride} and its padding {clip.space}"
    return None


def _check_pad(layer: nn.ZeroPad2d) -> str | None:
    left, right, top, bottom = layer.padding
    return None if (left, right) == (top, bottom) else f"its padding is {layer.padding}"


def check_upsample(layer: nn.Upsample) -> str | None:
    """What is wrong with an interpolation, or None."""
    factor = layer.scale_factor
    if isinstance(factor, tuple) and len(set(factor)) == 1:
        factor = factor[0]
    if layer.mode not in ("nearest", "nearest-exact"):
        return f"its mode is {layer.mode!r}"
    return None if isinstance(factor, (int, float)) and factor == int(factor) else f"its factor is {factor}"


def _check_upsample_block(layer: Any) -> str | None:
    rows, columns = layer.upsample_factor[1:]
    return None if rows == columns == int(rows) else f"its factor is {layer.upsample_factor}"


def _check_mid_block(layer: Any) -> str | None:
    for attention in layer.attentions:
        if attention is not None and (attention.heads != 1 or attention.group_norm is None):
            return f"its attention has {attention.heads} heads, or no group normalisation"
    return None


def _check_layer_norm(layer: nn.LayerNorm) -> str | None:
    """Over the last axis it works on single positions, where clips have their channels last."""
    shape = layer.normalized_shape
    return None if len(shape) == 1 else f"it normalises over {len(shape)} axes"


def _check_channel_norm(layer: Any) -> str | None:
    return None if layer.channel_dim == 1 else f"it normalises over axis {layer.channel_dim}"


def _good(layer: nn.Module) -> str | None:
    del layer
    return None


SHARD_CLIP_LAYERS: Mapping[type[nn.Module], Check] = {
    **dict.fromkeys(CLIP_LAYERS, _check_convolution),
    nn.ZeroPad2d: _check_pad,
    **dict.fromkeys((wan.WanUpsample, qwen.QwenImageUpsample), check_upsample),
    hunyuan.HunyuanVideoUpsampleCausal3D: _check_upsample_block,
    hunyuan.HunyuanVideoMidBlock3D: _check_mid_block,
    **dict.fromkeys((wan.WanAttentionBlock, qwen.QwenImageAttentionBlock), _good),
    hunyuan15.HunyuanVideo15AttnBlock: _good,
    # Not replaced: they move frames, channels, or pixels of one latent, and call layers that are.
    **dict.fromkeys((wan.WanEncoder3d, wan.WanDecoder3d, wan.WanResidualBlock, wan.WanResample), _good),
    **dict.fromkeys((wan.WanResidualUpBlock, wan.WanResidualDownBlock, wan.WanRMS_norm), _good),
    **dict.fromkeys((wan.AvgDown3D, wan.DupUp3D, qwen.QwenImageRMS_norm, qwen.QwenImageResample), _good),
    **dict.fromkeys((qwen.QwenImageEncoder3d, qwen.QwenImageDecoder3d, qwen.QwenImageResidualBlock), _good),
    **dict.fromkeys((hunyuan15.HunyuanVideo15Upsample, hunyuan15.HunyuanVideo15Downsample), _good),
    **dict.fromkeys((hunyuan15.HunyuanVideo15Encoder3D, hunyuan15.HunyuanVideo15Decoder3D), _good),
    hunyuan15.HunyuanVideo15RMS_norm: _good,
    nn.LayerNorm: _check_layer_norm,
    nn.Linear: _good,  # over the last axis, as the one above
    **dict.fromkeys((ltx.LTXVideoEncoder3d, ltx.LTXVideoDecoder3d, ltx.LTXVideoResnetBlock3d), _good),
    **dict.fromkeys((ltx.LTXVideoMidBlock3d, ltx.LTXVideoUpBlock3d, ltx.LTXVideoDownBlock3D), _good),
    **dict.fromkeys((ltx.LTXVideo095DownBlock3D, ltx.LTXVideoUpsampler3d), _good),
    ltx.LTXVideoDownsampler3d: _good,
    **dict.fromkeys((ltx2.LTX2VideoEncoder3d, ltx2.LTX2VideoDecoder3d, ltx2.LTX2VideoResnetBlock3d), _good),
    **dict.fromkeys((ltx2.LTX2VideoMidBlock3d, ltx2.LTX2VideoUpBlock3d, ltx2.LTX2VideoDownBlock3D), _good),
    **dict.fromkeys((ltx2.LTX2VideoUpsampler3d, ltx2.LTX2VideoDownsampler3d), _good),
    ltx2.PerChannelRMSNorm: _check_channel_norm,
    **dict.fromkeys((cog.CogVideoXEncoder3D, cog.CogVideoXDecoder3D, cog.CogVideoXResnetBlock3D), _good),
    **dict.fromkeys((cog.CogVideoXDownBlock3D, cog.CogVideoXMidBlock3D, cog.CogVideoXUpBlock3D), _good),
    **dict.fromkeys((cog.CogVideoXSpatialNorm3D, CogVideoXDownsample3D, CogVideoXUpsample3D), _good),
    **dict.fromkeys((mochi.MochiEncoder3D, mochi.MochiDecoder3D, mochi.MochiResnetBlock3D), _good),
    **dict.fromkeys((mochi.MochiDownBlock3D, mochi.MochiMidBlock3D, mochi.MochiUpBlock3D), _good),
    **dict.fromkeys((mochi.MochiChunkedGroupNorm3D, mochi.FourierFeatures, LpNorm), _good),
    # They work on a timestep, which is every rank's.
    **dict.fromkeys((PixArtAlphaCombinedTimestepSizeEmbeddings, TimestepEmbedding, Timesteps), _good),
}
"""Layers known to work on a band of a clip, each with its check."""


def clip_forward(layer: Any, name: str, bands: Bands, step: ShardStep | None, give: Reach) -> Forward | None:
    """One layer's forward on a band of a clip; None for one that works as in a picture.

    Args:
        layer: the layer.
        name: its name in the VAE.
        bands: this rank's band.
        step: what it exchanges, or None.
        give: rows around its output that a later layer reads.
    """
    reach = NO_ROWS if step is None else step.reach
    if type(layer) in CLIP_LAYERS:
        apart = not clip_convolution(layer).window(bands.axis).reach
        return None if apart else band_clip_convolution(layer, bands, name, give)
    if isinstance(layer, nn.ZeroPad2d):
        return band_pad(bands, reach, name)
    if isinstance(layer, hunyuan.HunyuanVideoUpsampleCausal3D):
        return band_clip_upsample(layer, bands, reach, name)
    if isinstance(layer, hunyuan.HunyuanVideoMidBlock3D):
        return _mid_block(layer)
    if isinstance(layer, ltx.LTXVideoResnetBlock3d):
        return band_modulated_residual(layer, bands)
    if isinstance(layer, cog.CogVideoXDecoder3D):
        return band_guided_decoder(layer, bands, name)
    if step is None:
        return None
    if isinstance(layer, mochi.MochiChunkedGroupNorm3D):
        return band_frame_norm(layer.norm_layer, bands, reach, step.scale)
    if isinstance(layer, cog.CogVideoXSpatialNorm3D):
        return band_guided_norm(layer, bands, reach, step.scale)
    if isinstance(layer, (wan.WanAttentionBlock, qwen.QwenImageAttentionBlock)):
        return band_frame_attention(layer, bands, step.scale)
    if isinstance(layer, hunyuan15.HunyuanVideo15AttnBlock):
        return band_causal_attention_block(layer, bands, step.scale)
    if isinstance(layer, Attention):
        return band_causal_attention(layer, bands, step.scale)
    return None


def _mid_block(block: Any) -> Forward:
    """A forward for a block whose attention is replaced by one over clips, which needs no mask."""

    def forward(clip: torch.Tensor) -> torch.Tensor:
        clip = block.resnets[0](clip)
        for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
            clip = residual(clip if attention is None else attention(clip))
        return clip

    return forward
