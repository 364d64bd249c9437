"""Wan 2.1 and 2.2, and QwenImage: causal video VAEs that run frame after frame with caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

from vaepp_plugins.vae_common import Adapter, strided_grid
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import VaeFacts

__all__ = ["QwenImageAdapter", "WanAdapter"]

_CHUNK = 4
"""Pictures that these classes encode at a time, after the first one alone."""


class _CachedAdapter(Adapter):
    """What both classes share.

    On tiles they apply the 1x1x1 convolutions around encoder and decoder frame by frame, on a whole clip to
    all frames at once; kernels may round the two differently.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        ratio = 2 ** sum(vae.config.temperal_downsample)
        if ratio != _CHUNK:
            raise UnsupportedError(
                f"this {type(vae).__name__} has {ratio} pictures per latent frame; only {_CHUNK} are served"
            )

    def facts(self) -> VaeFacts:
        """See `VaeAdapter.facts`."""
        config, vae, patch = self.vae.config, self.vae, self._patch
        return VaeFacts(
            vae_class=type(vae).__name__,
            spatial_ratio=vae.spatial_compression_ratio,
            latent_channels=config.z_dim,
            picture_channels=self._picture_channels,
            moment_channels=2 * config.z_dim,
            use_tiling=vae.use_tiling,
            decode_tiles=strided_grid(vae, "decode", patch=patch),
            encode_tiles=strided_grid(vae, "encode", patch=patch),
            peak_values_per_pixel=3.0 * config.base_dim / patch**2,
            temporal_ratio=_CHUNK,
            encode_unit=self._encode_unit,
            input_channels=self._picture_channels,
            frames_at_once=_CHUNK,
            clip_layers=self.clip_layers(
                (config.z_dim, self._picture_channels),
                vae.spatial_compression_ratio,
                # The caches of the third chunk are as long as those of all later ones.
                enough=(3, 1 + 2 * _CHUNK),
                chunk=(1, _CHUNK),
            ),
        )

    @property
    def _patch(self) -> int:
        return 1

    @property
    def _encode_unit(self) -> int:
        return 1

    @property
    def _picture_channels(self) -> int:
        raise NotImplementedError

    def _decode_frame(self, frame: torch.Tensor, first: bool) -> torch.Tensor:
        raise NotImplementedError

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        vae = self.vae
        with self._fresh_caches():
            if not self.tiled:
                latent = vae.post_quant_conv(latent)
            pictures = []
            for index, frame in enumerate(latent.split(1, dim=2)):
                vae._conv_idx = [0]
                if self.tiled:
                    frame = vae.post_quant_conv(frame)
                pictures.append(self._decode_frame(frame, first=index == 0))
        return torch.cat(pictures, dim=2)

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`; pictures beyond the last chunk are dropped, as in the class."""
        vae = self.vae
        chunks = 1 + (picture.shape[2] - 1) // _CHUNK
        latents = []
        with self._fresh_caches():
            for index in range(chunks):
                vae._enc_conv_idx = [0]
                start = 1 + _CHUNK * (index - 1) if index else 0
                chunk = picture[:, :, start : 1 + _CHUNK * index]
                latent = vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx)
                latents.append(vae.quant_conv(latent) if self.tiled else latent)
        moments = torch.cat(latents, dim=2)
        return moments if self.tiled else vae.quant_conv(moments)

    @contextmanager
    def _fresh_caches(self) -> Iterator[None]:
        """Empty caches of frames before and after, also where the run fails half way."""
        self.vae.clear_cache()
        try:
            yield
        finally:
            self.vae.clear_cache()


class WanAdapter(_CachedAdapter):
    """Adapts an AutoencoderKLWan: 2.1, and 2.2 with its patches of pixels."""

    @property
    def _patch(self) -> int:
        return self.vae.config.patch_size or 1

    @property
    def _encode_unit(self) -> int:
        # Residual blocks average whole groups of pixels at every level.
        return int(self.vae.spatial_compression_ratio) if self.vae.config.is_residual else self._patch

    @property
    def _picture_channels(self) -> int:
        return int(self.vae.config.out_channels // self._patch**2)

    def _decode_frame(self, frame: torch.Tensor, first: bool) -> torch.Tensor:
        vae = self.vae
        sample: torch.Tensor = vae.decoder(
            frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=first
        )
        return sample

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`.

        The class spreads patches over pixels after it has joined tiles. Doing so before moves the same
        numbers, and the blend is told that the pixels of a patch share one weight.
        """
        sample = super().decode_window(latent)
        return unpatchify(sample, patch_size=self._patch) if self._patch > 1 else sample

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        if self._patch > 1:
            picture = patchify(picture, patch_size=self._patch)
        return super().encode_window(picture)

    def finish_decode(self, sample: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.finish_decode`."""
        return torch.clamp(sample, min=-1.0, max=1.0)


class QwenImageAdapter(_CachedAdapter):
    """Adapts an AutoencoderKLQwenImage, which clamps a whole decode but not a tiled one."""

    @property
    def _picture_channels(self) -> int:
        return int(self.vae.config.input_channels)

    def _decode_frame(self, frame: torch.Tensor, first: bool) -> torch.Tensor:
        del first
        vae = self.vae
        sample: torch.Tensor = vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx)
        return sample

    def finish_decode(self, sample: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.finish_decode`."""
        return sample if self.tiled else torch.clamp(sample, min=-1.0, max=1.0)
