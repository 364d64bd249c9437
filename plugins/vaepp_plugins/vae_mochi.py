"""Mochi: a video VAE that decodes whole clips, or a few latent frames at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import attrs
import torch

from vaepp_plugins.vae_common import Adapter, strided_grid
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.frames import FirstFrameAlone

__all__ = ["EveryFrame", "MochiAdapter"]


@attrs.frozen
class EveryFrame:
    """Every latent stands for `ratio` pictures, the first too."""

    ratio: int

    def out_frames(self, direction: Direction, frames: int) -> int:
        """See `FrameRule.out_frames`."""
        return frames * self.ratio if direction == "decode" else 1 + (frames - 1) // self.ratio


class MochiAdapter(Adapter):
    """Adapts an AutoencoderKLMochi."""

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config, vae = self.vae.config, self.vae
        ratio = vae.temporal_compression_ratio
        framewise = vae.use_framewise_decoding
        return VaeFacts(
            vae_class=type(vae).__name__,
            spatial_ratio=vae.spatial_compression_ratio,
            latent_channels=config.latent_channels,
            picture_channels=config.out_channels,
            moment_channels=2 * config.latent_channels,
            use_tiling=vae.use_tiling,
            decode_tiles=strided_grid(vae, "decode"),
            encode_tiles=strided_grid(vae, "encode"),
            peak_values_per_pixel=3.0 * config.decoder_block_out_channels[0],
            temporal_ratio=ratio,
            input_channels=config.out_channels,  # its encoder adds Fourier features
            frames=FirstFrameAlone(ratio) if vae.drop_last_temporal_frames else EveryFrame(ratio),
            frames_at_once=vae.num_latent_frames_batch_size * ratio if framewise else 0,
            clip_layers=self.clip_layers(
                (config.latent_channels, config.out_channels),
                vae.spatial_compression_ratio,
                enough=(2, 1 + ratio),
            ),
        )

    def with_arguments(self, direction: Direction, arguments: Mapping[str, Any]) -> Self:
        """See `VaeAdapter.with_arguments`."""
        if direction == "encode" and self.vae.use_framewise_encoding:
            raise UnsupportedError(
                "AutoencoderKLMochi does not encode frame by frame: its attention sees all frames; set "
                "use_framewise_encoding to False"
            )
        return super().with_arguments(direction, arguments)

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        vae, cache = self.vae, None
        sample: torch.Tensor
        if vae.use_framewise_decoding:
            pictures = []
            for frames in latent.split(vae.num_latent_frames_batch_size, dim=2):
                decoded, cache = vae.decoder(frames, conv_cache=cache)
                pictures.append(decoded)
            sample = torch.cat(pictures, dim=2)
        else:
            sample, _ = vae.decoder(latent)
        if vae.drop_last_temporal_frames and sample.shape[2] >= vae.temporal_compression_ratio:
            sample = sample[:, :, vae.temporal_compression_ratio - 1 :]
        return sample

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        moments: torch.Tensor = self.vae.encoder(picture)[0]
        return moments
