"""What a VAE's `config.json` says of its tiles, for checks before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vaepp_sdk.vae.facts import TileGrid, VaeFacts

__all__ = ["kl_facts", "qwen_image_facts", "wan_facts"]

_OVERLAP = 0.25
"""`tile_overlap_factor` of the classes of the KL family."""

_TILE, _STRIDE = 256, 192
"""Pixels of a tile, and from one to the next, of Wan and QwenImage."""


def kl_facts(config: Mapping[str, Any]) -> VaeFacts:
    """Of AutoencoderKL and AutoencoderKLFlux2."""
    ratio = 2 ** (len(config["block_out_channels"]) - 1)
    size = config["sample_size"]
    side = size[0] if isinstance(size, list) else size
    sample, latent = (side, side), (int(side / ratio),) * 2
    channels = config["latent_channels"]
    return VaeFacts(
        vae_class=config["_class_name"],
        spatial_ratio=ratio,
        latent_channels=channels,
        picture_channels=config["out_channels"],
        moment_channels=2 * channels,
        use_tiling=False,
        decode_tiles=TileGrid.overlapping(latent, sample, _OVERLAP),
        encode_tiles=TileGrid.overlapping(sample, latent, _OVERLAP),
    )


def wan_facts(config: Mapping[str, Any]) -> VaeFacts:
    """Of AutoencoderKLWan."""
    patch = config.get("patch_size") or 1
    return _strided(config, config["scale_factor_spatial"], config["out_channels"] // patch**2, patch)


def qwen_image_facts(config: Mapping[str, Any]) -> VaeFacts:
    """Of AutoencoderKLQwenImage."""
    return _strided(config, 2 ** len(config["temperal_downsample"]), config.get("input_channels", 3), 1)


def _strided(config: Mapping[str, Any], ratio: int, channels: int, patch: int) -> VaeFacts:
    """Of a class that states a stride of its tiles, and no overlap."""
    kept, out = (length // patch * patch for length in (_STRIDE, _TILE))
    return VaeFacts(
        vae_class=config["_class_name"],
        spatial_ratio=ratio,
        latent_channels=config["z_dim"],
        picture_channels=channels,
        moment_channels=2 * config["z_dim"],
        use_tiling=False,
        decode_tiles=TileGrid(
            tile=(_TILE // ratio,) * 2,
            step=(_STRIDE // ratio,) * 2,
            blend=(out - kept,) * 2,
            keep=(kept,) * 2,
            grain=patch,
            crops=True,
        ),
    )
