"""CogVideoX: a causal video VAE that runs on a few frames at a time, with caches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch

from vaepp_plugins.vae_common import Adapter, Pair
from vaepp_sdk.vae.facts import Direction, TileGrid, VaeFacts

__all__ = ["BatchedFrames", "CogVideoXAdapter"]


@attrs.frozen
class BatchedFrames:
    """Frames go through in batches, each of which is doubled or halved on its own.

    Attributes:
        latents: latent frames in a batch; the first batch also takes the rest.
        pictures: pictures in a batch, likewise.
        doublings: how many times decode doubles frames, and encode halves them.
    """

    latents: int
    pictures: int
    doublings: int

    def out_frames(self, direction: Direction, frames: int) -> int:
        """See `FrameRule.out_frames`: of an odd number of frames the first is neither doubled nor paired."""
        total = 0
        for start, stop in self.batches(direction, frames):
            count = stop - start
            for _ in range(self.doublings):
                odd = count % 2
                count = 2 * count - odd if direction == "decode" else (count + odd) // 2
            total += count
        return total

    def batches(self, direction: Direction, frames: int) -> Iterator[Pair]:
        """The first frame of each batch and the one after its last."""
        size = self.latents if direction == "decode" else self.pictures
        rest = frames % size if frames >= size else 0
        start, stop = 0, min(size + rest, frames)
        while start < frames:
            yield start, stop
            start, stop = stop, stop + size


class CogVideoXAdapter(Adapter):
    """Adapts an AutoencoderKLCogVideoX."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config, vae = self.vae.config, self.vae
        latent: Pair = (vae.tile_latent_min_height, vae.tile_latent_min_width)
        sample: Pair = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        return VaeFacts(
            vae_class=type(vae).__name__,
            spatial_ratio=2 ** (len(config.block_out_channels) - 1),
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=2 * config.latent_channels,
            use_tiling=vae.use_tiling,
            decode_tiles=self._grid(latent, sample),
            encode_tiles=self._grid(sample, latent),
            peak_values_per_pixel=3.0 * config.block_out_channels[0],
            temporal_ratio=int(config.temporal_compression_ratio),
            frames=self._frames,
            frames_at_once=vae.num_sample_frames_batch_size,
            clip_layers=self.clip_layers(
                (config.latent_channels, config.in_channels),
                2 ** (len(config.block_out_channels) - 1),
                enough=(2 * vae.num_latent_frames_batch_size, 2 * vae.num_sample_frames_batch_size),
                chunk=(vae.num_latent_frames_batch_size, vae.num_sample_frames_batch_size),
            ),
        )

    @property
    def _frames(self) -> BatchedFrames:
        doublings = int(math.log2(self.vae.config.temporal_compression_ratio))
        return BatchedFrames(
            self.vae.num_latent_frames_batch_size, self.vae.num_sample_frames_batch_size, doublings
        )

    def _grid(self, tile: Pair, out_tile: Pair) -> TileGrid:
        """The geometry of an overlap factor for rows and another for columns."""
        rows = TileGrid.overlapping(tile, out_tile, self.vae.tile_overlap_factor_height)
        columns = TileGrid.overlapping(tile, out_tile, self.vae.tile_overlap_factor_width)
        return TileGrid(
            tile=tile,
            step=(rows.step[0], columns.step[1]),
            blend=(rows.blend[0], columns.blend[1]),
            keep=(rows.keep[0], columns.keep[1]),
        )

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        cache: Any = None
        pictures = []
        for start, stop in self._frames.batches("decode", latent.shape[2]):
            frames = latent[:, :, start:stop]
            if self.vae.post_quant_conv is not None:
                frames = self.vae.post_quant_conv(frames)
            frames, cache = self.vae.decoder(frames, conv_cache=cache)
            pictures.append(frames)
        return torch.cat(pictures, dim=2)

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        cache: Any = None
        latents = []
        for start, stop in self._frames.batches("encode", picture.shape[2]):
            frames, cache = self.vae.encoder(picture[:, :, start:stop], conv_cache=cache)
            if self.vae.quant_conv is not None:
                frames = self.vae.quant_conv(frames)
            latents.append(frames)
        return torch.cat(latents, dim=2)
