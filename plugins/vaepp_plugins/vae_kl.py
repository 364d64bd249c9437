"""The AutoencoderKL family: AutoencoderKL and AutoencoderKLFlux2."""

from __future__ import annotations

import torch

from vaepp_plugins.vae_common import Adapter
from vaepp_sdk.vae.facts import TileGrid, VaeFacts

__all__ = ["KLAdapter"]


class KLAdapter(Adapter):
    """Adapts an AutoencoderKL; its tile geometry is that of diffusers' `tiled_decode` and `_tiled_encode`."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config = self.vae.config
        widths = config.block_out_channels
        decoder_widths = getattr(config, "decoder_block_out_channels", None) or widths
        ratio = 2 ** (len(widths) - 1)
        return VaeFacts(
            vae_class=type(self.vae).__name__,
            spatial_ratio=ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=2 * config.latent_channels,
            use_tiling=self.vae.use_tiling,
            decode_tiles=self._grid(self._latent_tile, self._sample_tile),
            encode_tiles=self._grid(self._sample_tile, self._latent_tile),
            # Block input, norm output and activation output of the widest full-resolution layer.
            peak_values_per_pixel=3.0 * max(decoder_widths[0], decoder_widths[min(1, len(widths) - 1)]),
            picture_layers=self.picture_layers((config.latent_channels, config.in_channels), ratio),
            # benchmarks/patch_halo.py, trained weights: the most a pixel at a seam is off, as a share of the
            # range, is 4.5e-2 with 4 rows, 2e-3 with 6 and 4e-5 with 8; one step of 8-bit pictures is 4e-3.
            context=8,
        )

    @property
    def _sample_tile(self) -> tuple[int, int]:
        size = self.vae.tile_sample_min_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def _latent_tile(self) -> tuple[int, int]:
        return (self.vae.tile_latent_min_size,) * 2

    def _grid(self, tile: tuple[int, int], out_tile: tuple[int, int]) -> TileGrid:
        return TileGrid.overlapping(tile, out_tile, self.vae.tile_overlap_factor)

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        if self.vae.post_quant_conv is not None:
            latent = self.vae.post_quant_conv(latent)
        sample: torch.Tensor = self.vae.decoder(latent)
        return sample

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        moments: torch.Tensor = self.vae.encoder(picture)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments
