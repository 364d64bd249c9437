"""What the layers of a decode or encode exchange, from a trace of their calls: pure arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.trace import INPUT, UNKNOWN, LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, NO_ROWS, Reach, Window, rows_before
from vaepp_strategies.shard_kinds import (
    CLIP_CONVOLUTIONS,
    COVERING,
    FRAME_NORMS,
    GIVERS,
    GUIDED_NORMS,
    HANDING_BACK,
    INTERPOLATING,
    MODULATED,
    PADS,
    POSITION_ATTENTION,
    UPSAMPLES,
    UPSAMPLES_BY_CHOICE,
)
from vaepp_strategies.shard_windows import calls_others, convolution_of, holding_call, padded_by, window_of

__all__ = [
    "ShardStep",
    "ShardSteps",
    "call_scale",
    "call_source",
    "fetches_for",
    "passes_through",
    "shard_steps",
    "visible_calls",
]

StepKind = Literal["halo", "statistics", "keys and values", "statistics and positions", "positions", "sums"]


@attrs.frozen(kw_only=True)
class ShardStep:
    """One exchange of one layer.

    Attributes:
        name: the layer's name in the VAE.
        kind: what is exchanged.
        scale: the resolution of the layer's input.
        frames: frames of the layer's input; earlier ones that it is given once more do not count.
        channels: channels of the rows exchanged with neighbours.
        reach: the neighbours' rows that are fetched.
        groups: groups of the normalisation whose statistics are exchanged.
        width: values of each own position of a frame that every other rank gets.
        sums: float32 values of each picture that are summed over the ranks.
    """

    name: str
    kind: StepKind
    scale: Scale
    frames: int = 1
    channels: int = 0
    reach: Reach = NO_ROWS
    groups: int = 0
    width: int = 0
    sums: int = 0


@attrs.frozen(kw_only=True)
class ShardSteps:
    """The exchanges of one decode or encode.

    Attributes:
        steps: in the order in which they happen.
        given: rows around a layer's output that a later layer reads, by the layer's name.
        input_reach: rows around a band of the input that its first layer reads; every rank holds the input.
    """

    steps: tuple[ShardStep, ...]
    given: tuple[tuple[str, Reach], ...]
    input_reach: Reach

    @property
    def shortest_band(self) -> int:
        """The fewest input rows a band can have: as many as its neighbours ask of it at any layer."""
        needs = [(max(step.reach.above, step.reach.below), step.scale) for step in self.steps]
        return max([1, *(-(-rows * scale.down // scale.up) for rows, scale in needs)])


def shard_steps(trace: LayerTrace, chained: bool = False, giving: frozenset[str] = frozenset()) -> ShardSteps:
    """List the exchanges of a traced decode or encode whose layers are all known.

    Where a convolution reads what a normalisation gave, directly or through layers that work position by
    position, its rows ride with the statistics; where it reads the input itself, nothing moves.

    Args:
        trace: the layers.
        chained: whether a convolution of a picture that reads what another one gave, directly or through
            such layers, gets its rows from that one, which computes them again from more rows of its input;
            else both exchange.
        giving: names of convolutions of a clip that compute the rows around their bands which the next ones
            read.

    Raises:
        UnsupportedError: a layer is called twice and needs different rows each time.
    """
    own, given = _requests(trace, chained, giving)
    _refuse_varying(trace, own, given)
    found = []
    for index, call in visible_calls(trace):
        step = _step(trace, index, call, own.get(index, NO_ROWS))
        if step is not None:
            found.append((_moment(trace, index), step))
    steps = tuple(step for _, step in sorted(found, key=lambda item: item[0]))
    # A layer of a clip is called again and again, and gives the same rows each time.
    givers = {trace.calls[at].name: reach for at, reach in given.items() if at != INPUT}
    return ShardSteps(steps=steps, given=tuple(givers.items()), input_reach=given.get(INPUT, NO_ROWS))


def _refuse_varying(trace: LayerTrace, own: Mapping[int, Reach], given: Mapping[int, Reach]) -> None:
    """Refuse a layer that is called several times and handles other rows each time."""
    first: dict[str, tuple[Reach | None, Reach | None]] = {}
    for index, call in visible_calls(trace):
        rows = own.get(index), given.get(index)
        if first.setdefault(call.name, rows) != rows:
            raise UnsupportedError(
                f"strategy 'shard' cannot serve {call.name}: its calls need different rows"
            )


def visible_calls(trace: LayerTrace) -> Iterator[tuple[int, LayerCall]]:
    """Every call and its index, less those that a layer replaced as a whole makes.

    Attention that exchanges keys and values still calls its normalisation, which exchanges on its own.
    """
    for index, call in enumerate(trace.calls):
        covering = [at for at in _enclosing(trace, index) if trace.calls[at].kind in COVERING]
        if all(call.kind in COVERING[trace.calls[at].kind] and not _own_groups(trace, at) for at in covering):
            yield index, call


def _own_groups(trace: LayerTrace, index: int) -> int:
    """The groups of the normalisation in a single-head attention, which `band_attention` replaces; else 0.

    Any other attention exchanges keys and values, after a normalisation that exchanges on its own.
    """
    call = trace.calls[index]
    single = call.kind == "HunyuanImageAttentionBlock" or call.setting("heads") == 1
    if call.kind not in ("Attention", "HunyuanImageAttentionBlock") or not single:
        return 0
    inner = (other for other in trace.calls[index + 1 :] if other.inside == index)
    return next((int(norm.setting("num_groups")) for norm in inner if norm.kind == "GroupNorm"), 0)


def _enclosing(trace: LayerTrace, index: int) -> Iterator[int]:
    """The calls around a call, innermost first."""
    index = trace.calls[index].inside
    while index >= 0:
        yield index
        index = trace.calls[index].inside


def _requests(
    trace: LayerTrace, chained: bool, giving: frozenset[str]
) -> tuple[Mapping[int, Reach], Mapping[int, Reach]]:
    """Rows that calls fetch from neighbours, and rows that calls (or the input) have for later ones."""
    own: dict[int, Reach] = {}
    given: dict[int, Reach] = {}
    # Readers before givers, so that a giver's own need is complete when it asks further up.
    for index, _ in reversed(list(visible_calls(trace))):
        reach = _needed(trace, index, given.get(index, NO_ROWS))
        if not reach:
            continue
        # A normalisation exchanges in any case, and its rows ride along.
        giver = _giver(trace, index, reach, chained and trace.calls[index].kind == "Conv2d", giving)
        if giver is None:
            fetcher = _fetcher(trace, index)
            own[fetcher] = own.get(fetcher, NO_ROWS).joined(reach)
        else:
            given[giver] = given.get(giver, NO_ROWS).joined(reach)
    return own, given


def _needed(trace: LayerTrace, index: int, given: Reach) -> Reach:
    """The rows around its input that a call needs, where it must give the rows `given` around its output."""
    call = trace.calls[index]
    if call.kind == "Conv2d" or call.kind in CLIP_CONVOLUTIONS:
        window = window_of(trace, index)
        _refuse_uneven(call, window)
        return window.reach + given
    if call.kind in PADS and not given:
        raise UnsupportedError(f"strategy 'shard' cannot serve {call.name}: no convolution reads it")
    if call.kind == "Downsample2D":
        return DOWNSAMPLE_WINDOW.reach
    if _upsamples(call):
        return rows_before(given, call.out_shape[-2] // call.in_shape[-2])
    return given


def _refuse_uneven(call: LayerCall, window: Window) -> None:
    """Refuse a convolution whose output is not as many rows as its input, or half as many."""
    lost = window.kernel - (window.lead + window.trail)
    if not 1 <= lost <= window.stride:
        raise UnsupportedError(
            f"strategy 'shard' cannot serve {call.name}: a kernel of {window.kernel} with {window.lead} + "
            f"{window.trail} rows of padding changes the number of rows"
        )


def _giver(trace: LayerTrace, index: int, reach: Reach, chained: bool, giving: frozenset[str]) -> int | None:
    """The call that has rows for this one, `INPUT`, or None where this one must fetch them itself."""
    source = call_source(trace, index)
    while source >= 0:
        holder = holding_call(trace, source)
        if trace.calls[holder].name in giving:
            return holder
        if fetches_for(trace, source, index) or _gives_for_nothing(trace, source, reach):
            return source
        if chained and _widens(trace, source):
            return source
        if not passes_through(trace, source):
            return None
        source = call_source(trace, source)
    return INPUT if source == INPUT else None


def _fetcher(trace: LayerTrace, index: int) -> int:
    """The call that fetches rows for this one: this one, or one before it whose input has fewer channels.

    Between the two stand only layers that work position by position, so the rows can go through them.
    """
    best, source = index, call_source(trace, index)
    while source >= 0 and passes_through(trace, source):
        call = trace.calls[source]
        if call.kind == "Conv2d" and call.in_shape[1] < trace.calls[best].in_shape[1]:
            best = source
        source = call_source(trace, source)
    return best


def call_source(trace: LayerTrace, index: int) -> int:
    """Where a call's input comes from.

    Some layers interpolate before they call their convolution. Others move axes, or scale channels, between
    the layers that they call.
    """
    call = trace.calls[index]
    around = trace.calls[call.inside] if call.inside >= 0 else None
    if around is None or call.source != UNKNOWN:
        return call.source
    if call.kind in MODULATED.get(around.kind, ()):
        before = [at for at in range(call.inside + 1, index) if trace.calls[at].inside == call.inside]
        return before[-1] if before else around.source
    own = around.kind in (*INTERPOLATING, *UPSAMPLES_BY_CHOICE) and _upsamples(around)
    return call.inside if own else UNKNOWN


def _upsamples(call: LayerCall) -> bool:
    """Whether a call interpolates, perhaps before a convolution of its own."""
    return call.kind in UPSAMPLES or (call.kind in UPSAMPLES_BY_CHOICE and bool(call.setting("interpolate")))


def fetches_for(trace: LayerTrace, source: int, index: int) -> bool:
    """Whether a call can fetch the rows around its own output that a later one reads.

    One that adds a shortcut to what its own convolution gives can do so for that convolution alone.
    """
    call = trace.calls[source]
    if call.kind in UPSAMPLES_BY_CHOICE:
        return _upsamples(call) and trace.calls[index].inside == source
    return call.kind in GIVERS or _upsamples(call)


def _widens(trace: LayerTrace, index: int) -> bool:
    """Whether a call is a convolution of a picture that can compute more rows than its band's."""
    if trace.calls[index].kind != "Conv2d":
        return False
    window = window_of(trace, index)
    return window.stride == 1 and not window.pointwise


def _gives_for_nothing(trace: LayerTrace, index: int, reach: Reach) -> bool:
    """Whether a convolution can compute rows beyond its band without another message or byte.

    It can where it reads the input, which every rank holds, and where it reads an upsampled picture whose
    halo, fetched before upsampling, reaches far enough.
    """
    if not _widens(trace, index):
        return False
    source = call_source(trace, index)
    while source >= 0 and not fetches_for(trace, source, index):
        if not passes_through(trace, source):
            return False
        source = call_source(trace, source)
    if source < 0:
        return source == INPUT
    giver = trace.calls[source]
    if not _upsamples(giver):
        return False
    factor, own = giver.out_shape[-2] // giver.in_shape[-2], window_of(trace, index).reach
    return rows_before(own + reach, factor) == rows_before(own, factor)


def passes_through(trace: LayerTrace, index: int) -> bool:
    """Whether a call works position by position: rows around its input become rows around its output."""
    call = trace.calls[index]
    if call.kind == "Conv2d":
        return window_of(trace, index).pointwise
    if call.kind in CLIP_CONVOLUTIONS:
        kernel = convolution_of(trace, index).setting("kernel_size")
        single = set(kernel) == {1} and window_of(trace, index).pointwise
        return single and call.kind not in HANDING_BACK
    keeps_places = call.in_shape[2:] == call.out_shape[2:]
    return keeps_places and not calls_others(trace, index) and call.kind not in COVERING


def _step(trace: LayerTrace, index: int, call: LayerCall, reach: Reach) -> ShardStep | None:
    """What a call exchanges, or None; `reach` is what it fetches itself."""
    shape = _shape(trace, index)
    # Frames have an axis of their own, or are a batch of pictures; the batch is 1 in a trace.
    frames = math.prod(shape[:1] + shape[2:-2])
    step = ShardStep(name=call.name, kind="halo", scale=call_scale(trace, index), frames=frames)
    channels = shape[1] if reach else 0
    if call.kind == "GroupNorm":
        groups = int(call.setting("num_groups"))
        return attrs.evolve(step, kind="statistics", channels=channels, reach=reach, groups=groups)
    groups = _own_groups(trace, index)
    if groups:
        return attrs.evolve(step, kind="statistics and positions", groups=groups, width=shape[1])
    if call.kind in FRAME_NORMS or call.kind in GUIDED_NORMS:
        inner = next(other for other in trace.calls[index + 1 :] if other.kind == "GroupNorm")
        groups = int(inner.setting("num_groups")) * (frames if call.kind in FRAME_NORMS else 1)
        return attrs.evolve(step, kind="statistics", channels=channels, reach=reach, groups=groups)
    if call.kind in POSITION_ATTENTION:
        return attrs.evolve(step, kind="positions", width=shape[1])
    if call.kind == "Attention" and call.in_shape[0] > 1:
        return None  # a trace has one picture or clip: the batch are positions, each seen over its frames
    if call.kind == "Attention":
        return attrs.evolve(step, kind="keys and values", width=2 * int(call.setting("inner_kv_dim")))
    if call.kind == "SanaMultiscaleLinearAttention":
        return attrs.evolve(step, kind="sums", sums=_linear_sums(trace, index))
    return attrs.evolve(step, channels=channels, reach=reach) if reach else None


def _linear_sums(trace: LayerTrace, index: int) -> int:
    """The values of all heads' products of values and keys, and of their keys' sums."""
    inner = next(call for call in trace.calls[index + 1 :] if call.inside == index and call.kind == "Linear")
    scales = 1 + sum(
        call.inside == index and call.kind == "SanaMultiscaleAttentionProjection" for call in trace.calls
    )
    head = int(trace.calls[index].setting("attention_head_dim"))
    return scales * inner.out_shape[-1] // head * head * (head + 1)


def call_scale(trace: LayerTrace, index: int) -> Scale:
    """A call's resolution; inside attention, where positions are in one row, that of the attention."""
    rows = _shape(trace, index)[-2] - padded_by(trace, index)
    return Scale.between(trace.in_shape[-2], rows)


def _shape(trace: LayerTrace, index: int) -> tuple[int, ...]:
    """A call's input with rows and columns; where positions are in one row, that of the call around it."""
    shapes = (trace.calls[at].in_shape for at in (index, *_enclosing(trace, index)))
    # Layers of clips may see frames as a batch of pictures.
    return next(shape for shape in shapes if 4 <= len(shape) <= len(trace.in_shape))


def _moment(trace: LayerTrace, index: int) -> tuple[int, int]:
    """When a call exchanges: attention after the normalisation that it calls."""
    if trace.calls[index].kind not in COVERING:
        return index, -index
    inner = itertools.takewhile(lambda at: index in _enclosing(trace, at), range(index + 1, len(trace.calls)))
    return max([index, *inner]), -index
