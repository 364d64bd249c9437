"""Names the layers that work on parts of a picture does not know, so that they can be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
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

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.trace import LayerCall, LayerTrace

__all__ = ["KNOWN_LAYERS", "Check", "refuse_unknown", "unknown_layers"]

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


def refuse_unknown(
    strategy: str, adapter: VaeAdapter, faults_of: Callable[[LayerTrace, nn.Module], list[str]]
) -> None:
    """Refuse a VAE by the layers that its decode or encode calls.

    One without a working encoder, or decoder, is judged by the other: it still decodes, or encodes. What does
    not work raises the VAE's own error once it is called.

    Args:
        strategy: the strategy's name, for the message.
        adapter: the VAE.
        faults_of: what is wrong with the layers of one direction, a line each.

    Raises:
        UnsupportedError: the layers are not known, or some of them cannot be served.
    """
    facts = adapter.facts()
    broken: list[Exception] = []
    for direction in ("decode", "encode"):
        try:
            trace = facts.layers(direction)
        except UnsupportedError:
            raise
        except Exception as error:
            broken.append(error)
            continue
        if trace is None:
            raise UnsupportedError(
                f"strategy {strategy!r} cannot serve a {facts.vae_class}: its adapter does not say which "
                f"layers {direction} calls"
            )
        faults = faults_of(trace, adapter.vae)
        if faults:
            raise UnsupportedError(
                f"strategy {strategy!r} cannot {direction} with this {facts.vae_class}:\n  "
                + "\n  ".join(faults)
            )
    if len(broken) == 2:
        raise broken[0]


def unknown_layers(
    trace: LayerTrace, vae: nn.Module, known: Mapping[type[nn.Module], Check] = KNOWN_LAYERS
) -> list[str]:
    """Every layer that may look further than its neighbourhood, as `name (Class): reason`.

    Known classes count exactly: a subclass may compute something else. A layer of another class is judged by
    the operators that it runs itself: where each works on single positions, it composes its layers, and those
    are looked at in turn.

    Args:
        trace: every call of one decode or encode.
        vae: the VAE.
        known: the classes known, each with a check of its settings.
    """
    found = {}
    for call in trace.calls:
        layer = vae.get_submodule(call.name)
        reason = _reason(layer, call, known)
        if reason:
            found[call.name] = f"{call.name} ({type(layer).__name__}): {reason}"
    return list(found.values())


def _reason(layer: nn.Module, call: LayerCall, known: Mapping[type[nn.Module], Check]) -> str | None:
    if "forward" in vars(layer):
        return "its forward is wrapped, as torch.compile and sequential CPU offload do"
    if type(layer) in known:
        return known[type(layer)](layer)
    far = [name for name in call.operators if not _works_on_single_positions(name)]
    return f"not known, and runs {', '.join(far)}" if far else None


def _works_on_single_positions(operator: str) -> bool:
    if operator in ("alias", "clone", "detach", "_to_copy"):
        return True
    packet = getattr(torch.ops.aten, operator, None)
    overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)
