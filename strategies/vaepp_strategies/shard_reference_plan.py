"""The plan of `deterministic = "reference"`: bands, how layers run, every message: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import landing_moves
from vaepp_sdk.vae.plan import Move, Work, WorkPlan
from vaepp_strategies.layers.parts import Parts
from vaepp_strategies.layers.reference import channel_shares
from vaepp_strategies.reference_layers import (
    ReferenceLayer,
    ReferenceStep,
    reference_layers,
    reference_steps,
)
from vaepp_strategies.reference_memory import ReferenceMemory
from vaepp_strategies.shard_frames import over_frames, traced, window_frames
from vaepp_strategies.shard_plan import ShardPlan, plan_shards
from vaepp_strategies.tile_geometry import Span

__all__ = ["ReferencePlan", "plan_reference"]


@attrs.frozen(kw_only=True)
class ReferencePlan(WorkPlan):
    """A work plan of bands in which every layer gives the very bits of the untiled picture or clip.

    Attributes:
        parts: the active ranks' bands, in input units.
        times: the windows of frames in which the VAE runs a long clip; see `ShardPlan`.
        layers: the layers that do not run on a band as they are; empty where one rank does all the work.
        steps: what layers exchange, in order.
    """

    parts: Parts
    times: tuple[Span, ...]
    layers: tuple[ReferenceLayer, ...]
    steps: tuple[ReferenceStep, ...]

    @property
    def exchanges(self) -> int:
        """How many exchanges there are before the output lands."""
        return sum(step.rounds for step in self.steps)


def plan_reference(facts: VaeFacts, work: Work) -> ReferencePlan:
    """Cut bands as the plain mode does, and decide how each layer keeps its bits.

    Where every layer would run whole on every rank, one rank runs them all.

    Args:
        facts: the VAE.
        work: what is asked.

    Raises:
        UnsupportedError: as the plain mode.
    """
    # Layers that are replaced here exchange on their own.
    plain = plan_shards(facts, work, fewer_rounds=False)
    layers = _layers(facts, work, plain)
    if not layers:
        plain = plan_shards(facts, attrs.evolve(work, ranks=1), fewer_rounds=False)
    idle = (0,) * (work.ranks - len(plain.peak_bytes))
    memory = ReferenceMemory(facts=facts, work=work, plain=plain, layers=layers)
    plan = ReferencePlan(
        strategy=plain.strategy,
        work=work,
        windows=plain.windows,
        out_shape=plain.out_shape,
        moves=(),
        peak_bytes=memory.peaks() + idle,
        parts=plain.parts,
        times=plain.times,
        layers=tuple(layers.values()),
        steps=tuple(
            step
            for frames in window_frames(work, plain.times)
            for step in over_frames(
                facts, work.direction, frames, lambda trace: reference_steps(trace, layers)
            )
        ),
    )
    return attrs.evolve(plan, moves=_moves(plan))


def _layers(facts: VaeFacts, work: Work, plain: ShardPlan) -> dict[str, ReferenceLayer]:
    """How layers run; none where one rank should run them all."""
    latent = work.shape if work.direction == "decode" else plain.out_shape
    # In a strip one latent wide, one row has no memory format, by which kernels are chosen.
    if len(plain.windows) == 1 or 1 in latent[-2:]:
        return {}
    traces = [
        traced(facts, work.direction, frames) for frames in sorted(set(window_frames(work, plain.times)))
    ]
    layers = reference_layers(traces, work.direction, plain.parts, work)
    return layers if any(layer.how in ("channels", "rows") for layer in layers.values()) else {}


def _moves(plan: ReferencePlan) -> tuple[Move, ...]:
    work, pieces = plan.work, {window.index: plan.piece_bytes(window) for window in plan.windows}
    landing = landing_moves(plan.windows, pieces, work.output, work.world_size, plan.exchanges)
    return (*_exchanged(plan), *landing)


def _exchanged(plan: ReferencePlan) -> Iterator[Move]:
    ranks, place = len(plan.windows), 0
    for step in plan.steps:
        for turn in range(step.rounds):
            for source in range(ranks):
                for reader in range(ranks):
                    kind, values = _values(plan, step, turn, source, reader)
                    if source != reader and values:
                        yield Move(place, kind, source, reader, values * plan.work.itemsize)
            place += 1


def _values(plan: ReferencePlan, step: ReferenceStep, turn: int, source: int, reader: int) -> tuple[str, int]:
    """What one rank sends another in one exchange, and how many values it has."""
    parts, shape, layer = plan.parts, plan.work.shape, step.layer
    across = shape[0] * step.frames * parts.rows(shape[-1 if parts.axis == -2 else -2], layer.scale)
    if layer.how in ("join", "whole"):
        return "whole", across * parts.core_length(source, layer.scale) * step.channels
    if layer.how == "rows":
        rows = {source + 1: layer.reach.above, source - 1: layer.reach.below}.get(reader, 0)
        return "halo", across * rows * step.channels
    shares = channel_shares(step.channels, step.groups, len(plan.windows))
    band, channels = (source, reader) if turn == 0 else (reader, source)
    kind = "whole channels" if turn == 0 else "normalised bands"
    return kind, across * parts.core_length(band, layer.scale) * shares[channels][1]
