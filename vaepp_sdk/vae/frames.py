"""The frame axis of video VAEs: how many frames come out, and how a class cuts long clips in time."""

from __future__ import annotations

from typing import Literal, Protocol

import attrs

from vaepp_sdk.errors import UnsupportedError

__all__ = ["Direction", "FirstFrameAlone", "FrameRule", "TimeTiles"]

Direction = Literal["decode", "encode"]


class FrameRule(Protocol):
    """How many frames a VAE returns; plain data, so that equal VAEs have equal rules."""

    def out_frames(self, direction: Direction, frames: int) -> int:
        """Frames of the output for `frames` of the input.

        Raises:
            UnsupportedError: the VAE cannot take this many.
        """
        ...


@attrs.frozen
class FirstFrameAlone:
    """The first picture has a latent of its own; every further latent stands for `ratio` pictures.

    Attributes:
        ratio: pictures per latent.
        whole: True where encode takes only clips of whole latents, False where it drops the rest.
    """

    ratio: int
    whole: bool = False

    def out_frames(self, direction: Direction, frames: int) -> int:
        """See `FrameRule.out_frames`."""
        if direction == "decode":
            return 1 + (frames - 1) * self.ratio
        latents, rest = divmod(frames - 1, self.ratio)
        if self.whole and rest:
            near = frames - rest
            raise UnsupportedError(
                f"a clip of {frames} frames cannot be encoded: it takes 1 + a multiple of {self.ratio} "
                f"frames; nearest: {near} or {near + self.ratio}"
            )
        return 1 + latents


@attrs.frozen(kw_only=True)
class TimeTiles:
    """How a class cuts a long clip into overlapping windows of frames, before it cuts rows and columns.

    A window reads one frame more than `tile`; of every window but the first, one output frame is dropped.

    Attributes:
        tile: a window's frames, in input units; clips of more are cut.
        step: from one window's start to the next, in input units.
        blend: how many frames neighbours are blended over, in output units.
        keep: how many frames of each window stay, one more of the first, in output units.
        drops: the output frame that is dropped.
    """

    tile: int
    step: int
    blend: int
    keep: int
    drops: Literal["first", "last"] = "first"
