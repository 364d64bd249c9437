"""Convolution of a band of a clip that is run some frames at a time.

Where a class hands a layer its last frames again, their rows at the seams are kept here, not sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15CausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from vaepp_strategies.layers.bands import Bands, Halo
from vaepp_strategies.layers.clip_room import PadMode, surrounded
from vaepp_strategies.layers.conv import convolve_band, last_rows
from vaepp_strategies.layers.joined import nearest_rows
from vaepp_strategies.layers.reach import NO_ROWS, SHORT_BAND, Reach, Window
from vaepp_strategies.layers.strided import convolve

__all__ = ["CLIP_LAYERS", "ClipConvolution", "FrameMemory", "band_clip_convolution", "clip_convolution"]


@attrs.frozen(eq=False)
class ClipConvolution:
    """What one layer does to a clip: frames are put before and after it, rows and columns around it.

    Attributes:
        convolution: holds the weights.
        space: rows, and columns, of padding on each side.
        space_mode: zeros, copies of the edge, or the rows and columns mirrored at it.
        time: frames of padding before the first one and after the last one. Earlier frames that the layer is
            given take the place of those before.
        time_mode: zeros, or copies of the first and the last frame.
        further: what the class gives it besides the clip: nothing, earlier frames, or whether it is causal.
        hands_back: how many of its last frames it returns beside its output, for the next call; None
            where it returns its output alone.
    """

    convolution: nn.Conv3d
    space: tuple[int, int]
    space_mode: PadMode
    time: tuple[int, int]
    time_mode: PadMode
    further: Literal["nothing", "earlier", "causal"] = "nothing"
    hands_back: int | None = None

    def causal(self, causal: bool) -> ClipConvolution:
        """The same with all frames of padding before the first one, or half of them after the last one."""
        frames = sum(self.time)
        return attrs.evolve(self, time=(frames, 0) if causal else (frames // 2, frames // 2))

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
        return self._bare(F.pad(padded, (0, 0, 0, 0, *frames), self.time_mode))

    def joined(
        self, band: torch.Tensor, halo: Halo, axis: int, give: Reach, earlier: torch.Tensor | None
    ) -> tuple[torch.Tensor, Halo]:
        """Convolve a band and all that stands around it, written into one tensor: no row is computed twice.

        Args:
            band: this rank's rows.
            halo: the neighbours' rows around them, of the earlier frames too: those of the window's reach,
                and `give` more.
            axis: the split axis.
            give: rows beyond the band to compute as well; only where the stride is 1.
            earlier: frames before the band's.

        Returns:
            The band's output, and the rows of `give` around it.
        """
        window, (above, below) = self.window(axis), halo.rows()
        gives = Reach(0 if above is None else give.above, 0 if below is None else give.below)
        if above is not None:
            above = nearest_rows(above, axis, window.reach.above + gives.above, -1)
        if below is not None:
            below = nearest_rows(below, axis, window.reach.below + gives.below, 1)
        frames = 0 if earlier is None else earlier.shape[2]
        beside = [(max(self.time[0], frames), self.time[1]), (self.space[0],) * 2, (self.space[1],) * 2]
        beside[axis] = (
            window.lead if above is None else above.shape[axis],
            window.trail if below is None else below.shape[axis],
        )
        room = surrounded(band, earlier, (above, below), axis, beside, self.space_mode, self.time_mode)
        wide = self._bare(room)
        out = wide.narrow(axis, gives.above, wide.shape[axis] - gives.above - gives.below)
        # Copies: views would keep the whole output alive for as long as a later layer's rows.
        return out, Halo(
            wide.narrow(axis, 0, gives.above).clone() if gives.above else None,
            last_rows(wide, axis, gives.below).clone() if gives.below else None,
        )

    def _bare(self, padded: torch.Tensor) -> torch.Tensor:
        return convolve(self.convolution, padded, (0, 0, 0))


def _plain(layer: nn.Conv3d) -> ClipConvolution:
    assert not isinstance(layer.padding, str), "padding is given as numbers"
    frames, rows, columns = layer.padding
    return ClipConvolution(layer, (rows, columns), "constant", (frames, frames), "constant")


def _cached(layer: Any) -> ClipConvolution:
    """Zeros in time and space, unless the frames before are given."""
    columns, _, rows, _, before, after = layer._padding
    return ClipConvolution(layer, (rows, columns), "constant", (before, after), "constant", "earlier")


def _holding(layer: Any) -> ClipConvolution:
    """One mode of padding for time and space, in front of a convolution without its own."""
    columns, _, rows, _, before, after = layer.time_causal_padding
    return ClipConvolution(layer.conv, (rows, columns), layer.pad_mode, (before, after), layer.pad_mode)


def _repeating(layer: Any) -> ClipConvolution:
    """Copies of the first frame, and of the last one too where it is not causal; zeros in space."""
    frames = layer.kernel_size[0] - 1
    time = (frames, 0) if layer.is_causal else (frames // 2, frames // 2)
    _, rows, columns = layer.conv.padding
    return ClipConvolution(layer.conv, (rows, columns), "constant", time, "replicate")


def _told(layer: Any) -> ClipConvolution:
    """As `_repeating`, but each call says whether it is causal."""
    _, rows, columns = layer.conv.padding
    modes: dict[str, PadMode] = {"zeros": "constant", "replicate": "replicate", "reflect": "reflect"}
    mode = modes[layer.conv.padding_mode]
    return ClipConvolution(
        layer.conv, (rows, columns), mode, (layer.kernel_size[0] - 1, 0), "replicate", "causal"
    )


def _handing_back(layer: Any) -> ClipConvolution:
    """It returns its last frames for the next call, or pads every call by copies of the edges."""
    frames, space = layer.time_pad, (layer.height_pad, layer.width_pad)
    if layer.pad_mode == "replicate":
        return ClipConvolution(layer.conv, space, "replicate", (frames, 0), "replicate", hands_back=0)
    return ClipConvolution(layer.conv, space, "constant", (frames, 0), "replicate", "earlier", frames)


CLIP_LAYERS: Mapping[type[nn.Module], Callable[[Any], ClipConvolution]] = {
    nn.Conv3d: _plain,
    CogVideoXCausalConv3d: _handing_back,
    CogVideoXSafeConv3d: _plain,
    HunyuanVideo15CausalConv3d: _holding,
    HunyuanVideoCausalConv3d: _holding,
    LTX2VideoCausalConv3d: _told,
    LTXVideoCausalConv3d: _repeating,
    QwenImageCausalConv3d: _cached,
    WanCausalConv3d: _cached,
}
"""Layers known, each with how to read it."""


def clip_convolution(layer: nn.Module) -> ClipConvolution:
    """What a layer of a known class does."""
    return CLIP_LAYERS[type(layer)](layer)


@attrs.define(eq=False)
class FrameMemory:
    """What peers sent of the last frames that a layer was given, for the length of one decode or encode.

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
            joined = torch.cat([self._taken(self._last), rows], dim=2)
        if self.keep:
            known = joined if self._last is None else torch.cat([self._last, rows], dim=2)
            self._last = known[:, :, -self.keep :].clone()
        return joined

    def _taken(self, last: torch.Tensor) -> torch.Tensor:
        """The frames that are taken; classes put zeros in place of those that never were."""
        missing = self.take - last.shape[2]
        return last[:, :, -self.take :] if missing <= 0 else F.pad(last, (0, 0, 0, 0, missing, 0))


def band_clip_convolution(
    layer: Any, bands: Bands, name: str, give: Reach = NO_ROWS
) -> Callable[..., torch.Tensor]:
    """A forward for a convolution over frames, rows and columns that works on this rank's band.

    A long band is convolved while the rows travel, and the rows at its seams once more; a short one waits for
    them, and no row is computed twice.

    Args:
        layer: of a class in `CLIP_LAYERS`.
        bands: this rank's band.
        name: names the exchange in errors.
        give: rows beyond the band that a later layer reads of its output.
    """
    plain, axis = clip_convolution(layer), bands.axis
    window, own = plain.window(axis), type(layer).forward
    keep = plain.time[0] if plain.further == "earlier" else 0
    above, below = FrameMemory(keep), FrameMemory(keep)

    def forward(values: torch.Tensor, *args: Any, **named: Any) -> Any:
        halo = bands.carried(values) or bands.fetch(values, window.reach + give, name)
        further = next(iter((*args, *named.values())), None)
        earlier = further if plain.further == "earlier" else None
        clip = plain.causal(further is not False) if plain.further == "causal" else plain
        above.take = below.take = frames = 0 if earlier is None else earlier.shape[2]
        halo = halo.mapped(above.joined, below.joined)

        def whole(band: torch.Tensor) -> torch.Tensor:
            result: Any = own(layer, band, *args, **named)
            found: torch.Tensor = result if plain.hands_back is None else result[0]
            return found

        def rows(strip: torch.Tensor) -> torch.Tensor:
            return clip.rows(strip, axis, frames)

        if values.shape[axis] <= SHORT_BAND:
            out, beyond = clip.joined(values, halo, axis, give, earlier)
        else:
            out, beyond = convolve_band(values, halo, axis, window, whole, rows, give, earlier)
        if give:
            bands.carry(out, beyond)
        return out if plain.hands_back is None else (out, _last_frames(values, earlier, plain.hands_back))

    return forward


def _last_frames(values: torch.Tensor, earlier: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The last frames of a call and those before it; before the first call stand copies of a frame."""
    if not count:
        return None
    missing = count - values.shape[2]
    if missing <= 0:
        return values[:, :, -count:].clone()
    before = values[:, :, :1].expand(-1, -1, missing, -1, -1) if earlier is None else earlier[:, :, -missing:]
    return torch.cat([before, values], dim=2)
