"""AutoencoderTiny: the small distilled autoencoders (TAESD and its relatives)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput

from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.landing import ShardedSample
from vaepp_sdk.vae.trace import LayerTrace, trace_layers

__all__ = ["TinyAdapter"]


class TinyAdapter(VaeAdapter):
    """Adapts an AutoencoderTiny.

    Its own tiling blends with masks of its own and is not known here. Clamping and scaling stand inside its
    encoder and decoder, so nothing is left to do to a whole picture.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config = self.vae.config
        return VaeFacts(
            vae_class=type(self.vae).__name__,
            spatial_ratio=self._ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=config.latent_channels,
            use_tiling=self.vae.use_tiling,
            # Block input, convolution output and activation output of the last full-resolution block.
            peak_values_per_pixel=3.0 * config.decoder_block_out_channels[-1],
            picture_layers=self._layers,
            # benchmarks/patch_halo.py, TAEF2: the most a pixel at a seam is off, as a share of the range, is
            # 2e-2 with 8 rows and 2.5e-3 with 12; one step of 8-bit pictures is 4e-3.
            context=12,
            # Its stride-2 convolutions are padded on both sides.
            encode_rounds_up=True,
        )

    @property
    def _ratio(self) -> int:
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    def _layers(self, direction: Direction) -> LayerTrace:
        return self._decode_layers if direction == "decode" else self._encode_layers

    @cached_property
    def _decode_layers(self) -> LayerTrace:
        return trace_layers(self.vae, self.decode_window, (1, self.vae.config.latent_channels, 8, 8))

    @cached_property
    def _encode_layers(self) -> LayerTrace:
        side = 8 * self._ratio
        return trace_layers(self.vae, self.encode_window, (1, self.vae.config.in_channels, side, side))

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        sample: torch.Tensor = self.vae.decoder(latent)
        return sample

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        latent: torch.Tensor = self.vae.encoder(picture)
        return latent

    def finish_decode(self, sample: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.finish_decode`: this class changes nothing."""
        return sample

    def wrap_decode(self, sample: torch.Tensor | ShardedSample, return_dict: bool) -> Any:
        """See `VaeAdapter.wrap_decode`."""
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def wrap_encode(self, moments: torch.Tensor | ShardedSample, return_dict: bool) -> Any:
        """See `VaeAdapter.wrap_encode`: this class has no distribution, its moments are the latents."""
        return AutoencoderTinyOutput(latents=moments) if return_dict else (moments,)
