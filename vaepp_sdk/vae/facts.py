"""What a plan needs to know of a VAE: plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs

from vaepp_sdk.vae.trace import LayerTrace

__all__ = ["Direction", "TileGrid", "VaeFacts"]

Direction = Literal["decode", "encode"]


@attrs.frozen(kw_only=True)
class TileGrid:
    """The geometry of a VAE's own tiling in one direction; every pair is (rows, columns).

    Attributes:
        tile: a tile's size, in input units (latent rows for decode, pixels for encode).
        step: from one tile's start to the next, in input units.
        blend: how far neighbours are blended into each other, in output units.
        keep: how much of each tile's output stays after blending, in output units.
        overlap: the part of a tile that its neighbour covers too, where the class states its geometry so;
            None for classes that state steps.
    """

    tile: tuple[int, int]
    step: tuple[int, int]
    blend: tuple[int, int]
    keep: tuple[int, int]
    overlap: float | None = None

    @classmethod
    def overlapping(cls, tile: tuple[int, int], out_tile: tuple[int, int], overlap: float) -> TileGrid:
        """The geometry of diffusers' `tile_overlap_factor`, with its roundings.

        Args:
            tile: a tile's size, in input units.
            out_tile: the size its output is taken to have, in output units.
            overlap: the part of a tile that its neighbour covers too.
        """
        blend = (int(out_tile[0] * overlap), int(out_tile[1] * overlap))
        return cls(
            tile=tile,
            step=(int(tile[0] * (1 - overlap)), int(tile[1] * (1 - overlap))),
            blend=blend,
            keep=(out_tile[0] - blend[0], out_tile[1] - blend[1]),
            overlap=overlap,
        )


@attrs.frozen(kw_only=True)
class VaeFacts:
    """One VAE, as seen by planners.

    Attributes:
        vae_class: the class name.
        spatial_ratio: pixels per latent along each side.
        latent_channels: channels of a latent.
        picture_channels: channels of a decoded picture.
        moment_channels: channels of what the encoder returns (means and log-variances together).
        use_tiling: the VAE's tiling switch.
        decode_tiles: the tiling of decode, or None where vaepp does not know the class's tiling.
        encode_tiles: the tiling of encode, likewise.
        peak_values_per_pixel: the most live values per picture pixel while one untiled decode or encode
            runs, from the shapes of the widest full-resolution block: an estimate for plans.
        temporal_ratio: pictures per latent frame for a video VAE whose first frame stands alone; 0 for a
            VAE without a frame axis.
        decode_layers: the layers that one decode calls, or None where the adapter does not say.
        encode_layers: those of one encode, likewise.
        encode_rounds_up: whether encode keeps an incomplete last latent row or column, or drops it.
    """

    vae_class: str
    spatial_ratio: int
    latent_channels: int
    picture_channels: int
    moment_channels: int
    use_tiling: bool
    decode_tiles: TileGrid | None = None
    encode_tiles: TileGrid | None = None
    peak_values_per_pixel: float = 0.0
    temporal_ratio: int = 0
    decode_layers: LayerTrace | None = None
    encode_layers: LayerTrace | None = None
    encode_rounds_up: bool = False

    def tiles(self, direction: Direction) -> TileGrid | None:
        """The tiling of one direction, or None where it is not known."""
        return self.decode_tiles if direction == "decode" else self.encode_tiles

    def layers(self, direction: Direction) -> LayerTrace | None:
        """The layers that one direction calls, or None where they are not known."""
        return self.decode_layers if direction == "decode" else self.encode_layers

    def tiling_fires(self, direction: Direction, shape: Sequence[int]) -> bool:
        """Whether the VAE itself would tile an input of this shape: tiling on, and a side above the tile."""
        grid = self.tiles(direction)
        if not self.use_tiling or grid is None:
            return False
        return shape[-2] > grid.tile[0] or shape[-1] > grid.tile[1]

    def out_length(self, direction: Direction, length: int) -> int:
        """Output units along one spatial side for `length` input units, untiled."""
        if direction == "decode":
            return length * self.spatial_ratio
        return -(-length // self.spatial_ratio) if self.encode_rounds_up else length // self.spatial_ratio

    def out_channels(self, direction: Direction) -> int:
        """Channels of the output: a picture's for decode, the moments' for encode."""
        return self.picture_channels if direction == "decode" else self.moment_channels

    def out_shape(self, direction: Direction, shape: Sequence[int]) -> tuple[int, ...]:
        """The untiled output's shape for an input `(batch, channels, [frames,] rows, columns)`."""
        sides = (self.out_length(direction, shape[-2]), self.out_length(direction, shape[-1]))
        return (shape[0], self.out_channels(direction), *self._frames(direction, shape[2:-2]), *sides)

    def _frames(self, direction: Direction, frames: Sequence[int]) -> tuple[int, ...]:
        """The frame axis of the output: the first frame alone, then `temporal_ratio` pictures a latent."""
        if not frames:
            return ()
        if direction == "decode":
            return (1 + (frames[0] - 1) * self.temporal_ratio,)
        return (1 + (frames[0] - 1) // self.temporal_ratio,)
