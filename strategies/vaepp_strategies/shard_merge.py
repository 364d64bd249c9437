"""Which convolutions of a clip compute rows beyond their band, so that the next one needs no message.

A residual block of a video VAE without statistics is two convolutions with nothing between them that looks
at neighbours. Where the first is given two rows instead of one, and computes one more itself, the second has
what it reads: half the messages, for a little work and memory at the seams.
"""

from __future__ import annotations

import math
from collections import defaultdict

import attrs

from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Parts
from vaepp_strategies.layers.reach import Window
from vaepp_strategies.shard_kinds import CLIP_CONVOLUTIONS, HOLDING_CONVOLUTIONS
from vaepp_strategies.shard_steps import call_source, fetches_for, passes_through, visible_calls
from vaepp_strategies.shard_windows import holding_call, window_of

__all__ = ["giving_convolutions"]

_EXTRA_WORK = 0.012
"""What a rank's work may grow by. With rows that long bands compute twice, the whole stays within 1.03."""

_EXTRA_PEAK = 0.015
"""What a rank's peak may grow by, likewise."""

_READ_COPIES, _GIVEN_COPIES, _KEPT_FRAMES = 4, 2, 2
"""Copies of a further row that a layer reads and of one that it computes, and frames kept of both.

As `traced_memory` counts them.
"""


@attrs.frozen
class _Cost:
    """What a row above the band and one below it add: multiplications, and values alive."""

    work: float
    running: float
    kept: float


def giving_convolutions(trace: LayerTrace, parts: Parts) -> frozenset[str]:
    """The names of such convolutions: the cheapest ones that little work, and little memory, allows.

    Args:
        trace: the layers of a clip.
        parts: the bands.
    """
    work, costs = _costs(trace)
    # The shortest band's share of the whole; with two bands, each has rows on one side only.
    share = min(part.length for part in parts.parts) / trace.in_shape[-2] / min(1, (len(parts.parts) - 1) / 2)
    work_left, peak_left, found = _EXTRA_WORK * work * share, _EXTRA_PEAK * trace.peak * share, set()
    for name, cost in sorted(costs.items(), key=lambda item: item[1].work):
        if cost.work > work_left:
            break
        if cost.kept + cost.running <= peak_left:
            work_left, peak_left = work_left - cost.work, peak_left - cost.kept
            found.add(name)
    return frozenset(found)


def _costs(trace: LayerTrace) -> tuple[int, dict[str, _Cost]]:
    """The multiplications of all convolutions, and what those cost whose output another one reads."""
    calls: dict[str, list[int]] = defaultdict(list)
    leads: dict[str, int] = {}
    for index, call in visible_calls(trace):
        if call.kind == "Conv2d" or call.kind in CLIP_CONVOLUTIONS:
            calls[call.name].append(index)
            giver = _before(trace, index)
            if giver is not None:
                leads[trace.calls[giver].name] = window_of(trace, index).lead
    work = {name: sum(_work(trace, index) for index in found) for name, found in calls.items()}
    return sum(work.values()), {
        name: _cost(trace.calls[calls[name][-1]], 2 * lead, work[name], len(calls[name]) > 1)
        for name, lead in leads.items()
    }


def _cost(call: LayerCall, rows: int, work: int, again: bool) -> _Cost:
    """What further rows of a convolution cost.

    Args:
        call: its last call.
        rows: how many, above and below together.
        work: its multiplications in all.
        again: whether it is called again, so that frames are kept.
    """
    read, given = (rows * math.prod(shape) / shape[-2] for shape in (call.in_shape, call.out_shape))
    kept = _KEPT_FRAMES * (read / call.in_shape[2] + given / call.out_shape[2]) if again else 0
    return _Cost(rows * work / call.out_shape[-2], _READ_COPIES * read + _GIVEN_COPIES * given, kept)


def _before(trace: LayerTrace, index: int) -> int | None:
    """The convolution whose output another one reads, through layers that work position by position."""
    if not _looks_around(window_of(trace, index)):
        return None
    source = call_source(trace, index)
    # Rows ride with statistics, and travel before they are doubled, in messages that are sent in any case.
    while source >= 0 and not fetches_for(trace, source, index) and passes_through(trace, source):
        source = call_source(trace, source)
    source = holding_call(trace, source) if source >= 0 else source
    if source < 0 or trace.calls[source].kind not in CLIP_CONVOLUTIONS:
        return None
    window = window_of(trace, source)
    return source if _looks_around(window) and window.stride == 1 else None


def _looks_around(window: Window) -> bool:
    return window.lead == window.trail > 0


def _work(trace: LayerTrace, index: int) -> int:
    """Multiplications of one convolution."""
    call = trace.calls[index]
    inner = trace.calls[index + 1] if call.kind in HOLDING_CONVOLUTIONS else call
    taps: int = math.prod(inner.setting("kernel_size"))
    return math.prod(call.out_shape) * call.in_shape[1] * taps
