"""Convolution of a band of a clip that is run some frames at a time.

Where a class hands a layer its last frames again, their rows at the seams are kept here, not sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15CausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from vaepp_strategies.layers.bands import Bands
from vaepp_strategies.layers.conv import Edge, convolve_band, zero_rows
from vaepp_strategies.layers.reach import Window

__all__ = ["CLIP_LAYERS", "ClipConvolution", "band_clip_convolution", "clip_convolution"]

PadMode = Literal["constant", "replicate"]


@attrs.frozen(eq=False)
class ClipConvolution:
    """What one layer does to a clip: frames are put before and after it, rows and columns around it.

    Attributes:
        convolution: holds the weights.
        space: rows, and columns, of padding on each side.
        space_mode: zeros or copies of the edge.
        time: frames of padding before the first one and after the last one. Earlier frames that the layer is
            given take the place of those before.
        time_mode: zeros, or copies of the first and the last frame.
        caches: whether the class gives it earlier frames.
    """

    convolution: nn.Conv3d
    space: tuple[int, int]
    space_mode: PadMode
    time: tuple[int, int]
    time_mode: PadMode
    caches: bool = False

    @property
    def edge(self) -> Edge:
        """The padding along the split axis."""
        return zero_rows if self.space_mode == "constant" else _edge_rows

    def window(self, axis: int) -> Window:
        """How it works along an axis, -2 or -1."""
        kernel, stride, padding = (
            self.convolution.kernel_size[axis],
            self.convolution.stride[axis],
            self.space[axis],
        )
        return Window(kernel, stride, padding, padding)

    def rows(self, strip: torch.Tensor, axis: int, earlier: int) -> torch.Tensor:
        """Convolve without padding along `axis`.

        Args:
            strip: rows of `earlier` frames and those after them.
            axis: the split axis.
            earlier: frames that take the place of padding.
        """
        across = [self.space[1]] * 2 + [self.space[0]] * 2
        across[0 if axis == -1 else 2] = across[1 if axis == -1 else 3] = 0
        frames = (self.time[0] - min(earlier, self.time[0]), self.time[1])
        padded = F.pad(strip, (*across, 0, 0), self.space_mode)
        padded = F.pad(padded, (0, 0, 0, 0, *frames), self.time_mode)
        own = self.convolution
        return F.conv3d(padded, own.weight, own.bias, own.stride, 0, own.dilation, own.groups)


def _edge_rows(band: torch.Tensor, axis: int, count: int, side: int) -> torch.Tensor:
    """Copies of the row at an edge."""
    row = band.narrow(axis, 0 if side < 0 else band.shape[axis] - 1, 1)
    shape = list(row.shape)
    shape[axis] = count
    return row.expand(shape)


def _plain(layer: nn.Conv3d) -> ClipConvolution:
    assert not isinstance(layer.padding, str), "padding is given as numbers"
    frames, rows, columns = layer.padding
    return ClipConvolution(layer, (rows, columns), "constant", (frames, frames), "constant")


def _cached(layer: Any) -> ClipConvolution:
    """Zeros in time and space, unless the frames before are given."""
    columns, _, rows, _, before, after = layer._padding
    return ClipConvolution(layer, (rows, columns), "constant", (before, after), "constant", caches=True)


def _holding(layer: Any) -> ClipConvolution:
    """One mode of padding for time and space, in front of a convolution without its own."""
    columns, _, rows, _, before, after = layer.time_causal_padding
    return ClipConvolution(layer.conv, (rows, columns), layer.pad_mode, (before, after), layer.pad_mode)


CLIP_LAYERS: Mapping[type[nn.Module], Callable[[Any], ClipConvolution]] = {
    nn.Conv3d: _plain,
    HunyuanVideo15CausalConv3d: _holding,
    HunyuanVideoCausalConv3d: _holding,
    QwenImageCausalConv3d: _cached,
    WanCausalConv3d: _cached,
}
"""Layers known, each with how to read it."""


def clip_convolution(layer: nn.Module) -> ClipConvolution:
    """What a layer of a known class does."""
    return CLIP_LAYERS[type(layer)](layer)


@attrs.define(eq=False)
class _Memory:
    """A neighbour's rows of the last frames that a layer was given, for the length of one decode or encode.

    A later call that is given those frames again needs no message for them.

    Attributes:
        keep: frames to keep.
        take: how many of them stand before those of the call under way.
    """

    keep: int
    take: int = 0
    _last: torch.Tensor | None = None

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of earlier frames and of this call's, in order."""
        joined = rows
        if self.take:
            assert self._last is not None, "earlier frames were seen"
            joined = torch.cat([self._last[:, :, -self.take :], rows], dim=2)
        if self.keep:
            known = joined if self._last is None else torch.cat([self._last, rows], dim=2)
            self._last = known[:, :, -self.keep :].clone()
        return joined


def band_clip_convolution(layer: Any, bands: Bands, name: str) -> Callable[..., torch.Tensor]:
    """A forward for a convolution over frames, rows and columns that works on this rank's band.

    Args:
        layer: of a class in `CLIP_LAYERS`.
        bands: this rank's band.
        name: names the exchange in errors.
    """
    clip, axis = clip_convolution(layer), bands.axis
    window, own = clip.window(axis), type(layer).forward
    keep = clip.time[0] if clip.caches else 0
    above, below = _Memory(keep), _Memory(keep)

    def forward(values: torch.Tensor, earlier: torch.Tensor | None = None) -> torch.Tensor:
        halo = bands.carried(values) or bands.fetch(values, window.reach, name)
        above.take = below.take = frames = 0 if earlier is None else earlier.shape[2]

        def whole(band: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = own(layer, band) if earlier is None else own(layer, band, earlier)
            return result

        def rows(strip: torch.Tensor) -> torch.Tensor:
            return clip.rows(strip, axis, frames)

        halo = halo.mapped(above.joined, below.joined)
        return convolve_band(values, halo, axis, window, whole, rows, edge=clip.edge, earlier=earlier)[0]

    return forward
