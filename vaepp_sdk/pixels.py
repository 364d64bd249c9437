"""Pictures as 8-bit values before they travel: a half or a quarter of the bytes, and the same files."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from vaepp_sdk.nonfinite import BLACK, bad_region

__all__ = ["PixelFinish"]


@attrs.define(eq=False)
class PixelFinish:
    """Turns the pieces that a rank has decoded into pixels; see `vaepp_sdk.parallel.view.Finish`.

    Only floating point values can be not finite, so the rank that made them looks, and paints those black.

    Attributes:
        convert: the pipeline's own conversion of a sample, `to_pixels` of a `PixelStages`.
        bad: how many values were not finite since the last `reset`.
        region: where the first of them are, in the whole picture.
    """

    convert: Callable[[torch.Tensor], torch.Tensor]
    bad: int = 0
    region: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of what lands."""
        return torch.uint8

    def reset(self) -> None:
        """Begin with another decode."""
        self.bad, self.region = 0, ""

    def __call__(self, values: torch.Tensor, top: int, left: int) -> torch.Tensor:
        """The pixels of one piece.

        Args:
            values: the piece, as the VAE gives it.
            top: the row at which it stands in the whole picture.
            left: likewise, its column.
        """
        bad = ~torch.isfinite(values)
        found = int(bad.sum())
        if found:
            self.region = self.region or bad_region(bad, top, left)
            self.bad += found
            values = values.masked_fill(bad, BLACK)
        return self.convert(values)
