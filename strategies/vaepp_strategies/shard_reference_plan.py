"""The plan of `deterministic = "reference"`: bands, how layers run, every message: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import landing_moves
from vaepp_sdk.vae.plan import Move, Work, WorkPlan
from vaepp_strategies.layers.parts import Parts
from vaepp_strategies.layers.reference import channel_shares
from vaepp_strategies.reference_layers import ReferenceLayer, reference_layers
from vaepp_strategies.shard_plan import plan_shards

__all__ = ["ReferencePlan", "plan_reference"]


@attrs.frozen(kw_only=True)
class ReferencePlan(WorkPlan):
    """A work plan of bands in which every layer gives the untiled picture's very bits.

    Attributes:
        parts: the active ranks' bands, in input units.
        layers: how layers run, by call; empty where one rank does all the work.
        exchanges: how many exchanges there are before the output lands.
    """

    parts: Parts
    layers: tuple[ReferenceLayer, ...]
    exchanges: int


def plan_reference(facts: VaeFacts, work: Work) -> ReferencePlan:
    """Cut bands as the plain mode does, and decide how each layer keeps its bits.

    Where every layer would run whole on every rank, one rank runs them all.

    Args:
        facts: the VAE.
        work: what is asked.

    Raises:
        UnsupportedError: as the plain mode, or a layer's calls would have to run differently.
    """
    plain = plan_shards(facts, work)
    trace = facts.layers(work.direction)
    assert trace is not None, "a plan was made from the layers"
    layers = reference_layers(trace, plain.parts, work)
    # In a strip one latent wide, one row has no memory format, by which kernels are chosen.
    latent = work.shape if work.direction == "decode" else plain.out_shape
    if 1 in latent[-2:] or not any(layer.how in ("channels", "rows") for layer in layers):
        plain, layers = plan_shards(facts, attrs.evolve(work, ranks=1)), ()
    shared = len(plain.windows) > 1
    layers = layers if shared else ()
    idle = (0,) * (work.ranks - len(plain.peak_bytes))
    plan = ReferencePlan(
        strategy=plain.strategy,
        work=work,
        windows=plain.windows,
        out_shape=plain.out_shape,
        moves=(),
        # A normalisation holds its input and output twice over: as bands, and as whole channels.
        peak_bytes=tuple((2 if shared else 1) * peak for peak in plain.peak_bytes) + idle,
        parts=plain.parts,
        layers=layers,
        exchanges=sum(_rounds(layer) for layer in layers),
    )
    return attrs.evolve(plan, moves=_moves(plan))


def _rounds(layer: ReferenceLayer) -> int:
    if layer.known or layer.how == "band":
        return 0
    return 2 if layer.how == "channels" else 1


def _moves(plan: ReferencePlan) -> tuple[Move, ...]:
    work, pieces = plan.work, {window.index: plan.piece_bytes(window) for window in plan.windows}
    landing = landing_moves(plan.windows, pieces, work.output, work.world_size, plan.exchanges)
    return (*_exchanged(plan), *landing)


def _exchanged(plan: ReferencePlan) -> Iterator[Move]:
    ranks, place = len(plan.windows), 0
    for layer in plan.layers:
        for step in range(_rounds(layer)):
            for source in range(ranks):
                for reader in range(ranks):
                    kind, values = _values(plan, layer, step, source, reader)
                    if source != reader and values:
                        yield Move(place, kind, source, reader, values * plan.work.itemsize)
            place += 1


def _values(
    plan: ReferencePlan, layer: ReferenceLayer, step: int, source: int, reader: int
) -> tuple[str, int]:
    """What one rank sends another in one exchange, and how many values it has."""
    parts, shape = plan.parts, plan.work.shape
    across = shape[0] * parts.rows(shape[-1 if parts.axis == -2 else -2], layer.scale)
    if layer.how == "whole":
        return "whole picture", across * parts.core_length(source, layer.scale) * layer.channels
    if layer.how == "rows":
        rows = {source + 1: layer.reach.above, source - 1: layer.reach.below}.get(reader, 0)
        return "halo", across * rows * layer.channels
    shares = channel_shares(layer.channels, layer.groups, len(plan.windows))
    band, channels = (source, reader) if step == 0 else (reader, source)
    kind = "whole channels" if step == 0 else "normalised bands"
    return kind, across * parts.core_length(band, layer.scale) * shares[channels][1]
