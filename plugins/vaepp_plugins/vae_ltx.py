"""LTX-Video and LTX-2, whose decoders may take a timestep, and in LTX-2 a causality switch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import attrs
import torch

from vaepp_plugins.vae_common import Adapter, strided_grid, strided_time
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import Direction, TileGrid, VaeFacts
from vaepp_sdk.vae.frames import FirstFrameAlone

__all__ = ["LTX2VideoAdapter", "LTXVideoAdapter"]


class LTXVideoAdapter(Adapter):
    """Adapts an AutoencoderKLLTXVideo."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self._arguments: Mapping[str, Any] = {}
        noise = vae.config.decoder_inject_noise
        if noise if isinstance(noise, bool) else any(noise):
            raise UnsupportedError(
                f"this {type(vae).__name__} draws noise while it decodes (decoder_inject_noise): ranks that "
                "each decode a part would draw other numbers than one that decodes all"
            )
        _refuse_other_ratios(vae)

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
            decode_tiles=self._grid("decode"),
            encode_tiles=self._grid("encode"),
            # It works on patches of pixels.
            peak_values_per_pixel=3.0 * config.decoder_block_out_channels[0] / config.patch_size**2,
            temporal_ratio=vae.temporal_compression_ratio,
            encode_unit=vae.spatial_compression_ratio,
            frames=FirstFrameAlone(vae.temporal_compression_ratio, whole=True),
            clip_layers=self.clip_layers(
                (config.latent_channels, config.in_channels),
                vae.spatial_compression_ratio,
                enough=(2, 1 + vae.temporal_compression_ratio),
            ),
        )

    def _grid(self, direction: Direction) -> TileGrid:
        # The class asks its switch for decoding in both directions.
        cuts_time = self.vae.use_framewise_decoding
        time = strided_time(self.vae, direction, drops_on_decode="last") if cuts_time else None
        return attrs.evolve(strided_grid(self.vae, direction, time=time), least=self._least(direction))

    def _least(self, direction: Direction) -> int:
        """The smallest side of a window, in latents."""
        del direction
        return 1

    def with_arguments(self, direction: Direction, arguments: Mapping[str, Any]) -> Self:
        """See `VaeAdapter.with_arguments`: `temb` of decode, which timestep-conditioned decoders need."""
        timestep = arguments.get("temb")
        if direction == "decode" and timestep is None and self.vae.config.timestep_conditioning:
            raise UnsupportedError(
                f"this {type(self.vae).__name__} is conditioned on a timestep: call decode(z, temb=...)"
            )
        if timestep is not None and self.vae.use_slicing and timestep.shape[0] > 1:
            raise UnsupportedError(
                f"{type(self.vae).__name__} decodes slices of a batch with the wrong timesteps in diffusers "
                "itself; switch slicing off, or decode one video at a time"
            )
        adapter = copy.copy(self)
        adapter._arguments = dict(arguments)
        return adapter

    def traced_adapter(self, direction: Direction) -> Self:
        """See `Adapter.traced_adapter`: with a timestep that has a shape alone."""
        adapter = copy.copy(self)
        timestep = torch.empty(1, device="meta", dtype=self.vae.dtype)
        adapter._arguments = {"temb": timestep} if direction == "decode" else {}
        return adapter

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        sample: torch.Tensor = self.vae.decoder(latent, **{"temb": None, **self._arguments})
        return sample


def _refuse_other_ratios(vae: Any) -> None:
    """Refuse a VAE that declares other ratios than it has, as the default configuration of LTX-2 does.

    Tiles, windows of frames and the size of the output all follow from what it declares.

    Raises:
        UnsupportedError: so it is.
    """
    declared = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    for part in ("encoder", "decoder"):
        found = _ratios(vae, getattr(vae, part))
        if found != declared:
            pixels, frames = found[1], found[0]
            raise UnsupportedError(
                f"this {type(vae).__name__} declares {declared[1]} pixels and {declared[0]} frames per "
                f"latent, but its {part} has {pixels} and {frames}: give it "
                f"spatial_compression_ratio={pixels} and temporal_compression_ratio={frames}, or the layers "
                "that it declares"
            )


def _ratios(vae: Any, part: Any) -> tuple[int, int]:
    """Frames, and pixels along each side, per latent, from the strides of an encoder or decoder."""
    frames, pixels = vae.config.patch_size_t, vae.config.patch_size
    for block in part.modules():
        for layer in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ():
            stride = getattr(layer, "stride", None) or layer.conv.stride
            frames, pixels = frames * stride[0], pixels * stride[1]
    return frames, pixels


class LTX2VideoAdapter(LTXVideoAdapter):
    """Adapts an AutoencoderKLLTX2Video; `causal` of decode and encode is passed on."""

    def _least(self, direction: Direction) -> int:
        config = self.vae.config
        decodes = direction == "decode"
        mode = config.decoder_spatial_padding_mode if decodes else config.encoder_spatial_padding_mode
        return 2 if mode == "reflect" else 1  # one row has nothing to be reflected

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        moments: torch.Tensor = self.vae.encoder(picture, **self._arguments)
        return moments
