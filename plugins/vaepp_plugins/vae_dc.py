"""AutoencoderDC: pictures only, latents without a distribution."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import EncoderOutput

from vaepp_plugins.vae_common import Adapter, strided_grid
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import ShardedSample

__all__ = ["DCAdapter"]


class DCAdapter(Adapter):
    """Adapts an AutoencoderDC, which pads tiles to whole latents to encode them, but not whole pictures."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config = self.vae.config
        ratio = self.vae.spatial_compression_ratio
        return VaeFacts(
            vae_class=type(self.vae).__name__,
            spatial_ratio=ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.in_channels,
            moment_channels=config.latent_channels,
            use_tiling=self.vae.use_tiling,
            decode_tiles=strided_grid(self.vae, "decode", crops=False),
            encode_tiles=attrs.evolve(strided_grid(self.vae, "encode"), pads=True),
            peak_values_per_pixel=7.0 * config.decoder_block_out_channels[0],
            encode_unit=ratio,
            picture_layers=self.picture_layers((config.latent_channels, config.in_channels), ratio),
        )

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        if self.tiled:
            unit = self.vae.spatial_compression_ratio
            picture = F.pad(picture, (0, -picture.shape[-1] % unit, 0, -picture.shape[-2] % unit))
        return super().encode_window(picture)

    def wrap_encode(self, moments: torch.Tensor | ShardedSample, return_dict: bool) -> Any:
        """See `VaeAdapter.wrap_encode`."""
        return EncoderOutput(latent=moments) if return_dict else (moments,)
