"""Names the layers that work on parts of a picture does not know, so that they can be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny, Encoder, EncoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AutoencoderTinyBlock,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

__all__ = ["KNOWN_LAYERS", "Check", "unknown_layers"]

Check = Callable[[Any], str | None]
"""Looks at one layer of a known class: what is wrong with it, or None."""

_PROCESSORS = (AttnProcessor2_0, FusedAttnProcessor2_0)


def _good(layer: nn.Module) -> str | None:
    del layer
    return None


def _convolution(layer: nn.Conv2d) -> str | None:
    return "its padding wraps around the picture" if layer.padding_mode == "circular" else None


def _upsample(layer: nn.Upsample) -> str | None:
    return None if layer.mode.startswith("nearest") else f"its mode {layer.mode!r} looks at the whole side"


def _attention(layer: Attention) -> str | None:
    if type(layer.processor) not in _PROCESSORS:
        return f"its processor is a {type(layer.processor).__name__}"
    for part in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(layer, part, None) is not None:
            return f"it has a {part}"
    return None


KNOWN_LAYERS: Mapping[type[nn.Module], Check] = {
    **dict.fromkeys(
        (
            *(nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.Linear, nn.GroupNorm),
            *(nn.SiLU, nn.ReLU, nn.GELU, nn.Mish),
            *(Encoder, Decoder, EncoderTiny, DecoderTiny, AutoencoderTinyBlock, ResnetBlock2D),
            *(UpDecoderBlock2D, DownEncoderBlock2D, UNetMidBlock2D, Upsample2D, Downsample2D),
        ),
        _good,
    ),
    nn.Conv2d: _convolution,
    nn.Upsample: _upsample,
    Attention: _attention,
}
"""Layers whose output at a position depends on its neighbourhood only, or that this package replaces."""


def unknown_layers(
    layers: Mapping[str, nn.Module], known: Mapping[type[nn.Module], Check] = KNOWN_LAYERS
) -> list[str]:
    """Every layer that is not known, as `name (Class): reason`.

    Classes count exactly: a subclass may compute something else. A block of someone's own, outside torch and
    diffusers, is taken to compose its layers position by position; its layers are looked at.

    Args:
        layers: every module that a decode or encode calls, by its name in the VAE.
        known: the classes known, each with a check of its settings.
    """
    reasons = {name: _reason(layer, known) for name, layer in layers.items()}
    return [f"{name} ({type(layers[name]).__name__}): {reason}" for name, reason in reasons.items() if reason]


def _reason(layer: nn.Module, known: Mapping[type[nn.Module], Check]) -> str | None:
    if "forward" in vars(layer):
        return "its forward is wrapped, as sequential CPU offload does"
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return "it is compiled"
    if type(layer) in known:
        return known[type(layer)](layer)
    package = type(layer).__module__.partition(".")[0]
    if any(layer.children()) and package not in ("torch", "diffusers"):
        return None
    return "this layer is not known"
