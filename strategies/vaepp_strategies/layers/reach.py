"""How far layers look along the split axis: pure arithmetic."""

from __future__ import annotations

import attrs

__all__ = ["DOWNSAMPLE_WINDOW", "NO_ROWS", "SHORT_BAND", "Reach", "Window", "rows_before"]


@attrs.frozen
class Reach:
    """How many rows beyond its band a layer reads: above its first row and below its last."""

    above: int = 0
    below: int = 0

    def __bool__(self) -> bool:
        return bool(self.above or self.below)

    def joined(self, other: Reach) -> Reach:
        """Enough for both."""
        return Reach(max(self.above, other.above), max(self.below, other.below))

    def __add__(self, other: Reach) -> Reach:
        return Reach(self.above + other.above, self.below + other.below)


NO_ROWS = Reach()

SHORT_BAND = 128
"""The most rows of a clip's band that waits for its neighbours': two of more, computed twice, are 1.6 %."""


@attrs.frozen
class Window:
    """A convolution along the split axis.

    Attributes:
        kernel: rows it reads for one row of its output.
        stride: rows from one output row to the next; bands start at multiples of it.
        lead: rows of zero padding before the first row.
        trail: rows of zero padding after the last row.
    """

    kernel: int
    stride: int
    lead: int
    trail: int

    @property
    def reach(self) -> Reach:
        """The neighbours' rows that a band in the middle of the picture needs."""
        return Reach(self.lead, max(0, self.kernel - self.lead - self.stride))

    @property
    def pointwise(self) -> bool:
        """Whether each output position depends on the input at that position alone."""
        return self.kernel == 1 and self.stride == 1


DOWNSAMPLE_WINDOW = Window(kernel=3, stride=2, lead=0, trail=1)
"""The convolution of diffusers' `Downsample2D` with padding 0: it pads one row at the end itself."""


def rows_before(reach: Reach, factor: int) -> Reach:
    """The rows before upsampling by `factor` that give `reach` rows after it."""
    return Reach(-(-reach.above // factor), -(-reach.below // factor))
