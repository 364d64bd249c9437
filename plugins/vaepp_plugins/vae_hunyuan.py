"""The VAEs of HunyuanImage 2.1, HunyuanVideo and HunyuanVideo 1.5."""

from __future__ import annotations

import attrs
import torch

from vaepp_plugins.vae_common import Adapter, strided_grid, strided_time
from vaepp_sdk.vae.facts import Direction, TileGrid, VaeFacts
from vaepp_sdk.vae.frames import FirstFrameAlone

__all__ = ["HunyuanImageAdapter", "HunyuanVideo15Adapter", "HunyuanVideoAdapter"]

_BROKEN = (
    "its own tiled encode expects a frame axis and raises; encode with tiling off, or pictures no larger "
    "than one tile"
)


class HunyuanImageAdapter(Adapter):
    """Adapts an AutoencoderKLHunyuanImage."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config, vae = self.vae.config, self.vae
        latent, sample = (vae.tile_latent_min_size,) * 2, (vae.tile_sample_min_size,) * 2
        encode = TileGrid.overlapping(sample, latent, vae.tile_overlap_factor)
        ratio = config.spatial_compression_ratio
        return VaeFacts(
            vae_class=type(vae).__name__,
            spatial_ratio=ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=2 * config.latent_channels,
            use_tiling=vae.use_tiling,
            decode_tiles=TileGrid.overlapping(latent, sample, vae.tile_overlap_factor),
            encode_tiles=attrs.evolve(encode, broken=_BROKEN),
            peak_values_per_pixel=3.5 * config.block_out_channels[0],
            encode_unit=ratio,
            picture_layers=self.picture_layers((config.latent_channels, config.in_channels), ratio),
        )


class HunyuanVideoAdapter(Adapter):
    """Adapts an AutoencoderKLHunyuanVideo, which cuts long clips in time whether tiling is on or off."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config, vae = self.vae.config, self.vae
        return VaeFacts(
            vae_class=type(vae).__name__,
            spatial_ratio=vae.spatial_compression_ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=2 * config.latent_channels,
            use_tiling=vae.use_tiling,
            decode_tiles=self._grid("decode", vae.use_framewise_decoding),
            encode_tiles=self._grid("encode", vae.use_framewise_encoding),
            peak_values_per_pixel=3.0 * config.block_out_channels[0],
            temporal_ratio=vae.temporal_compression_ratio,
            encode_rounds_up=True,  # its stride-2 convolutions are padded on both sides
            clip_layers=self.clip_layers(
                (config.latent_channels, config.in_channels),
                vae.spatial_compression_ratio,
                enough=(2, 1 + vae.temporal_compression_ratio),
            ),
        )

    def _grid(self, direction: Direction, cuts_time: bool) -> TileGrid:
        time = strided_time(self.vae, direction) if cuts_time else None
        return strided_grid(self.vae, direction, time=time)

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        return super().decode_window(self.vae.post_quant_conv(latent))

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        moments: torch.Tensor = self.vae.quant_conv(super().encode_window(picture))
        return moments


class HunyuanVideo15Adapter(Adapter):
    """Adapts an AutoencoderKLHunyuanVideo15."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config, vae = self.vae.config, self.vae
        latent = (vae.tile_latent_min_height, vae.tile_latent_min_width)
        sample = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        ratio = vae.temporal_compression_ratio
        return VaeFacts(
            vae_class=type(vae).__name__,
            spatial_ratio=vae.spatial_compression_ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=2 * config.latent_channels,
            use_tiling=vae.use_tiling,
            decode_tiles=TileGrid.overlapping(latent, sample, vae.tile_overlap_factor),
            encode_tiles=TileGrid.overlapping(sample, latent, vae.tile_overlap_factor),
            peak_values_per_pixel=3.0 * config.block_out_channels[0],
            temporal_ratio=ratio,
            encode_unit=vae.spatial_compression_ratio,
            frames=FirstFrameAlone(ratio, whole=True),
            clip_layers=self.clip_layers(
                (config.latent_channels, config.in_channels),
                vae.spatial_compression_ratio,
                enough=(2, 1 + ratio),
            ),
        )
