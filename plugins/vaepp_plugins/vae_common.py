"""What the adapters of many VAE classes share: they differ in how one window is run and in their geometry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import ClipLayers, Direction, TileGrid
from vaepp_sdk.vae.frames import TimeTiles
from vaepp_sdk.vae.landing import ShardedSample
from vaepp_sdk.vae.trace import LayerTrace, plain_settings, trace_layers

__all__ = ["Adapter", "strided_grid", "strided_time"]

Pair = tuple[int, int]


class Adapter(VaeAdapter):
    """An adapter whose windows are its VAE's bare encoder and decoder, and whose moments are a posterior's.

    Attributes:
        tiled: whether windows are tiles of the class's own tiling.
    """

    tiled = False

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._traces: dict[tuple[Any, ...], LayerTrace] = {}

    def on_tiles(self) -> Self:
        """See `VaeAdapter.on_tiles`."""
        adapter = copy.copy(self)
        adapter.tiled = True
        return adapter

    def picture_layers(self, channels: Pair, ratio: int) -> Callable[[Direction], LayerTrace]:
        """What gives the layers that one decode or encode of a picture calls, traced once.

        Args:
            channels: channels of a latent and of a picture.
            ratio: pixels per latent along each side.
        """

        def trace(direction: Direction) -> LayerTrace:
            return self._traced(direction, 0, (1, channels[direction == "encode"]), ratio)

        return trace

    def clip_layers(self, channels: Pair, ratio: int, enough: Pair, chunk: Pair = (0, 0)) -> ClipLayers:
        """The layers that a decode and an encode of clips call.

        Args:
            channels: channels of a latent and of a picture.
            ratio: pixels per latent along each side.
            enough: see `ClipLayers`.
            chunk: likewise.
        """

        def trace(direction: Direction, frames: int) -> LayerTrace:
            front = (1, channels[direction == "encode"], frames)
            return self._traced(direction, frames, front, ratio)

        return ClipLayers(trace=trace, enough=enough, chunk=chunk)

    def _traced(self, direction: Direction, frames: int, front: tuple[int, ...], ratio: int) -> LayerTrace:
        """One direction for one number of frames, traced once; `front` are the input's other axes.

        Which layers are called may depend on the VAE's switches, which may change between calls.
        """
        key = (direction, frames, plain_settings(self.vae))
        if key not in self._traces:
            side = 8 if direction == "decode" else 8 * ratio
            adapter = self.traced_adapter(direction)
            run = adapter.decode_window if direction == "decode" else adapter.encode_window
            self._traces[key] = trace_layers(self.vae, run, (*front, side, side))
        return self._traces[key]

    def traced_adapter(self, direction: Direction) -> Self:
        """The adapter whose windows are traced, on the meta device: with the arguments it needs, if any."""
        del direction
        return self

    def decode_window(self, latent: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.decode_window`."""
        sample: torch.Tensor = self.vae.decoder(latent)
        return sample

    def encode_window(self, picture: torch.Tensor) -> torch.Tensor:
        """See `VaeAdapter.encode_window`."""
        moments: torch.Tensor = self.vae.encoder(picture)
        return moments

    def wrap_decode(self, sample: torch.Tensor | ShardedSample, return_dict: bool) -> Any:
        """See `VaeAdapter.wrap_decode`."""
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def wrap_encode(self, moments: torch.Tensor | ShardedSample, return_dict: bool) -> Any:
        """See `VaeAdapter.wrap_encode`: whole moments become the posterior, pieces stay pieces."""
        posterior: Any = moments
        if isinstance(moments, torch.Tensor):
            posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


def strided_grid(
    vae: Any, direction: Direction, *, patch: int = 1, crops: bool = True, time: TimeTiles | None = None
) -> TileGrid:
    """The tiling of a class that states a tile's size and its stride in pixels, with its roundings.

    Args:
        vae: the VAE.
        direction: decode or encode.
        patch: the side of the patches that the class takes from pixels before it encodes and spreads over
            pixels after it has blended. It slices what it encodes in patches, by numbers meant for pixels.
        crops: whether the class crops what it has joined.
        time: how it cuts long clips.
    """
    ratio = vae.spatial_compression_ratio
    tile: Pair = (vae.tile_sample_min_height, vae.tile_sample_min_width)
    stride: Pair = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
    if direction == "decode":
        keep = _scaled(_floored(stride, patch), patch)
        out = _scaled(_floored(tile, patch), patch)
        latents = _floored(tile, ratio)
        return TileGrid(
            tile=latents,
            step=_floored(stride, ratio),
            blend=(out[0] - keep[0], out[1] - keep[1]),
            keep=keep,
            grain=patch,
            crops=crops,
            time=time,
        )
    keep, out = _floored(stride, ratio // patch), _floored(tile, ratio // patch)
    return TileGrid(
        tile=_scaled(tile, patch),
        step=_scaled(stride, patch),
        blend=(out[0] - keep[0], out[1] - keep[1]),
        keep=keep,
        above=tile,
        crops=crops,
        time=time,
    )


def strided_time(
    vae: Any, direction: Direction, drops_on_decode: Literal["first", "last"] = "first"
) -> TimeTiles:
    """The windows of frames of a class that states them as it states its tiles."""
    ratio = vae.temporal_compression_ratio
    tile, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    if direction == "decode":
        return TimeTiles(
            tile=tile // ratio, step=stride // ratio, blend=tile - stride, keep=stride, drops=drops_on_decode
        )
    keep = stride // ratio
    return TimeTiles(tile=tile, step=stride, blend=tile // ratio - keep, keep=keep)


def _floored(pair: Pair, by: int) -> Pair:
    return pair[0] // by, pair[1] // by


def _scaled(pair: Pair, by: int) -> Pair:
    return pair[0] * by, pair[1] * by
