"""How `deterministic = "reference"` runs each layer, from a trace of the calls: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import attrs

from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import INPUT, LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Parts, Scale
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, NO_ROWS, Reach
from vaepp_strategies.shard_kinds import COVERING
from vaepp_strategies.shard_steps import call_scale, call_source, call_window

__all__ = ["ReferenceLayer", "reference_layers"]

How = Literal["whole", "channels", "rows", "band"]

_LEAST_VALUES = 20480
"""Bands of no more values are convolved by other kernels than larger pictures: torch counts them so."""

_STRIDE = 64
"""Values of two of the widest vector registers: behind the last multiple a scalar exponential is used."""

_EXACT = frozenset({"add", "alias", "clamp", "clone", "detach", "div", "mul", "neg", "relu", "relu_", "sub"})
"""Operators that round correctly, so that vectors and scalars agree to the last bit."""


@attrs.frozen(kw_only=True)
class ReferenceLayer:
    """One call of a layer of which some call does not run on the band as it is.

    Attributes:
        name: the layer's name in the VAE.
        how: `whole`: on the whole picture, on every rank. `channels`: on some channels of the whole picture.
            `rows`: on the band and the rows of `reach` around it. `band`: on the band as it is.
        scale: the resolution of its input.
        out_scale: the resolution of its output.
        channels: channels of its input.
        groups: groups of channels that stay together.
        reach: the rows that it reads of its neighbours.
        known: every rank holds its whole input already, so that nothing moves.
        kept: a later layer reads its whole output.
    """

    name: str
    how: How
    scale: Scale
    out_scale: Scale
    channels: int
    groups: int = 1
    reach: Reach = NO_ROWS
    known: bool = False
    kept: bool = False


def reference_layers(trace: LayerTrace, parts: Parts, work: Work) -> tuple[ReferenceLayer, ...]:
    """Decide how each call runs; layers that are left out run on the band as they are, at every call."""
    found: dict[int, ReferenceLayer] = {}
    read: set[int] = set()
    for index, call in _calls(trace):
        source = call_source(trace, index)
        known = source == INPUT or (source in found and found[source].how == "whole")
        how = _how(trace, index, known, parts, work)
        known = known and how in ("whole", "rows")
        if known:
            read.add(source)
        found[index] = ReferenceLayer(
            name=call.name,
            how=how,
            scale=call_scale(trace, index),
            out_scale=_out_scale(trace, index),
            channels=call.in_shape[1],
            groups=int(call.setting("num_groups", 1)),
            reach=_reach(call) if how == "rows" else NO_ROWS,
            known=known,
        )
    names = {layer.name for layer in found.values() if layer.how != "band"}
    return tuple(
        attrs.evolve(layer, kept=index in read) for index, layer in found.items() if layer.name in names
    )


def _calls(trace: LayerTrace) -> Iterator[tuple[int, LayerCall]]:
    """Every call, less those that a layer which runs as a whole makes."""
    covered: set[int] = set()
    for index, call in enumerate(trace.calls):
        if call.inside in covered or (call.inside >= 0 and trace.calls[call.inside].kind in COVERING):
            covered.add(index)
        else:
            yield index, call


def _how(trace: LayerTrace, index: int, known: bool, parts: Parts, work: Work) -> How:
    call = trace.calls[index]
    scale = call_scale(trace, index)
    if call.kind == "Attention":
        return "whole"
    if call.kind in ("Conv2d", "Downsample2D"):
        # Kernels of 1x1 convolutions order their sums by the picture's size, however large it is.
        pointwise = call.kind == "Conv2d" and call_window(call).pointwise
        return "whole" if pointwise or min(_sizes(call, scale, parts, work)) <= _LEAST_VALUES else "rows"
    if call.kind == "GroupNorm":
        channels, groups = call.in_shape[1], int(call.setting("num_groups"))
        # A single channel has no memory format, by which kernels are chosen.
        lone = channels // groups == 1 and groups < 2 * len(parts.parts)
        small = min(_sizes(call, scale, parts, work)) <= _LEAST_VALUES
        return "whole" if known or small or lone else "channels"
    if _leaf(trace, index) and call.operators and not _EXACT.issuperset(call.operators):
        uneven = any(size % _STRIDE for size in _sizes(call, scale, parts, work))
        return "whole" if known or uneven else "band"
    return "band"


def _leaf(trace: LayerTrace, index: int) -> bool:
    """Whether a call computes by itself; upsampling copies."""
    if trace.calls[index].kind in ("Upsample", "Upsample2D"):
        return False
    return all(other.inside != index for other in trace.calls[index + 1 :])


def _sizes(call: LayerCall, scale: Scale, parts: Parts, work: Work) -> list[int]:
    """The values of every rank's band of a call's input."""
    across = parts.rows(work.shape[-1 if parts.axis == -2 else -2], scale)
    each = math.prod((work.shape[0], call.in_shape[1], across))
    return [each * parts.core_length(rank, scale) for rank in range(len(parts.parts))]


def _reach(call: LayerCall) -> Reach:
    if call.kind == "Downsample2D":
        return DOWNSAMPLE_WINDOW.reach
    return call_window(call).reach if call.kind == "Conv2d" else NO_ROWS


def _out_scale(trace: LayerTrace, index: int) -> Scale:
    call, scale = trace.calls[index], call_scale(trace, index)
    if call.kind == "Attention" or len(call.out_shape) != len(trace.in_shape):
        return scale
    rows, whole = call.out_shape[-2], trace.in_shape[-2]
    return Scale(rows // whole, 1) if rows >= whole else Scale(1, whole // rows)
