"""Which activations are computed again instead of stored, and the work that takes: pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from vaepp_sdk.vae.plan import Work
from vaepp_strategies.layers.parts import Parts, Scale
from vaepp_strategies.shard_stages import Sequence, Stage

__all__ = ["leaner_sequences", "sequence_work"]

Floor = Callable[[Stage], int]
"""The bytes of a stage that is run in as many blocks as it has rows."""


def leaner_sequences(sequence: Sequence, floor: Floor) -> Iterator[Sequence]:
    """The sequence as it is, and then ever leaner ones; each does more work than the one before.

    Each next one changes the stage that holds most, for no other change lowers the peak.

    Args:
        sequence: the layers; nothing is computed again.
        floor: what a stage holds at the least.
    """
    yield sequence
    floors = [floor(stage) for stage in sequence.stages]
    stages = _leaner(sequence.stages, floors.index(max(floors)), floor)
    if stages is not None:
        yield from leaner_sequences(attrs.evolve(sequence, stages=stages), floor)


def _leaner(stages: tuple[Stage, ...], place: int, floor: Floor) -> tuple[Stage, ...] | None:
    """The stages with one that holds less at this place; None where nothing makes it hold less."""
    stage, first = stages[place], place
    if stage.kind == "residual" and place and stages[place - 1].kind == "upsample":
        first = place - 1
    after = stages[first + 1] if first + 1 < len(stages) else stage
    if stages[first].kind == "upsample" and after.kind == "residual" and after.alike:
        changed = attrs.evolve(after, recompute="kept" if after.shortcut else "input", source=stages[first])
        last = first + 1
    elif stage.recompute == "kept":
        changed, last = attrs.evolve(stage, recompute="input"), place
    elif stage.kind == "residual" and stage.recompute == "nothing" and stage.in_place and place:
        changed, last = attrs.evolve(stage, recompute="hidden"), place
    else:
        return None
    if floor(changed) >= max(floor(old) for old in stages[first : last + 1]):
        return None
    return (*stages[:first], changed, *stages[last + 1 :])


def sequence_work(sequence: Sequence, parts: Parts, work: Work) -> int:
    """The floating point operations of convolutions and attention, on all ranks together."""
    across = work.shape[-1 if parts.axis == -2 else -2]

    def positions(scale: Scale) -> int:
        return parts.rows(work.shape[parts.axis], scale) * parts.rows(across, scale)

    return sum(work.shape[0] * _stage_work(stage, positions) for stage in sequence.stages)


def _stage_work(stage: Stage, positions: Callable[[Scale], int]) -> int:
    count, wide = positions(stage.out_scale), stage.out_channels
    if stage.kind == "attention":
        return 8 * count * wide**2 + 4 * count**2 * wide
    assert stage.window is not None, "a stage that is no attention has a convolution"
    taps = 2 * count * stage.window.kernel**2
    first = taps * stage.channels * wide
    if stage.kind != "residual":
        return first
    second, shortcut = taps * wide * wide, 2 * count * stage.channels * wide if stage.shortcut else 0
    again = {"nothing": 0, "hidden": 1, "kept": 2, "input": 3}[stage.recompute]
    if stage.source is not None:
        return first + second + shortcut + again * _stage_work(stage.source, positions)
    return first + second + shortcut + again * first
