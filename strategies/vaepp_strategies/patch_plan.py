"""Which rows each rank decodes, and what must move: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import landing_moves
from vaepp_sdk.vae.plan import Box, Move, Window, Work, WorkPlan, split_evenly
from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Part, Parts, Scale
from vaepp_strategies.patch import Share
from vaepp_strategies.traced_memory import untiled_bytes

__all__ = ["PatchPlan", "SharedCall", "cut", "plan_patches", "shared_calls"]

_STATISTICS_BYTES = 2 * 8
"""A mean and a sum of squared deviations of one group, in float64."""


@attrs.frozen
class SharedCall:
    """One call of a layer that looks at the whole picture.

    Attributes:
        name: the layer's name in the VAE.
        kind: `statistics` or `kv`.
        width: groups of the normalisation, or features of a key.
        scale: the resolution of the layer's input.
    """

    name: str
    kind: str
    width: int
    scale: Scale


@attrs.frozen(kw_only=True)
class PatchPlan(WorkPlan):
    """A work plan whose windows are bands of rows, or of columns, one for each active rank.

    Attributes:
        parts: what each active rank holds and owns, in input units.
        shared: the layers that exchange, in the order in which they do; empty where nothing is shared.
    """

    parts: Parts
    shared: tuple[SharedCall, ...]

    def crop(self, window: Window) -> tuple[slice, slice]:
        """Where a window's core stands in the window's own output."""
        top, left = (self._output_unit(start) for start in (window.source.top, window.source.left))
        return attrs.evolve(window.target, top=window.target.top - top, left=window.target.left - left).slices

    def _output_unit(self, start: int) -> int:
        """A window's first row or column, in output units; windows start at whole latents."""
        scale = self.parts.output
        return start * scale.up // scale.down


def plan_patches(facts: VaeFacts, work: Work, halo: int | None, share: Share) -> PatchPlan:
    """Cut the longer side of the latent, and list every message.

    Where there are fewer latent rows than ranks, the surplus ranks get no window.

    Args:
        facts: the VAE.
        work: what is asked.
        halo: context on each side of a core, in latent rows; None is what was measured for the VAE class.
        share: what the ranks exchange.

    Raises:
        UnsupportedError: the input has a frame axis or no pixel, or the adapter does not say which layers
            exchange.
    """
    _refuse(facts, work)
    parts = cut(facts, work, facts.context if halo is None else halo)
    out_shape = facts.out_shape(work.direction, work.shape)
    windows = tuple(_window(rank, parts, work.shape, out_shape) for rank in range(len(parts.parts)))
    trace = facts.layers(work.direction)
    sharing = share != "none" and len(windows) > 1 and trace is not None
    plan = PatchPlan(
        strategy="patch",
        work=work,
        windows=windows,
        out_shape=out_shape,
        moves=(),
        peak_bytes=(),
        parts=parts,
        shared=shared_calls(trace) if sharing and trace is not None else (),
    )
    return attrs.evolve(plan, moves=_moves(plan), peak_bytes=_peaks(plan, facts))


def _refuse(facts: VaeFacts, work: Work) -> None:
    if len(work.shape) != 4 or facts.temporal_ratio:
        raise UnsupportedError(
            f"strategy 'patch' takes pictures, (batch, channels, rows, columns); found shape {work.shape}"
        )
    if 0 in facts.out_shape(work.direction, work.shape):
        raise UnsupportedError(f"{work.direction} of shape {work.shape} has no output")


def cut(facts: VaeFacts, work: Work, halo: int) -> Parts:
    """Each active rank's core and window along the longer side of the latent, in input units."""
    decoding = work.direction == "decode"
    sides = work.shape[-2:] if decoding else facts.out_shape("encode", work.shape)[-2:]
    axis = -1 if sides[1] > sides[0] else -2
    latents, length = sides[axis], work.shape[axis]
    unit = 1 if decoding else facts.spatial_ratio

    def part(start: int, size: int) -> Part:
        end, core_start = start + size, start * unit
        # The last core reaches the end of a picture that is no whole number of latents.
        core_end = length if end == latents else end * unit
        stop = length if end + halo >= latents else (end + halo) * unit
        before = max(halo, 1) if core_end - core_start < unit else halo
        first = max(0, start - before) * unit
        return Part(first, stop - first, core_start, core_end - core_start)

    ratio = facts.spatial_ratio
    return Parts(
        axis,
        tuple(part(start, size) for start, size in split_evenly(latents, work.ranks)),
        output=Scale(ratio, 1) if decoding else Scale(1, ratio),
        rounds_up=facts.encode_rounds_up and not decoding,
    )


def _window(rank: int, parts: Parts, in_shape: Sequence[int], out_shape: Sequence[int]) -> Window:
    """One rank's band, over the whole of the other side."""
    part = parts.parts[rank]
    scale = parts.output
    first = part.core_start * scale.up // scale.down
    rows = parts.core_length(rank, scale)
    if parts.axis == -2:
        source = Box(part.start, 0, part.length, in_shape[-1])
        return Window(rank, rank, source, Box(first, 0, rows, out_shape[-1]))
    source = Box(0, part.start, in_shape[-2], part.length)
    return Window(rank, rank, source, Box(0, first, out_shape[-2], rows))


def shared_calls(trace: LayerTrace) -> tuple[SharedCall, ...]:
    """The layers of a decode or encode that look at the whole picture, in the order in which they exchange.

    Attention exchanges keys and values after its own normalisation, which it calls.
    """
    calls = [_shared(trace, call) for call in trace.calls]
    order = []
    for index, shared in enumerate(calls):
        if shared is not None:
            inner = [place for place, call in enumerate(trace.calls) if call.inside == index and calls[place]]
            order.append((max([index, *inner]), index, shared))
    return tuple(shared for _, _, shared in sorted(order, key=lambda item: (item[0], -item[1])))


def _shared(trace: LayerTrace, call: LayerCall) -> SharedCall | None:
    """What a call exchanges, or None. Statistics have the same size at every resolution."""
    if call.kind == "GroupNorm":
        return SharedCall(call.name, "statistics", int(call.setting("num_groups")), Scale(1, 1))
    if call.kind == "Attention":
        scale = Scale.between(trace.in_shape[-2], call.in_shape[-2])
        return SharedCall(call.name, "kv", int(call.setting("inner_kv_dim")), scale)
    return None


def _moves(plan: PatchPlan) -> tuple[Move, ...]:
    exchanged = tuple(
        Move(place, call.kind, source, reader, _exchanged_bytes(plan, call, source))
        for place, call in enumerate(plan.shared)
        for source, reader in _pairs(len(plan.windows))
    )
    pieces = {window.index: plan.piece_bytes(window) for window in plan.windows}
    work = plan.work
    landing = landing_moves(plan.windows, pieces, work.output, work.world_size, len(plan.shared))
    return exchanged + landing


def _pairs(ranks: int) -> Iterator[tuple[int, int]]:
    return ((source, reader) for source in range(ranks) for reader in range(ranks) if source != reader)


def _exchanged_bytes(plan: PatchPlan, call: SharedCall, source: int) -> int:
    """The size of one rank's message to one other rank."""
    batch = plan.work.shape[0]
    if call.kind == "statistics":
        return batch * call.width * _STATISTICS_BYTES
    across = plan.parts.rows(plan.work.shape[-1 if plan.parts.axis == -2 else -2], call.scale)
    positions = plan.parts.core_length(source, call.scale) * across
    return 2 * batch * positions * call.width * plan.work.itemsize


def _peaks(plan: PatchPlan, facts: VaeFacts) -> tuple[int, ...]:
    idle = plan.work.ranks - len(plan.windows)
    return tuple(_peak(plan, facts, rank) for rank in range(len(plan.windows))) + (0,) * idle


def _peak(plan: PatchPlan, facts: VaeFacts, rank: int) -> int:
    """A rank's live bytes inside its window, or while the pieces land if that is more."""
    work, window = plan.work, plan.windows[rank]
    running = untiled_bytes(facts, attrs.evolve(work, shape=window.source.shape_in(work.shape)))
    landed = work.output == "all" or (work.output == "rank0" and rank == 0)
    whole = work.landed_bytes(plan.out_shape) if landed else 0
    # The whole output, and what has arrived and is not yet written into it.
    return max(running, 2 * whole)
