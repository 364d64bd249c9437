"""Tiny VAEs with random weights, built alike on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import nn

__all__ = ["tiny_flux2", "tiny_kl"]


def tiny_kl(
    *,
    sample_size: int = 64,
    widths: Sequence[int] = (8, 8, 8, 8),
    latent_channels: int = 16,
    quant: bool = False,
    attention: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Any:
    """A small AutoencoderKL in eval mode; 2 ** (len(widths) - 1) pixels a latent."""
    torch.manual_seed(seed)
    blocks = len(widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=sample_size,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
        **config,
    )
    return _ready(vae, dtype)


def tiny_flux2(
    *,
    sample_size: int = 64,
    widths: Sequence[int] = (8, 8, 8, 8),
    decoder_widths: Sequence[int] | None = (8, 12, 8, 8),
    latent_channels: int = 8,
    quant: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Any:
    """A small AutoencoderKLFlux2 in eval mode, whose decoder has widths of its own."""
    torch.manual_seed(seed)
    blocks = len(widths)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(widths),
        decoder_block_out_channels=tuple(decoder_widths) if decoder_widths else None,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=sample_size,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **config,
    )
    return _ready(vae, dtype)


def _ready(vae: Any, dtype: torch.dtype) -> Any:
    """Random affine parameters of every norm: at 1 and 0 they would hide mistakes in statistics."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    # The plain cast: the class's own warns about layers to keep in float32, of which it has none.
    return nn.Module.to(vae, dtype).eval().requires_grad_(False)
