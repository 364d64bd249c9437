"""AutoencoderTiny: the small distilled autoencoders (TAESD and its relatives)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

from vaepp_plugins.vae_common import Adapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import ShardedSample

__all__ = ["TinyAdapter"]


class TinyAdapter(Adapter):
    """Adapts an AutoencoderTiny.

    Its own tiling blends with masks of its own and is not known here. Clamping and scaling stand inside its
    encoder and decoder, so nothing is left to do to a whole picture.
    """

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config = self.vae.config
        ratio = 2 ** (len(config.encoder_block_out_channels) - 1)
        return VaeFacts(
            vae_class=type(self.vae).__name__,
            spatial_ratio=ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=config.latent_channels,
            use_tiling=self.vae.use_tiling,
            # Block input, convolution output and activation output of the last full-resolution block.
            peak_values_per_pixel=3.0 * config.decoder_block_out_channels[-1],
            picture_layers=self.picture_layers((config.latent_channels, config.in_channels), ratio),
            # benchmarks/patch_halo.py, TAEF2: the most a pixel at a seam is off, as a share of the range, is
            # 2e-2 with 8 rows and 2.5e-3 with 12; one step of 8-bit pictures is 4e-3.
            context=12,
            # Its stride-2 convolutions are padded on both sides.
            encode_rounds_up=True,
        )

    def wrap_encode(self, moments: torch.Tensor | ShardedSample, return_dict: bool) -> Any:
        """See `VaeAdapter.wrap_encode`: this class has no distribution, its moments are the latents."""
        return AutoencoderTinyOutput(latents=moments) if return_dict else (moments,)
