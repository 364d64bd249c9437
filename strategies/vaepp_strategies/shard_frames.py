"""Lists what happens in each call of a clip's layers without tracing the whole clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from vaepp_sdk.vae.facts import Direction, VaeFacts
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import LayerTrace
from vaepp_strategies.tile_geometry import Span

__all__ = ["over_frames", "traced", "window_frames"]

Step = TypeVar("Step")


def window_frames(work: Work, times: Sequence[Span]) -> list[int]:
    """Frames of the input in each window in which a VAE runs it, one after the other; 0 for a picture.

    Args:
        work: what is asked.
        times: the windows of a long clip; none where it runs in one piece.
    """
    return [span.length for span in times] or [work.shape[2] if len(work.shape) == 5 else 0]


def traced(facts: VaeFacts, direction: Direction, frames: int = 0) -> LayerTrace:
    """The layers of one direction, which are known, for a clip of so many frames; pictures have none.

    Of a long clip whose class calls the same layers again and again, only the first frames are traced.
    """
    layers = facts.clip_layers
    if layers is not None and frames:
        enough, chunk = layers.frames(direction)
        if chunk and frames > enough:
            # The first chunk takes what is left over, or drops it.
            frames = enough + (frames - enough) % chunk
    trace = facts.layers(direction, frames)
    assert trace is not None, "the layers are known"
    return trace


def over_frames(
    facts: VaeFacts, direction: Direction, frames: int, steps_of: Callable[[LayerTrace], tuple[Step, ...]]
) -> tuple[Step, ...]:
    """The steps of a clip's layers: those of the traced frames, and the last chunk's as often as it runs.

    Args:
        facts: the VAE; its layers are known.
        direction: decode or encode.
        frames: input frames of the clip; 0 for pictures.
        steps_of: the steps of the layers of some frames, in order.
    """
    first = steps_of(traced(facts, direction, frames))
    enough, chunk = (0, 0) if facts.clip_layers is None else facts.clip_layers.frames(direction)
    if not chunk or frames <= enough:
        return first
    less = steps_of(traced(facts, direction, enough + (frames - enough) % chunk - chunk))
    assert first[: len(less)] == less, "a chunk does not depend on those after it"
    return first + first[len(less) :] * ((frames - enough) // chunk)
