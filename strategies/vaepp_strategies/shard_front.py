"""The layers before the attention, which a rank runs on its peers' rows too: pure arithmetic.

Attention reads every position. What leads to it from the latent, which all ranks hold, is little work for
many bytes: a rank that computes a few of its peers' positions besides its own band's need not receive them.
The first upsampling behind the attention is then run in less work, which pays for most of that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import LayerTrace
from vaepp_strategies.layers.parts import Parts, Scale
from vaepp_strategies.layers.reach import NO_ROWS, Reach
from vaepp_strategies.shard_stages import Stage, layer_sequence
from vaepp_strategies.shard_steps import ShardSteps, call_window

__all__ = ["Front", "Repeat", "Rows", "layer_work", "plan_front", "window_around", "with_front"]

Repeat = Literal["auto", "never", "always"]

_EXTRA_WORK = 0.023
"""What `auto` lets a rank's work grow by. With the rows at seams, the whole stays within 1.03 of a share."""

_SAVED = 5 / 9
"""The part of its work that `convolve_doubled` saves of a convolution."""

_LEAST_SAVED = 1 / 3
"""The part of the positions' bytes that `auto` must save the rank which sends most, or it repeats nothing."""

Rows = tuple[int, int]
"""A first row, and the one after the last."""


@attrs.frozen(kw_only=True)
class Front:
    """Which rows of the latent each rank runs the layers before the attention on.

    Attributes:
        layers: the names of those layers.
        attention: the attention's name.
        rows: rows of the whole latent along the split axis.
        bands: each active rank's own rows.
        windows: the rows whose positions it computes, its band among them.
        margin: rows beyond a window that are computed from too few neighbours, and dropped.
        doubled: the name of an upsampling behind the attention that runs in less work; empty without one.
    """

    layers: tuple[str, ...]
    attention: str
    rows: int
    bands: tuple[Rows, ...]
    windows: tuple[Rows, ...]
    margin: int
    doubled: str = ""

    @property
    def whole(self) -> bool:
        """Whether every rank computes all positions, so that none travels."""
        return all(window == (0, self.rows) for window in self.windows)

    def held(self, rank: int) -> Rows:
        """The rows of the latent that a rank runs these layers on."""
        start, end = self.windows[rank]
        return max(0, start - self.margin), min(self.rows, end + self.margin)

    def sent(self, source: int, reader: int) -> Rows:
        """The rows of one rank's band that another does not compute itself; they are consecutive.

        A reader's window holds the reader's own band, so of another band it covers one end, or all.
        """
        start, end = self.bands[source]
        first, last = self.windows[reader]
        if reader < source:
            return min(max(start, last), end), end
        return start, max(min(end, first), start)


def plan_front(
    trace: LayerTrace, parts: Parts, work: Work, repeat: Repeat, given: Mapping[str, Reach]
) -> Front | None:
    """Decide how many of its peers' positions each rank computes.

    Args:
        trace: the layers.
        parts: the bands.
        work: what is asked.
        repeat: `always`: all; `auto`: as many as a small share of a rank's work allows; `never`: none.
        given: rows around a layer's output that a later layer reads, by the layer's name.

    Returns:
        None where nothing is to be repeated.

    Raises:
        UnsupportedError: `always` is asked, and no attention follows a few layers at the latent's resolution.
    """
    if repeat == "never" or len(parts.parts) == 1 or work.direction == "encode":
        return None
    stages = _front_stages(trace)
    if not stages and repeat == "always":
        raise UnsupportedError(
            "strategy 'shard' with repeat = 'always' takes decoders with single-head attention after a "
            "straight sequence of layers at the latent's resolution; leave repeat out"
        )
    if not stages:
        return None
    *before, attention = stages
    names = tuple(name for stage in before for name in stage.names)
    convolutions = [call for call in trace.calls if call.name in names and call.kind == "Conv2d"]
    rows = sum(part.length for part in parts.parts)
    front = Front(
        layers=names,
        attention=attention.names[0],
        rows=rows,
        bands=tuple((part.start, part.start + part.length) for part in parts.parts),
        windows=((0, rows),) * len(parts.parts),
        margin=sum(call_window(call).reach.above for call in convolutions),
        doubled=_doubled(trace, given),
    )
    return front if repeat == "always" else _limited(front, trace, work)


def with_front(exchanges: ShardSteps, front: Front) -> ShardSteps:
    """What the layers exchange where those before the attention run on windows."""
    steps = []
    for step in exchanges.steps:
        if step.name not in (*front.layers, front.attention):
            steps.append(step)
        elif not front.whole:
            # A window's own rows are enough for its convolutions: statistics travel alone.
            steps.append(attrs.evolve(step, reach=NO_ROWS, channels=0))
    given = tuple((name, reach) for name, reach in exchanges.given if name not in front.layers)
    return ShardSteps(steps=tuple(steps), given=given, input_reach=NO_ROWS)


def _front_stages(trace: LayerTrace) -> tuple[Stage, ...]:
    """The stages up to the attention, itself included; none where they are no such sequence."""
    try:
        stages = layer_sequence(trace).stages
    except UnsupportedError:
        return ()
    before = tuple(itertools.takewhile(lambda stage: stage.kind != "attention", stages))
    same = all(stage.scale == stage.out_scale == Scale(1, 1) for stage in before)
    plain = all(stage.kind in ("convolution", "residual") for stage in before)
    if not same or not plain or not before or len(before) == len(stages) or not stages[len(before)].groups:
        return ()
    return stages[: len(before) + 1]


def _doubled(trace: LayerTrace, given: Mapping[str, Reach]) -> str:
    """The first upsampling, if it doubles and a plain 3x3 convolution follows that gives a row at most."""
    call = next((call for call in trace.calls if call.kind == "Upsample2D"), None)
    name = "" if call is None else f"{call.name}.conv"
    convolution = next((one for one in trace.calls if one.name == name and one.kind == "Conv2d"), None)
    if call is None or convolution is None or call.out_shape[-2] != 2 * call.in_shape[-2]:
        return ""
    sizes = [convolution.setting(what) for what in ("kernel_size", "stride", "padding")]
    gives = given.get(name, NO_ROWS)
    return call.name if sizes == [(3, 3), (1, 1), (1, 1)] and max(gives.above, gives.below) <= 1 else ""


def _limited(front: Front, trace: LayerTrace, work: Work) -> Front | None:
    """The largest windows that a small share of a rank's work allows; None where they save too little."""
    share = layer_work(trace, work, front.layers) / layer_work(trace, work)
    saved = _SAVED * layer_work(trace, work, (f"{front.doubled}.conv",)) / layer_work(trace, work)
    extra = int((_EXTRA_WORK + saved) * front.rows / (share * len(front.bands)))
    windows = tuple(window_around(band, extra, front) for band in front.bands)
    found = attrs.evolve(front, windows=windows)
    ranks = range(len(front.bands))
    sent = max(sum(_length(found.sent(rank, reader)) for reader in ranks) for rank in ranks)
    most = (len(ranks) - 1) * max(_length(band) for band in front.bands)
    return found if sent <= (1 - _LEAST_SAVED) * most else None


def _length(rows: Rows) -> int:
    return rows[1] - rows[0]


def window_around(band: Rows, extra: int, front: Front) -> Rows:
    """A band and rows around it, at a picture's edge where it reaches one: an edge needs no margin.

    Args:
        band: a rank's own rows.
        extra: rows that it may compute besides, those of margins among them.
        front: the picture's rows, and the margin.
    """
    start, end = band
    length = end - start + extra
    if length >= front.rows:
        return 0, front.rows
    length -= front.margin
    if length >= min(end, front.rows - start):
        return (0, length) if end <= front.rows - start else (front.rows - length, front.rows)
    beside = max(0, (length - front.margin - (end - start)) // 2)
    return start - beside, end + beside


def layer_work(trace: LayerTrace, work: Work, names: tuple[str, ...] | None = None) -> float:
    """Operations for each position of the latent: of convolutions, projections and attention."""
    area = math.prod(trace.in_shape[-2:])
    total = 0.0
    for call in trace.calls:
        if names is not None and call.name not in names:
            continue
        if call.kind == "Conv2d":
            inputs = call.in_shape[1] // call.setting("groups")
            total += 2 * math.prod((*call.setting("kernel_size"), inputs, *call.out_shape)) / area
        elif call.kind == "Linear":
            total += 2 * call.in_shape[-1] * math.prod(call.out_shape) / area
        elif call.kind == "Attention":
            # Scores and means, quadratic in the positions there are, not in those of the trace.
            share = math.prod(call.in_shape[-2:]) / area
            total += 4 * call.in_shape[1] * math.prod(work.shape[-2:]) * share**2
    return total
