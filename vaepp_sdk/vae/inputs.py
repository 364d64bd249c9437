"""Refuses inputs that a VAE cannot take, on every rank alike and before any message."""

from __future__ import annotations

from typing import Any

import torch

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import Direction, VaeFacts

__all__ = ["check_input"]


def check_input(facts: VaeFacts, direction: Direction, value: torch.Tensor, vae: Any) -> None:
    """Check shape and dtype of what is to be decoded or encoded.

    On one rank the VAE's first layer would raise; on several, only the ranks that have work would, and the
    others would wait for them.

    Args:
        facts: the VAE's facts.
        direction: decode or encode.
        value: latents or pictures.
        vae: the VAE itself, for its dtype and its encoder's channels.

    Raises:
        UnsupportedError: the VAE cannot take it; says what it takes.
    """
    name = "latents" if direction == "decode" else "pictures"
    channels = facts.latent_channels
    if direction == "encode":
        configured: int = getattr(vae.config, "in_channels", facts.picture_channels)
        channels = facts.input_channels or configured
    axes = ["batch", str(channels), *(["frames"] if facts.temporal_ratio else []), "rows", "columns"]
    wanted = f"{facts.vae_class}.{direction} takes {name} of shape ({', '.join(axes)})"
    shape = tuple(value.shape)
    if value.dim() != len(axes) or shape[1] != channels:
        raise UnsupportedError(f"{wanted}; found {shape}")
    if 0 in shape:
        raise UnsupportedError(f"{wanted}, none of them 0; found {shape}")
    if value.dtype != vae.dtype:
        raise UnsupportedError(
            f"{wanted} in the VAE's dtype {vae.dtype}; found {value.dtype}: convert with .to(vae.dtype)"
        )
    if torch.is_autocast_enabled(value.device.type):
        raise UnsupportedError(
            f"{facts.vae_class}.{direction} over several ranks does not run under autocast, which changes "
            f"the dtype of what ranks exchange; call it outside, or under torch.autocast(..., enabled=False)"
        )
