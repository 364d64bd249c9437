"""Layers on a band that give the very bits that they give on the whole picture or clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn

from vaepp_sdk.vae.plan import split_evenly
from vaepp_strategies.layers.bands import Halo
from vaepp_strategies.layers.clip_conv import CLIP_LAYERS, FrameMemory, clip_convolution
from vaepp_strategies.layers.kernels import KernelCheck
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import Reach
from vaepp_strategies.layers.whole import WholeBands

__all__ = [
    "Forward",
    "channel_shares",
    "reference_group_norm",
    "reference_guided",
    "reference_join",
    "reference_rows",
    "reference_split",
    "reference_upsample",
    "reference_whole",
]

Forward = Callable[..., Any]
Map = Callable[[torch.Tensor], torch.Tensor]

_CHANNELS_LAST = (nn.Linear, RMSNorm)
"""Layers over the last axis, which pictures and clips are turned for."""


def reference_whole(layer: Any, bands: WholeBands, scale: Scale, out_scale: Scale, name: str) -> Forward:
    """A forward that runs a layer on the whole on every rank, as it is, and takes the band of that.

    Args:
        layer: any layer; what it calls must not be replaced.
        bands: this rank's band.
        scale: the resolution of its input.
        out_scale: the resolution of its output.
        name: names the exchange in errors.
    """
    memory = FrameMemory(_frames_kept(layer))

    def forward(values: torch.Tensor, *args: Any, **named: Any) -> Any:
        earlier, run = _call(layer, args, named)
        memory.take = 0 if earlier is None else earlier.shape[2]
        result = run(memory.joined(bands.gather_whole(values, scale, name)))
        return _each(
            result, lambda out: bands.own_rows(out, out_scale), lambda cache: bands.own_rows(cache, scale)
        )

    def turned(values: torch.Tensor) -> torch.Tensor:
        whole = bands.gather_whole(values.movedim(-1, 1), scale, name).movedim(1, -1)
        result: torch.Tensor = type(layer).forward(layer, whole)
        return bands.own_rows(result.movedim(-1, 1), out_scale).movedim(1, -1)

    return turned if isinstance(layer, _CHANNELS_LAST) else forward


def reference_split(block: Any, bands: WholeBands, out_scale: Scale) -> Forward:
    """A forward for the last block that runs on the whole, which every rank holds; bands follow it.

    Args:
        block: any layer; what it calls must not be replaced.
        bands: this rank's band.
        out_scale: the resolution of its output.
    """
    own = type(block).forward

    def forward(*args: Any, **named: Any) -> Any:
        # What it hands to its own next call stays whole.
        return _each(own(block, *args, **named), lambda out: bands.own_rows(out, out_scale), _same)

    return forward


def reference_join(block: Any, bands: WholeBands, scale: Scale, name: str) -> Forward:
    """A forward for the first block that runs on the whole, as all after it do.

    Args:
        block: any layer; what it calls must not be replaced.
        bands: this rank's band.
        scale: the resolution of its input.
        name: names the exchange in errors.
    """
    own = type(block).forward

    def forward(values: torch.Tensor, *args: Any, **named: Any) -> Any:
        return own(block, bands.gather_whole(values, scale, name), *args, **named)

    return forward


def reference_rows(
    layer: Any,
    bands: WholeBands,
    scale: Scale,
    out_scale: Scale,
    reach: Reach,
    name: str,
    check: KernelCheck,
) -> Forward:
    """A forward that runs a layer on the band joined with the neighbours' rows, and drops what those gave.

    Recomputing the rows at a seam alone would be cheaper, and would take other kernels: short strips do.

    Args:
        layer: a convolution, or a layer with one inside; what it calls must not be replaced.
        bands: this rank's band.
        scale: the resolution of its input.
        out_scale: the resolution of its output.
        reach: the rows it needs; above, a multiple of its stride.
        name: names the exchange in errors.
        check: told what came out.
    """
    axis, keep = bands.axis, _frames_kept(layer)
    above, below = FrameMemory(keep), FrameMemory(keep)
    dropped = reach.above * scale.down * out_scale.up // (scale.up * out_scale.down)
    length = bands.parts.core_length(bands.group.rank, out_scale)

    def forward(values: torch.Tensor, *args: Any, **named: Any) -> Any:
        halo = bands.fetch(values, reach, name) if reach else Halo(None, None)
        earlier, run = _call(layer, args, named)
        above.take = below.take = 0 if earlier is None else earlier.shape[2]
        band = values if earlier is None else torch.cat([earlier, values], dim=2)
        lead, trail = halo.mapped(above.joined, below.joined).rows()
        wide = bands.joined_rows(band, lead, trail)
        first, start = (0, 0) if lead is None else (dropped, reach.above)

        def cut(result: Any) -> Any:
            return _each(
                result,
                lambda out: bands.copy_rows(out, first, length),
                lambda cache: bands.copy_rows(cache, start, values.shape[axis]),
            )

        result = cut(run(wide))
        check.rows(name, layer, lambda whole: cut(run(whole)), wide, result, bands, scale)
        return result

    return forward


def _frames_kept(layer: nn.Module) -> int:
    """How many of its last frames a layer is handed once more, at most."""
    if type(layer) not in CLIP_LAYERS:
        return 0
    clip = clip_convolution(layer)
    return clip.time[0] if clip.further == "earlier" else 0


def _call(
    layer: nn.Module, args: Any, named: Any
) -> tuple[torch.Tensor | None, Callable[[torch.Tensor], Any]]:
    """The earlier frames that a layer is given in a call, or None, and that call with other frames.

    Args:
        layer: the layer.
        args: what it is given besides its input.
        named: likewise, by name.

    Returns:
        The earlier frames; and a function of earlier frames and input in one tensor.
    """
    own, further = type(layer).forward, (*args, *named.values())
    earlier = next((value for value in further if isinstance(value, torch.Tensor)), None)
    if earlier is None or not _frames_kept(layer):
        return None, lambda values: own(layer, values, *args, **named)
    frames = earlier.shape[2]

    def run(clip: torch.Tensor) -> Any:
        def put(value: Any) -> Any:
            return clip[:, :, :frames] if value is earlier else value

        return own(
            layer, clip[:, :, frames:], *map(put, args), **{name: put(value) for name, value in named.items()}
        )

    return earlier, run


def _each(result: Any, output: Map, frames: Map) -> Any:
    """Map a layer's output, and the frames that it hands to its next call beside it, where it does."""
    if not isinstance(result, tuple):
        return output(result)
    rest = (frames(value) if isinstance(value, torch.Tensor) else value for value in result[1:])
    return (output(result[0]), *rest)


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def channel_shares(channels: int, groups: int, ranks: int) -> list[tuple[int, int]]:
    """Every rank's first channel and number of channels; no group is cut, and the last may get none."""
    width = channels // groups
    shares = [(start * width, size * width) for start, size in split_evenly(groups, ranks)]
    return shares + [(channels, 0)] * (ranks - len(shares))


def reference_group_norm(
    norm: nn.GroupNorm, bands: WholeBands, scale: Scale, name: str, check: KernelCheck, *, by_frame: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `norm` by its own kernel: each rank normalises whole groups and gives them back.

    Args:
        norm: the layer.
        bands: this rank's band.
        scale: the resolution of its input.
        name: names the exchange in errors.
        check: told what came out.
        by_frame: whether it normalises each frame of a clip by itself.
    """
    shares = channel_shares(norm.num_channels, norm.num_groups, bands.ranks)
    first, size = shares[bands.group.rank]
    groups = size * norm.num_groups // norm.num_channels
    own = slice(first, first + size)

    def normalised(mine: torch.Tensor) -> torch.Tensor:
        weight = None if norm.weight is None else norm.weight[own]
        bias = None if norm.bias is None else norm.bias[own]
        normed = F.group_norm(mine, groups, weight, bias, norm.eps)
        check.channels(name, norm, mine, normed, first)
        return normed

    def forward(values: torch.Tensor) -> torch.Tensor:
        mine = bands.to_channels(values, scale, shares, name)
        if not groups:
            normed = mine
        elif by_frame:
            frames = mine.transpose(1, 2)
            normed = normalised(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        else:
            normed = normalised(mine)
        del mine
        return bands.to_bands(normed, values, scale, shares, name)

    return forward


def reference_guided(norm: Any, bands: WholeBands) -> Forward:
    """A forward for a normalisation that is guided by the latent, which every rank holds whole.

    Args:
        norm: the layer; the latent is its second argument.
        bands: this rank's band.
    """
    own = type(norm).forward

    def forward(values: torch.Tensor, latent: torch.Tensor, *args: Any, **named: Any) -> Any:
        return own(norm, values, bands.own_rows(latent, Scale(1, 1)), *args, **named)

    return forward


def reference_upsample(block: Any, bands: WholeBands, scale: Scale) -> Forward:
    """A forward for diffusers' `Upsample2D`, which makes very large inputs contiguous.

    The size of the whole picture counts, not that of the band.
    """
    own = type(block).forward

    def forward(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch, channels = values.shape[:2]
        if 2 * batch * channels * sum(bands.areas(values, scale)) > 2**31:
            values = values.contiguous()
        result: torch.Tensor = own(block, values, *args, **kwargs)
        return result

    return forward
