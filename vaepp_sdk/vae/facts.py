"""What a plan needs to know of a VAE: plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.frames import Direction, FirstFrameAlone, FrameRule, TimeTiles

if TYPE_CHECKING:
    # It traces with torch, and facts are read where torch is not imported.
    from vaepp_sdk.vae.trace import LayerTrace

__all__ = ["ClipLayers", "Direction", "TileGrid", "VaeFacts"]


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
        above: the sides above which tiling fires, in input units; None where that is the tile's size.
        grain: how many neighbouring output rows or columns share one weight of the blend: the patch size of
            a class that blends before it spreads patches over pixels.
        crops: True where the joined output is cropped to the size of the untiled one.
        pads: True where tiles are padded to whole latents before they are encoded.
        least: the smallest side of a tile, or of a whole input, in latents.
        broken: why the class's own tiling fails in this direction; empty where it works.
        time: how long clips are cut first, or None where they are not.
    """

    tile: tuple[int, int]
    step: tuple[int, int]
    blend: tuple[int, int]
    keep: tuple[int, int]
    overlap: float | None = None
    above: tuple[int, int] | None = None
    grain: int = 1
    crops: bool = False
    pads: bool = False
    least: int = 1
    broken: str = ""
    time: TimeTiles | None = None

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
class ClipLayers:
    """The layers that a video VAE calls, which depend on how many frames a clip has.

    Attributes:
        trace: the layers of one direction for a clip of so many input frames; traced once for each number.
        enough: input frames of a decode and of an encode that call every layer; at least two chunks more
            than the first where the class works in chunks.
        chunk: input frames of decode and encode that the class works on at a time beyond `enough`, calling
            the layers of the chunk before it again; 0 where it runs a whole clip at once.
    """

    trace: Callable[[Direction, int], LayerTrace] = attrs.field(eq=False, repr=False)
    enough: tuple[int, int]
    chunk: tuple[int, int] = (0, 0)

    def frames(self, direction: Direction) -> tuple[int, int]:
        """`enough` and `chunk` of one direction."""
        place = 0 if direction == "decode" else 1
        return self.enough[place], self.chunk[place]


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
        picture_layers: gives the layers that one decode or encode calls, traced when first asked for; None
            where the adapter does not say.
        clip_layers: the layers of a VAE with a frame axis, or None where the adapter does not say.
        context: latent rows of context at which the seam of two windows, decoded with the whole picture's
            statistics, cannot be seen, as measured on trained weights of the class.
        encode_rounds_up: whether encode keeps an incomplete last latent row or column, or drops it.
        encode_unit: encode takes only sides that are multiples of this.
        input_channels: channels of a picture to encode, where the configuration's `in_channels` counts
            something else, such as patches of pixels; None where it is that.
        frames: how many frames come out; None is `FirstFrameAlone(temporal_ratio)`.
        frames_at_once: output frames that one decode works on at a time, for estimates; 0 is all of them.
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
    picture_layers: Callable[[Direction], LayerTrace] | None = attrs.field(default=None, eq=False, repr=False)
    clip_layers: ClipLayers | None = None
    context: int = 12
    encode_rounds_up: bool = False
    encode_unit: int = 1
    input_channels: int | None = None
    frames: FrameRule | None = None
    frames_at_once: int = 0

    def tiles(self, direction: Direction) -> TileGrid | None:
        """The tiling of one direction, or None where it is not known."""
        return self.decode_tiles if direction == "decode" else self.encode_tiles

    def layers(self, direction: Direction, frames: int = 0) -> LayerTrace | None:
        """The layers that one direction calls, or None where they are not known.

        Args:
            direction: decode or encode.
            frames: input frames of a clip; 0 is as few as call every layer. Pictures have none.
        """
        if self.clip_layers is not None:
            enough, _ = self.clip_layers.frames(direction)
            return self.clip_layers.trace(direction, frames or enough)
        return None if self.picture_layers is None else self.picture_layers(direction)

    def tiling_fires(self, direction: Direction, shape: Sequence[int]) -> bool:
        """Whether the VAE itself would cut an input of this shape, in space or in time."""
        return self.cuts_sides(direction, shape) or self.cuts_frames(direction, shape)

    def cuts_sides(self, direction: Direction, shape: Sequence[int]) -> bool:
        """Whether the VAE itself would cut rows and columns: tiling on, and a side above the limit."""
        grid = self.tiles(direction)
        if not self.use_tiling or grid is None:
            return False
        rows, columns = grid.above or grid.tile
        return shape[-2] > rows or shape[-1] > columns

    def cuts_frames(self, direction: Direction, shape: Sequence[int]) -> bool:
        """Whether the VAE itself would cut a clip in time, which does not depend on its tiling switch."""
        grid = self.tiles(direction)
        return grid is not None and grid.time is not None and shape[2] > grid.time.tile

    def out_length(self, direction: Direction, length: int) -> int:
        """Output units along one spatial side for `length` input units, untiled.

        Raises:
            UnsupportedError: the VAE cannot take a side of this length.
        """
        if direction == "decode":
            return length * self.spatial_ratio
        if length % self.encode_unit:
            near = length - length % self.encode_unit
            raise UnsupportedError(
                f"{self.vae_class} cannot encode a side of {length} pixels: it takes multiples of "
                f"{self.encode_unit}; nearest: {near or self.encode_unit} or {near + self.encode_unit}"
            )
        return -(-length // self.spatial_ratio) if self.encode_rounds_up else length // self.spatial_ratio

    def out_frames(self, direction: Direction, frames: int) -> int:
        """Frames of the output for `frames` of the input, in one piece.

        Raises:
            UnsupportedError: the VAE cannot take this many.
        """
        rule = self.frames or FirstFrameAlone(self.temporal_ratio)
        return rule.out_frames(direction, frames)

    def out_channels(self, direction: Direction) -> int:
        """Channels of the output: a picture's for decode, the moments' for encode."""
        return self.picture_channels if direction == "decode" else self.moment_channels

    def out_front(self, direction: Direction, shape: Sequence[int]) -> tuple[int, ...]:
        """The output's `(batch, channels, [frames])` for an input of this shape."""
        frames = tuple(self.out_frames(direction, count) for count in shape[2:-2])
        return (shape[0], self.out_channels(direction), *frames)

    def out_shape(self, direction: Direction, shape: Sequence[int]) -> tuple[int, ...]:
        """The untiled output's shape for an input `(batch, channels, [frames,] rows, columns)`."""
        sides = (self.out_length(direction, shape[-2]), self.out_length(direction, shape[-1]))
        return (*self.out_front(direction, shape), *sides)
