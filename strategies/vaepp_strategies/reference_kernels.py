"""Where kernels give a band the bits that they give the whole: what is known of them, as pure arithmetic.

Measured on a CPU with one thread and torch 2.13; `KernelCheck` compares at run time.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import attrs

from vaepp_sdk.vae.trace import LayerCall
from vaepp_strategies.layers.even import VECTOR_VALUES

__all__ = ["Sizes", "convolved_alike", "even_values", "exact_anywhere", "normalised_alike", "summed_alike"]

_LEAST_VALUES = 20480
"""Inputs of no more values are convolved by other kernels than larger ones: torch counts them so."""

_IN_ORDER = 4
"""Sums of so few values are made in one order, wherever in a vector they stand."""

_FEW_CHANNELS = 64
"""Products of so few values are summed in one piece by convolutions of single positions."""

_PADDING_THEMSELVES = ("QwenImageCausalConv3d", "WanCausalConv3d")

_EXACT = frozenset(
    {
        # They round correctly, so that vectors and scalars agree to the last bit.
        *("add", "clamp", "clamp_min", "div", "mul", "neg", "relu", "relu_", "sub"),
        # They sum in order, one position after the other.
        *("linalg_vector_norm", "native_layer_norm"),
        # They copy.
        *(
            "_to_copy",
            "_unsafe_view",
            "_upsample_nearest_exact2d",
            "alias",
            "cat",
            "clone",
            "constant_pad_nd",
        ),
        *("detach", "expand", "permute", "repeat", "slice", "split", "t", "unsqueeze", "upsample_nearest2d"),
        *("upsample_nearest3d", "view"),
    }
)


@attrs.frozen(kw_only=True)
class Sizes:
    """How large a layer's input is.

    Attributes:
        lengths: every band's rows, or columns where those are split.
        across: its columns, or rows.
        rows_split: whether rows are split.
        batch: pictures, or clips.
        itemsize: bytes of a value.
        width: values at each position of one picture, or of all frames of a clip.
        frames: frames of a clip, or 1.
    """

    lengths: tuple[int, ...]
    across: int
    rows_split: bool
    batch: int
    itemsize: int
    width: int
    frames: int

    @property
    def values(self) -> list[int]:
        """The values of every band."""
        return [self.batch * self.width * self.across * length for length in self.lengths]

    @property
    def positions(self) -> list[int]:
        """The positions of every band, and of the whole, over all frames."""
        lengths = (*self.lengths, sum(self.lengths))
        return [self.frames * self.across * length for length in lengths]

    @property
    def rows(self) -> tuple[int, int]:
        """The fewest rows of a band, and those of the whole."""
        whole = sum(self.lengths)
        return (min(self.lengths), whole) if self.rows_split else (self.across, self.across)


def exact_anywhere(operators: Collection[str]) -> bool:
    """Whether operators give each position the same bits wherever it stands in a tensor."""
    return _EXACT.issuperset(operators)


def even_values(sizes: Sizes) -> bool:
    """Whether no band, and so not the whole either, ends within a vector."""
    return not any(size % VECTOR_VALUES for size in sizes.values)


def summed_alike(group: int, sizes: Sizes) -> bool:
    """Whether sums of a few values, or of one value of each channel, have the same order in every band.

    Args:
        group: how many values are summed.
        sizes: what is summed; the channels of a position count as one.
    """
    return group <= _IN_ORDER or not any(count % VECTOR_VALUES for count in sizes.positions)


def normalised_alike(sizes: Sizes, channels: int, groups: int) -> bool:
    """Whether a group normalisation gives some groups the bits that it gives all of them."""
    # A single channel has no memory format, by which kernels are chosen.
    lone = channels == groups and groups < 2 * len(sizes.lengths)
    return not lone and min(sizes.values) > _LEAST_VALUES


def convolved_alike(call: LayerCall, outer: LayerCall, sizes: Sizes) -> bool:
    """Whether a convolution gives a band, joined with its neighbours' rows, the bits that it gives the whole.

    Args:
        call: the convolution itself.
        outer: the layer that it is in, or itself.
        sizes: the size of that layer's input.
    """
    if len(call.in_shape) == 4:
        # Kernels of 1x1 convolutions order their sums by the picture's size, however large it is.
        pointwise = set(call.setting("kernel_size")) == {1}
        area = sizes.across * min(sizes.lengths)
        return not pointwise and sizes.batch * math.prod(call.in_shape[:2]) * area > _LEAST_VALUES
    kernel, stride = call.setting("kernel_size"), call.setting("stride")
    if kernel[1:] == (1, 1):
        return bool(call.in_shape[1] * kernel[0] <= _FEW_CHANNELS)
    # Float32 clips that are alone and small go by kernels of their own.
    if sizes.itemsize != 4 or sizes.batch > 1 or set(stride) != {1}:
        return True
    frames, padding = call.in_shape[2], call.in_shape[-2] - outer.in_shape[-2]
    if call.kind in _PADDING_THEMSELVES:
        frames, padding = call.out_shape[2] - 1 + kernel[0], kernel[1] - 1
    return bool(call.in_shape[1] * frames * (sizes.rows[0] + padding) > _LEAST_VALUES)
