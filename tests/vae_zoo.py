"""Tiny VAEs beyond the KL family, with random weights and small tiles, built alike on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

__all__ = ["ZOO", "build"]

ZOO: dict[str, Callable[..., Any]] = {}
"""Builders by name: a class name, with a suffix where one class has several configurations."""


def build(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """One VAE in eval mode with tiling on; equal seeds give equal weights on every rank."""
    torch.manual_seed(len(name))
    vae = ZOO[name](**config)
    for key, parameter in vae.named_parameters():
        if "norm" in key and parameter.numel() > 1:
            # At 1 and 0, affine parameters would hide mistakes in statistics.
            nn.init.normal_(parameter, 0.0 if key.endswith("bias") else 1.0, 0.3)
    return vae.to(dtype).eval().requires_grad_(False)


def _zoo(function: Callable[..., Any]) -> Callable[..., Any]:
    ZOO[function.__name__] = function
    return function


@_zoo
def AutoencoderDC(**config: Any) -> Any:
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        **{"encoder_layers_per_block": (1, 1, 1), **config},
    )
    vae.enable_tiling(32, 32, 24, 24)
    return vae


@_zoo
def AutoencoderKLHunyuanImage() -> Any:
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=32,
    )
    vae.enable_tiling()
    return vae


def _wan(width: int = 4, **config: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=width, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **config
    )
    vae.enable_tiling(64, 64, 48, 48)
    return vae


@_zoo
def AutoencoderKLWan(width: int = 4) -> Any:
    return _wan(width)


@_zoo
def AutoencoderKLWan_22(width: int = 4) -> Any:
    vae = _wan(
        width, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16
    )
    vae.enable_tiling(128, 128, 96, 96)
    return vae


@_zoo
def AutoencoderKLQwenImage(width: int = 4) -> Any:
    vae = diffusers.AutoencoderKLQwenImage(base_dim=width, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.enable_tiling(64, 64, 48, 48)
    return vae


@_zoo
def AutoencoderKLHunyuanVideo() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.enable_tiling(64, 64, 8, 48, 48, 4)
    return vae


@_zoo
def AutoencoderKLHunyuanVideo15() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
    )
    vae.enable_tiling(64, 64, 4, 4)
    return vae


@_zoo
def AutoencoderKLLTXVideo(widths: tuple[int, ...] = (8, 8, 8, 8), timestep_conditioning: bool = True) -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=widths,
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )
    vae.enable_tiling(128, 128, 16, 96, 96, 8)
    vae.use_framewise_encoding = vae.use_framewise_decoding = True
    return vae


@_zoo
def AutoencoderKLLTX2Video(**config: Any) -> Any:
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
        decoder_causal=False,
        **config,
    )
    vae.enable_tiling(128, 128, 16, 96, 96, 8)
    vae.use_framewise_encoding = vae.use_framewise_decoding = True
    return vae


@_zoo
def AutoencoderKLCogVideoX() -> Any:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=96,
        sample_width=160,
    )
    vae.enable_tiling()
    return vae


@_zoo
def AutoencoderKLMochi() -> Any:
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.enable_tiling(64, 64, 48, 48)
    return vae
