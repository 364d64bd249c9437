"""The layers that `shard` knows: what is refused of each, and what each runs on a band."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from diffusers.models.attention_processor import (
    Attention,
    MochiVaeAttnProcessor2_0,
    SanaMultiscaleAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from diffusers.models.autoencoders import autoencoder_dc as dc
from diffusers.models.autoencoders import autoencoder_kl_hunyuanimage as hunyuan
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import HunyuanImageAttentionBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.upsampling import Upsample2D
from torch import nn

from vaepp_sdk.vae.trace import LayerTrace
from vaepp_strategies.layers.attention import shared_attention
from vaepp_strategies.layers.band_attention import (
    band_attention,
    band_attention_block,
    band_positions,
    own_positions,
)
from vaepp_strategies.layers.band_norm import band_group_norm, band_pointwise
from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.conv import band_convolution
from vaepp_strategies.layers.doubled import band_doubled_convolution
from vaepp_strategies.layers.inspect import KNOWN_LAYERS, Check, unknown_layers
from vaepp_strategies.layers.linear_attention import band_linear_attention
from vaepp_strategies.layers.reach import NO_ROWS, Reach, Window
from vaepp_strategies.layers.resample import (
    band_doubling_block,
    band_downsample,
    band_padded_convolution,
    band_upsample,
    band_upsample_block,
)
from vaepp_strategies.shard_clip_layers import SHARD_CLIP_LAYERS, check_upsample, clip_forward
from vaepp_strategies.shard_plan import ShardPlan
from vaepp_strategies.shard_steps import ShardStep, passes_through, visible_calls
from vaepp_strategies.shard_windows import padded_by, window_of

__all__ = ["SHARD_LAYERS", "band_forwards", "refused_layers"]

Forward = Callable[..., Any]


def _check_convolution(layer: nn.Conv2d) -> str | None:
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    if layer.padding_mode != "zeros":
        return f"its padding mode is {layer.padding_mode!r}"
    if set(layer.dilation) != {1}:
        return f"its dilation is {layer.dilation}"
    square = len(set(kernel)) == len(set(stride)) == len(set(padding)) == 1
    halved = padding[0] == kernel[0] // 2 or (padding[0], kernel[0], stride[0]) == (0, 3, 2)
    if not square or kernel[0] % 2 == 0 or not halved or stride[0] > min(2, kernel[0]):
        return f"its kernel is {kernel}, its stride {stride} and its padding {padding!r}"
    return None


def _upsample_block(layer: Upsample2D) -> str | None:
    if layer.norm is not None or layer.use_conv_transpose or not layer.interpolate:
        return "it is not a plain nearest interpolation"
    if not layer.use_conv:
        return None
    return _check_convolution(layer.conv) if getattr(layer, "conv", None) is not None else "it has no conv"


def _downsample_block(layer: Downsample2D) -> str | None:
    if layer.norm is not None or not layer.use_conv or layer.padding != 0:
        return "it is not a convolution with padding 0"
    kernel, stride = tuple(layer.conv.kernel_size), tuple(layer.conv.stride)
    return None if (kernel, stride) == ((3, 3), (2, 2)) else f"its kernel {kernel} and stride {stride}"


def _attention(layer: Attention) -> str | None:
    if type(layer.processor) is MochiVaeAttnProcessor2_0:
        return None  # the blocks that have it call it over the frames of each position
    for name in ("to_q", "to_k", "to_v"):
        if type(getattr(layer, name)) is not nn.Linear:
            return f"its {name} is a {type(getattr(layer, name)).__name__}"
    return KNOWN_LAYERS[Attention](layer)


def _linear_attention(layer: SanaMultiscaleLinearAttention) -> str | None:
    if type(layer.processor) is not SanaMultiscaleAttnProcessor2_0:
        return f"its processor is a {type(layer.processor).__name__}"
    if layer.norm_type == "batch_norm":
        return _batch_norm(layer.norm_out)
    return None if layer.norm_type == "rms_norm" else f"its normalisation is {layer.norm_type}"


def _batch_norm(layer: nn.BatchNorm2d) -> str | None:
    frozen = layer.track_running_stats and not layer.training
    return None if frozen else "it normalises with the statistics of what it reads; call eval() on the VAE"


def _upsamples_nearest(layer: dc.DCUpBlock2d) -> str | None:
    mode = layer.interpolation_mode
    return f"its mode is {mode!r}" if layer.interpolate and mode != "nearest" else None


def _good(layer: nn.Module) -> str | None:
    del layer
    return None


SHARD_LAYERS: Mapping[type[nn.Module], Check] = {
    nn.Conv2d: _check_convolution,
    nn.GroupNorm: _good,
    nn.BatchNorm2d: _batch_norm,
    nn.Upsample: check_upsample,
    Upsample2D: _upsample_block,
    Downsample2D: _downsample_block,
    Attention: _attention,
    HunyuanImageAttentionBlock: _good,
    SanaMultiscaleLinearAttention: _linear_attention,
    dc.DCUpBlock2d: _upsamples_nearest,
    # Not replaced: they move channels, or pixels of one latent, and call layers that are.
    **dict.fromkeys((dc.Encoder, dc.Decoder, dc.ResBlock, dc.DCDownBlock2d, GLUMBConv, RMSNorm), _good),
    **dict.fromkeys((hunyuan.HunyuanImageEncoder2D, hunyuan.HunyuanImageDecoder2D), _good),
    **dict.fromkeys((hunyuan.HunyuanImageDownsample, hunyuan.HunyuanImageUpsample), _good),
}
"""Layers known to work on a band, each with its check; others must work position by position."""


def refused_layers(trace: LayerTrace, vae: nn.Module) -> list[str]:
    """Every layer that `shard` cannot run on a band, as `name (Class): reason`."""
    visible = tuple(call for _, call in visible_calls(trace))
    clip = len(trace.in_shape) == 5
    known = {**SHARD_LAYERS, **SHARD_CLIP_LAYERS} if clip else SHARD_LAYERS
    return unknown_layers(attrs.evolve(trace, calls=visible), vae, known)


def band_forwards(
    trace: LayerTrace, vae: nn.Module, bands: Bands, plan: ShardPlan
) -> Mapping[nn.Module, Forward]:
    """What every layer runs on this rank's band instead of its own forward.

    Args:
        trace: the calls of the decode or encode.
        vae: the VAE.
        bands: this rank's band.
        plan: what layers exchange and give.
    """
    steps, given = {step.name: step for step in plan.steps}, dict(plan.given)
    found = _front_forwards(vae, bands, plan, given) if plan.front else {}
    before = plan.front.layers if plan.front else ()
    for index, call in visible_calls(trace):
        if call.name in before:
            continue
        layer = vae.get_submodule(call.name)
        if layer in found:
            continue
        step, give = steps.get(call.name), given.get(call.name, NO_ROWS)
        reach = NO_ROWS if step is None else step.reach
        forward: Forward | None
        if isinstance(layer, nn.Conv2d) and padded_by(trace, index):
            forward = band_padded_convolution(layer, bands, call.name)
        elif isinstance(layer, nn.Conv2d):
            forward = _convolution(layer, call.name, bands, window_of(trace, index), give)
        else:
            forward = _forward(layer, call.name, bands, step)
        if len(trace.in_shape) == 5:
            forward = clip_forward(layer, call.name, bands, step, give) or forward
        if forward is None and passes_through(trace, index):
            forward = band_pointwise(layer, bands, reach, call.name)
        if forward is not None:
            found[layer] = forward
    return found


def _convolution(layer: Any, name: str, bands: Bands, window: Window, give: Reach) -> Forward | None:
    """A convolution's forward on a band; None where it reads single positions."""
    return None if window.pointwise else band_convolution(layer, bands, name, window, give)


def _forward(layer: Any, name: str, bands: Bands, step: ShardStep | None) -> Forward | None:
    """One layer's forward on a band; None for one that works position by position, or only calls others."""
    reach = NO_ROWS if step is None else step.reach
    if isinstance(layer, nn.GroupNorm):
        assert step is not None, "every normalisation exchanges"
        return band_group_norm(layer, bands, reach, step.scale)
    if isinstance(layer, nn.Upsample):
        return band_upsample(layer, bands, reach, name)
    if isinstance(layer, Upsample2D):
        return band_upsample_block(layer, bands, reach, name)
    if isinstance(layer, Downsample2D):
        return band_downsample(layer, bands, name)
    if isinstance(layer, dc.DCUpBlock2d) and layer.interpolate:
        return band_doubling_block(layer, bands, reach, name)
    if isinstance(layer, SanaMultiscaleLinearAttention):
        return band_linear_attention(layer, bands)
    if isinstance(layer, HunyuanImageAttentionBlock):
        assert step is not None, "every attention exchanges"
        return band_attention_block(layer, band_positions(bands, step.scale))
    if isinstance(layer, Attention) and step is not None:
        return (
            band_attention(layer, band_positions(bands, step.scale))
            if step.groups
            else shared_attention(layer, bands)
        )
    return None


def _front_forwards(
    vae: nn.Module, bands: Bands, plan: ShardPlan, given: Mapping[str, Reach]
) -> dict[nn.Module, Forward]:
    """The attention that ends what runs on the whole picture, and the upsampling that pays for it."""
    front = plan.front
    assert front is not None, "the plan says what is repeated"
    attention: Any = vae.get_submodule(front.attention)
    found: dict[nn.Module, Forward] = {attention: band_attention(attention, own_positions(bands))}
    if front.doubled:
        reach = next((step.reach for step in plan.steps if step.name == front.doubled), NO_ROWS)
        give = given.get(f"{front.doubled}.conv", NO_ROWS)
        layer = vae.get_submodule(front.doubled)
        found[layer] = band_doubled_convolution(layer, bands, reach, front.doubled, give)
    return found
