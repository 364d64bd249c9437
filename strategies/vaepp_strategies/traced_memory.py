"""How many bytes a band holds at its peak: pure arithmetic, from what a trace of layers counted.

A trace runs the VAE's own code on small sides. What it holds grows with the positions of the input, so a band
holds its share of that, but for its neighbours' rows and for layers that run on a band in another way.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import attrs

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.norm import chunk_values
from vaepp_strategies.layers.parts import Part, Parts
from vaepp_strategies.layers.reach import SHORT_BAND, Reach
from vaepp_strategies.shard_frames import traced, window_frames
from vaepp_strategies.shard_kinds import (
    CACHED_CONVOLUTIONS,
    CLIP_INTERPOLATING,
    FRAME_NORMS,
    HOLDING_CONVOLUTIONS,
    MASKED_ATTENTION,
)
from vaepp_strategies.shard_steps import ShardStep, call_scale
from vaepp_strategies.tile_geometry import Span

__all__ = ["TracedMemory", "untiled_bytes"]

_ROW_COPIES = 4
"""Of a neighbour's rows: what is sent, what arrives, and where it stands among a band's own rows."""

_GIVEN_COPIES = 2
"""Of a row computed for a later layer: where it was computed, and the copy that outlives that."""

_WIDE = 8
"""Bytes of a float64."""

_CACHED_FRAMES = 2
"""Frames of which rows are kept for a layer's next call."""

_BLENDED_BYTES = 4
"""Bytes of the values in which windows are blended, at least."""

_BLEND, _NARROW_BLEND = 2, 4
"""Values beside each blended one: its two parts, of which one may be wide and already rounded as well."""


@attrs.frozen(kw_only=True)
class TracedMemory:
    """The bytes of the bands of one clip or picture.

    Attributes:
        facts: the VAE; its layers are known.
        work: what is asked.
        parts: the bands.
        times: the windows of frames in which the VAE runs the clip; none where it runs in one piece.
        steps: what the layers exchange.
        given: rows around a layer's output that it computes for a later one, by the layer's name.
    """

    facts: VaeFacts
    work: Work
    parts: Parts
    times: tuple[Span, ...]
    steps: tuple[ShardStep, ...]
    given: tuple[tuple[str, Reach], ...]

    def peak(self, *bands: int) -> int:
        """The most bytes alive on the rank of some bands, weights and the input itself excluded.

        It runs its bands in turn, each up to its next exchange.
        """
        lengths = [self.parts.parts[band].length for band in bands]
        values = self._blended(lengths)
        if len(self.parts.parts) > 1:
            copied = 0 if self.facts.temporal_ratio else self.work.shape[1] * sum(lengths) * self._across
            values += copied + len(bands) * self._rows()  # a band of a clip is a view of the input
        return self.work.shape[0] * int(values) * self.work.itemsize

    def _blended(self, lengths: list[int]) -> float:
        """Values alive at the peak of any window of frames, or while windows are blended and joined."""
        area = sum(lengths) * self._across
        windows = {frames: self._window(frames, lengths) for frames in self._windows}
        given = {frames: self._out_frames(frames) for frames in windows}
        if not self.times:  # a whole clip, or a picture, may be clamped
            return max(max(windows.values()), self._out(2 * max(given.values()), area))
        blended = _NARROW_BLEND if self.work.itemsize < _BLENDED_BYTES else _BLEND
        kept = before = 0
        found = []
        for span in self.times:
            found.append(self._out(kept + before, area) + windows[span.length])
            frames = kept + before + given[span.length] + blended * span.blend
            found.append(self._out(frames, area))
            kept, before = kept + span.kept, given[span.length]
        return max(*found, self._out(2 * kept + before, area))

    @property
    def _windows(self) -> set[int]:
        """How many frames of the input the VAE runs at a time; a picture has none."""
        return set(window_frames(self.work, self.times))

    def _out_frames(self, frames: int) -> int:
        return self.facts.out_frames(self.work.direction, frames) if self.facts.temporal_ratio else 1

    @property
    def _across(self) -> int:
        return self.work.shape[-1 if self.parts.axis == -2 else -2]

    def _out(self, frames: int, area: int) -> float:
        """Values of some frames of a band's output."""
        ratio = self.facts.spatial_ratio
        scale = ratio**2 if self.work.direction == "decode" else 1 / ratio**2
        return self.facts.out_channels(self.work.direction) * frames * area * scale

    def _window(self, frames: int, lengths: list[int]) -> float:
        """Values alive at the peak of one window of frames, or of a whole clip or picture."""
        trace = traced(self.facts, self.work.direction, frames)
        longest, area = max(lengths), sum(lengths) * self._across
        share = area / math.prod(trace.in_shape[-2:])
        alone = len(self.parts.parts) == 1
        bands = sum(lengths) / longest
        values = share * (trace.peak if alone else self._running(trace, longest, bands - 1) / bands)
        wider = _masks(trace, share) if alone else self._statistics(trace, share / bands, bands - 1)
        # A band's frames are stacked too, but what comes out is not held twice, as chunks and joined.
        stacked = _stacked(trace, share) if alone and self.work.shape[0] > 1 else 0
        values = max(values, wider, stacked)
        first = trace.in_shape[2] if frames else 0
        later = frames - first
        if later:
            # A chunk leaves what it gave, beside what stands ready for those after it.
            given = [self._out_frames(count) for count in (frames, first)]
            values += later * share * _ready(trace) / first + self._out(given[0] - given[1], area)
        return values

    def _running(self, trace: LayerTrace, length: int, waiting: float) -> float:
        """Values of a band at its peak, and of those that wait for an exchange beside it.

        Args:
            trace: the layers.
            length: the band's rows of the input.
            waiting: how many bands of its length wait.
        """
        held = self._waiting(trace)
        return max(
            moment.values + waiting * held(moment.first, moment.last) for moment in _moments(trace, length)
        )

    def _waiting(self, trace: LayerTrace) -> Callable[[int, int], int]:
        """What a band holds that stands at the exchange before or after some calls, or between them."""
        names = {step.name for step in self.steps}
        exchanging = [index for index, call in enumerate(trace.calls) if call.name in names]

        def held(first: int, last: int) -> int:
            start = max(0, bisect.bisect_right(exchanging, first) - 1)
            end = bisect.bisect_right(exchanging, last) + 1
            return max((trace.calls[at].before for at in exchanging[start:end]), default=0)

        return held

    def _statistics(self, trace: LayerTrace, share: float, waiting: float) -> float:
        """Values while the statistics of a small band are taken, which is widened to float64 for them.

        Args:
            trace: the layers.
            share: the band's positions, those of the trace = 1.
            waiting: how many bands of its length wait.
        """
        batch, itemsize, held = self.work.shape[0], self.work.itemsize, self._waiting(trace)

        def widened(call: LayerCall) -> float:
            values = int(batch * share * math.prod(call.in_shape))
            return chunk_values(values, itemsize, int(call.setting("num_groups"))) * _WIDE / itemsize / batch

        return max(
            (
                share * (call.before + waiting * held(index, index)) + widened(call)
                for index, call in enumerate(trace.calls)
                if call.kind == "GroupNorm"
            ),
            default=0,
        )

    def _rows(self) -> int:
        """Values of neighbours' rows: of the widest exchange, computed ones, and of frames kept for later."""
        sizes: dict[str, int] = {}
        widest = 0
        for step in self.steps:
            row = self.parts.rows(self._across, step.scale) * step.channels
            sizes[step.name] = row * (step.reach.above + step.reach.below)
            widest = max(widest, sizes[step.name] * step.frames)
        computed = list(self._computed())
        held = _ROW_COPIES * widest + _GIVEN_COPIES * max(
            (size * frames for size, frames in computed), default=0
        )
        layers = self.facts.clip_layers
        cached = layers is not None and layers.frames(self.work.direction)[1]
        kept = sum(sizes.values()) + sum(size for size, _ in computed)
        return held + (_CACHED_FRAMES * kept if cached else 0)

    def _computed(self) -> Iterator[tuple[int, int]]:
        """The values of a frame, and the frames, of the rows that each layer computes for a later one.

        Those of pictures are few beside their band, which has no other frames.
        """
        if not self.facts.temporal_ratio:
            return
        trace = traced(self.facts, self.work.direction, max(self._windows))
        calls = {call.name: (index, call) for index, call in enumerate(trace.calls)}
        for name, reach in self.given:
            index, call = calls[name]
            row = self.parts.rows(self._across, call_scale(trace, index)) * call.out_shape[1]
            yield row * (reach.above + reach.below), math.prod(call.out_shape[2:-2])


def untiled_bytes(facts: VaeFacts, work: Work, traced: bool = True) -> int:
    """The most bytes alive while one rank decodes or encodes an input, or one tile of it, in one piece.

    Args:
        facts: the VAE. Where its layers are not known, its own estimate has to do.
        work: its shape is the input's.
        traced: whether its layers may be traced for this, which takes up to seconds.
    """
    rows, columns = work.shape[-2:]
    if traced and facts.layers(work.direction) is not None:
        alone = Parts(-2, (Part(0, rows, 0, rows),))
        return TracedMemory(facts=facts, work=work, parts=alone, times=(), steps=(), given=()).peak(0)
    pixels = rows * columns * (facts.spatial_ratio**2 if work.direction == "decode" else 1)
    frames = 1
    if facts.temporal_ratio:
        given = work.shape[2]
        frames = given if work.direction == "encode" else facts.out_frames("decode", given)
        frames = min(frames, facts.frames_at_once or frames)
    return int(work.shape[0] * pixels * frames * facts.peak_values_per_pixel) * work.itemsize


def _ready(trace: LayerTrace) -> int:
    """Values that stand ready for all chunks of a clip when the first one is run."""
    outer = [call for call in trace.calls if call.inside == -1]
    largest = max(outer, key=lambda call: call.peak)
    return next(call.before for call in outer if call.name == largest.name)


@attrs.frozen
class _Moment:
    """Values alive at one time while a layer runs, and its first and last call."""

    values: int
    first: int
    last: int


def _moments(trace: LayerTrace, length: int) -> Iterator[_Moment]:
    """The peaks of all layers as a band runs them, where some hold fewer copies than in their own code.

    Args:
        trace: the layers.
        length: the band's rows of the input.
    """
    inside = defaultdict(list)
    for index, call in enumerate(trace.calls):
        inside[call.inside].append(index)

    def found(index: int, own: int, last: int) -> Iterator[_Moment]:
        kind = trace.calls[index].kind if index >= 0 else ""
        if kind in CLIP_INTERPOLATING:
            yield _Moment(_interpolation(trace, index), index, last)
        elif kind in HOLDING_CONVOLUTIONS or kind in CACHED_CONVOLUTIONS:
            yield _Moment(_convolution(trace, index, length), index, last)
        else:
            # What it runs itself shows where it holds more than any layer that it calls.
            if own > max((trace.calls[at].peak for at in inside[index]), default=0):
                yield _Moment(own, max(index, 0), last)
            ends = [*(at - 1 for at in inside[index][1:]), last]
            for at, end in zip(inside[index], ends, strict=False):  # a leaf calls none
                yield from found(at, trace.calls[at].peak, end)

    yield from found(-1, trace.peak, len(trace.calls) - 1)


def _interpolation(trace: LayerTrace, index: int) -> int:
    """The peak of nearest interpolation in front of a convolution, as `band_clip_upsample` runs both."""
    call, padding, convolution = trace.calls[index : index + 3]
    source, large = math.prod(call.in_shape), math.prod(padding.in_shape)
    convolving = math.prod(convolution.in_shape) + math.prod(call.out_shape)
    return call.before + large + max(convolving, source + large)


def _convolution(trace: LayerTrace, index: int, length: int) -> int:
    """The peak of a convolution that pads its input itself; a short band is copied once."""
    call = trace.calls[index]
    if length * call.in_shape[-2] > SHORT_BAND * trace.in_shape[-2]:
        return call.peak
    return call.before + _padded(trace, index) + math.prod(call.out_shape)


def _padded(trace: LayerTrace, index: int) -> int:
    """Values of a convolution's input with all that it puts around it, earlier frames too."""
    call = trace.calls[index]
    if call.kind in HOLDING_CONVOLUTIONS:
        return math.prod(trace.calls[index + 1].in_shape)
    sizes = zip(call.out_shape[2:], call.setting("kernel_size"), call.setting("stride"), strict=True)
    surrounded: int = math.prod((size - 1) * stride + kernel for size, kernel, stride in sizes)
    return call.in_shape[1] * surrounded


def _masks(trace: LayerTrace, share: float) -> float:
    """Values alive where a class masks all positions of a clip by all positions, as its own code does."""
    found = 0.0
    for call in trace.calls:
        if call.kind in MASKED_ATTENTION:
            positions = share * math.prod(call.in_shape[2:])
            found = max(found, share * call.before + MASKED_ATTENTION[call.kind] * positions**2)
    return found


def _stacked(trace: LayerTrace, share: float) -> float:
    """Values alive where a class stacks the frames of clips to normalise each, a view only of a lone clip."""
    norms = (call for call in trace.calls if call.kind in FRAME_NORMS)
    return max((share * (call.peak + math.prod(call.in_shape)) for call in norms), default=0)
