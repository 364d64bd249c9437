"""Which band each rank holds, and every message: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import landing_moves
from vaepp_sdk.vae.plan import Box, Move, Window, Work, WorkPlan, split_evenly
from vaepp_sdk.vae.trace import LayerTrace
from vaepp_strategies.layers.parts import Part, Parts, Scale
from vaepp_strategies.layers.reach import Reach
from vaepp_strategies.shard_frames import over_frames, traced, window_frames
from vaepp_strategies.shard_front import Front, Repeat, plan_front, with_front
from vaepp_strategies.shard_limit import BlockPlan, RowBlocks, plan_blocks
from vaepp_strategies.shard_memory import BandMemory
from vaepp_strategies.shard_merge import giving_convolutions
from vaepp_strategies.shard_stages import layer_sequence
from vaepp_strategies.shard_steps import ShardStep, ShardSteps, shard_steps
from vaepp_strategies.tile_geometry import Span, lay_frames
from vaepp_strategies.traced_memory import TracedMemory

__all__ = ["ShardPlan", "landing_bytes", "plan_shards"]

_MOMENT_BYTES = 2 * 8
"""A mean and a sum of squared deviations of one group, in float64."""

_SUM_BYTES = 4
"""One float32."""


@attrs.frozen(kw_only=True)
class ShardPlan(WorkPlan):
    """A work plan whose windows are bands without overlap, one for each active rank.

    Attributes:
        parts: the active ranks' bands, in input units.
        steps: what layers exchange, in order; empty where one rank does all the work in one piece.
        given: rows around a layer's output that a later layer reads, by the layer's name.
        input_reach: rows around a band of the input that its first layer reads.
        times: the windows of frames in which the VAE runs a long clip, one after the other; none where it
            runs in one piece.
        blocks: how layers are run in row blocks, or None. No work is repeated by them.
        front: the layers that every rank runs on the whole picture, or None.
    """

    parts: Parts
    steps: tuple[ShardStep, ...]
    given: tuple[tuple[str, Reach], ...]
    input_reach: Reach
    times: tuple[Span, ...] = ()
    blocks: BlockPlan | None = None
    front: Front | None = None


def plan_shards(
    facts: VaeFacts,
    work: Work,
    row_blocks: RowBlocks | None = None,
    repeat: Repeat = "never",
    chained: bool = False,
    fewer_rounds: bool = True,
) -> ShardPlan:
    """Cut the longer side of the latent into bands, and list every message.

    Where a side has fewer rows than the ranks would need, the surplus ranks get no band.

    Args:
        facts: the VAE.
        work: what is asked.
        row_blocks: what is asked of row blocks; None runs layers in one piece.
        repeat: whether ranks run what leads to the attention on their peers' rows too; see `plan_front`.
        chained: whether convolutions of a picture compute rows again instead of exchanging them; see
            `shard_steps`.
        fewer_rounds: whether convolutions of clips may compute rows for the next one, which is some work and
            memory.

    Raises:
        UnsupportedError: the input has the wrong axes or no pixel, or the adapter does not say which layers
            it calls; or its layers cannot be run in row blocks, or not within the limit.
    """
    if facts.layers(work.direction) is None:
        raise UnsupportedError(f"strategy 'shard' takes VAEs whose layers are known; found {facts.vae_class}")
    frames = "frames, " if facts.temporal_ratio else ""
    if len(work.shape) != (5 if frames else 4):
        raise UnsupportedError(
            f"{work.direction} of {facts.vae_class} takes (batch, channels, {frames}rows, columns); found "
            f"shape {work.shape}"
        )
    if frames and row_blocks is not None:
        raise UnsupportedError(f"row_blocks and peak_limit take pictures; {facts.vae_class} takes clips")
    out_shape = facts.out_shape(work.direction, work.shape)
    if 0 in out_shape:
        raise UnsupportedError(f"{work.direction} of shape {work.shape} has no output")
    times = lay_frames(facts, work)
    if times:
        out_shape = (*out_shape[:2], times[-1].place + times[-1].kept, *out_shape[-2:])
    exchanges = _exchanges(facts, work, times, chained)
    parts = _cut(facts, work, exchanges.shortest_band)
    if fewer_rounds and facts.clip_layers is not None and len(parts.parts) > 1:
        giving = giving_convolutions(traced(facts, work.direction), parts)
        merged = _exchanges(facts, work, times, giving=giving)
        # A band has to hold all rows that its neighbours ask for, or that they compute from the input.
        computed = max(merged.input_reach.above, merged.input_reach.below)
        if max(merged.shortest_band, computed) <= min(part.length for part in parts.parts):
            exchanges = merged
    front = plan_front(traced(facts, work.direction), len(parts.parts), work, repeat, dict(exchanges.given))
    if front is not None:
        exchanges = with_front(exchanges, front)
    blocks = None if row_blocks is None else _blocks(facts, work, parts, exchanges, row_blocks)
    plan = ShardPlan(
        strategy="shard",
        work=work,
        windows=tuple(_window(rank, parts, work.shape, out_shape) for rank in range(len(parts.parts))),
        out_shape=out_shape,
        moves=(),
        peak_bytes=_peaks(parts, facts, work, times, exchanges, blocks),
        parts=parts,
        steps=exchanges.steps if len(parts.parts) > 1 or blocks else (),
        given=exchanges.given,
        input_reach=exchanges.input_reach,
        times=times,
        blocks=blocks,
        front=front,
    )
    return attrs.evolve(plan, moves=_moves(plan))


def _exchanges(
    facts: VaeFacts,
    work: Work,
    times: tuple[Span, ...],
    chained: bool = False,
    giving: frozenset[str] = frozenset(),
) -> ShardSteps:
    """What the layers exchange; in each window of frames anew."""
    if facts.clip_layers is None:
        return shard_steps(traced(facts, work.direction), chained)

    def of_clip(trace: LayerTrace) -> ShardSteps:
        return shard_steps(trace, giving=giving)

    frames = window_frames(work, times)
    first = of_clip(traced(facts, work.direction, frames[0]))
    steps = (
        step
        for count in frames
        for step in over_frames(facts, work.direction, count, lambda trace: of_clip(trace).steps)
    )
    return attrs.evolve(first, steps=tuple(steps))


def _cut(facts: VaeFacts, work: Work, shortest: int) -> Parts:
    """Each active rank's band along the longer side of the latent."""
    decoding = work.direction == "decode"
    sides = work.shape[-2:] if decoding else facts.out_shape("encode", work.shape)[-2:]
    axis = -1 if sides[1] > sides[0] else -2
    unit = 1 if decoding else facts.spatial_ratio
    # A last latent of a picture that is no whole number of latents is too short a band of its own.
    whole = min(sides[axis], work.shape[axis] // unit)
    active = max(1, min(work.ranks, whole // -(-shortest // unit)))
    bands = split_evenly(sides[axis], active)
    ends = [(start + size) * unit for start, size in bands[:-1]] + [work.shape[axis]]
    starts = [0, *ends[:-1]]
    return Parts(
        axis,
        tuple(Part(start, end - start, start, end - start) for start, end in zip(starts, ends, strict=True)),
        output=Scale(facts.spatial_ratio, 1) if decoding else Scale(1, facts.spatial_ratio),
        rounds_up=facts.encode_rounds_up and not decoding,
    )


def _window(rank: int, parts: Parts, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> Window:
    part, scale = parts.parts[rank], parts.output
    first, rows = part.start * scale.up // scale.down, parts.core_length(rank, scale)
    if parts.axis == -2:
        source, target = Box(part.start, 0, part.length, in_shape[-1]), Box(first, 0, rows, out_shape[-1])
    else:
        source, target = Box(0, part.start, in_shape[-2], part.length), Box(0, first, out_shape[-2], rows)
    return Window(rank, rank, source, target)


def _moves(plan: ShardPlan) -> tuple[Move, ...]:
    ranks, work = len(plan.windows), plan.work
    exchanged = tuple(
        Move(place, step.kind, source, reader, nbytes)
        for place, step in enumerate(plan.steps)
        for source, reader in _pairs(ranks)
        if (nbytes := _step_bytes(plan, step, source, reader))
    )
    pieces = {window.index: plan.piece_bytes(window) for window in plan.windows}
    return exchanged + landing_moves(plan.windows, pieces, work.output, work.world_size, len(plan.steps))


def _pairs(ranks: int) -> Iterator[tuple[int, int]]:
    return ((source, reader) for source in range(ranks) for reader in range(ranks) if source != reader)


def _step_bytes(plan: ShardPlan, step: ShardStep, source: int, reader: int) -> int:
    """The size of one rank's message to another in one exchange."""
    batch, itemsize = plan.work.shape[0], plan.work.itemsize
    across = plan.parts.rows(plan.work.shape[-1 if plan.parts.axis == -2 else -2], step.scale)
    # The reader below needs this band's last rows, as those above it; the reader above its first ones.
    rows = {source + 1: step.reach.above, source - 1: step.reach.below}.get(reader, 0)
    positions = plan.parts.core_length(source, step.scale) * across if step.width else 0
    values = step.frames * (rows * across * step.channels + positions * step.width)
    return batch * (values * itemsize + step.groups * _MOMENT_BYTES + step.sums * _SUM_BYTES)


def _blocks(facts: VaeFacts, work: Work, parts: Parts, exchanges: ShardSteps, wanted: RowBlocks) -> BlockPlan:
    trace = traced(facts, work.direction)
    steps, given = {step.name: step for step in exchanges.steps}, dict(exchanges.given)
    memories = tuple(
        BandMemory(parts=parts, rank=rank, work=work, steps=steps, given=given)
        for rank in range(len(parts.parts))
    )
    return plan_blocks(layer_sequence(trace), memories, wanted, lambda rank: landing_bytes(facts, work, rank))


def _peaks(
    parts: Parts,
    facts: VaeFacts,
    work: Work,
    times: tuple[Span, ...],
    exchanges: ShardSteps,
    blocks: BlockPlan | None,
) -> tuple[int, ...]:
    """Each rank's live bytes inside its band, or while the pieces land if that is more."""
    idle = tuple(landing_bytes(facts, work, rank) for rank in range(len(parts.parts), work.ranks))
    if blocks is not None:
        return blocks.peaks + idle
    memory = TracedMemory(
        facts=facts, work=work, parts=parts, times=times, steps=exchanges.steps, given=exchanges.given
    )
    ranks = range(len(parts.parts))
    return tuple(max(memory.peak(rank), landing_bytes(facts, work, rank)) for rank in ranks) + idle


def landing_bytes(facts: VaeFacts, work: Work, rank: int) -> int:
    """The whole output, and what has arrived and is not yet written into it, where the output lands."""
    whole = work.landed_bytes(facts.out_shape(work.direction, work.shape))
    return 2 * whole if work.output == "all" or (work.output == "rank0" and rank == 0) else 0
