"""What the layers of a decode or encode exchange, from a trace of their calls: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.trace import INPUT, UNKNOWN, LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, NO_ROWS, Reach, Window, rows_before

__all__ = [
    "COVERING",
    "ShardStep",
    "ShardSteps",
    "call_scale",
    "call_source",
    "call_window",
    "shard_steps",
    "visible_calls",
]

StepKind = Literal["halo", "statistics", "keys and values", "statistics and positions", "sums"]

COVERING = {
    "Attention": ("GroupNorm",),
    "Downsample2D": (),
    "HunyuanImageAttentionBlock": (),
    "SanaMultiscaleLinearAttention": ("Conv2d",),
}
"""Layers replaced as a whole, each with the kinds of layer it still calls that exchange themselves."""

_GIVERS = ("GroupNorm", "Upsample", "Upsample2D")
"""Layers that can fetch the rows which a later layer needs."""


@attrs.frozen(kw_only=True)
class ShardStep:
    """One exchange of one layer.

    Attributes:
        name: the layer's name in the VAE.
        kind: what is exchanged.
        scale: the resolution of the layer's input.
        channels: channels of the rows exchanged with neighbours.
        reach: the neighbours' rows that are fetched.
        groups: groups of the normalisation whose statistics are exchanged.
        width: values of each own position that every other rank gets.
        sums: float32 values of each picture that are summed over the ranks.
    """

    name: str
    kind: StepKind
    scale: Scale
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


def shard_steps(trace: LayerTrace) -> ShardSteps:
    """List the exchanges of a traced decode or encode whose layers are all known.

    Where a convolution reads what a normalisation gave, directly or through layers that work position by
    position, its rows ride with the statistics; where it reads the input itself, nothing moves.

    Raises:
        UnsupportedError: a layer is called twice and needs different rows each time.
    """
    own, given = _requests(trace)
    _refuse_varying(trace, own, given)
    found = []
    for index, call in visible_calls(trace):
        step = _step(trace, index, call, own.get(index, NO_ROWS))
        if step is not None:
            found.append((_moment(trace, index), step))
    steps = tuple(step for _, step in sorted(found, key=lambda item: item[0]))
    convolutions = ((trace.calls[at].name, reach) for at, reach in given.items() if at != INPUT)
    return ShardSteps(steps=steps, given=tuple(convolutions), input_reach=given.get(INPUT, NO_ROWS))


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


def _requests(trace: LayerTrace) -> tuple[Mapping[int, Reach], Mapping[int, Reach]]:
    """Rows that calls fetch from neighbours, and rows that calls (or the input) have for later ones."""
    own: dict[int, Reach] = {}
    given: dict[int, Reach] = {}
    # Readers before givers, so that a giver's own need is complete when it asks further up.
    for index, call in reversed(list(visible_calls(trace))):
        reach = _needed(call, given.get(index, NO_ROWS))
        if not reach:
            continue
        giver = _giver(trace, index, reach)
        if giver is None:
            fetcher = _fetcher(trace, index)
            own[fetcher] = own.get(fetcher, NO_ROWS).joined(reach)
        else:
            given[giver] = given.get(giver, NO_ROWS).joined(reach)
    return own, given


def _needed(call: LayerCall, given: Reach) -> Reach:
    """The rows around its input that a call needs, where it must give the rows `given` around its output."""
    if call.kind == "Conv2d":
        return call_window(call).reach + given
    if call.kind == "Downsample2D":
        return DOWNSAMPLE_WINDOW.reach
    if call.kind in ("Upsample", "Upsample2D"):
        return rows_before(given, call.out_shape[-2] // call.in_shape[-2])
    return given


def _giver(trace: LayerTrace, index: int, reach: Reach) -> int | None:
    """The call that has rows for this one, `INPUT`, or None where this one must fetch them itself."""
    source = call_source(trace, index)
    while source >= 0:
        call = trace.calls[source]
        if call.kind in _GIVERS or _gives_for_nothing(trace, source, reach):
            return source
        if not _passes_through(trace, source):
            return None
        source = call.source
    return INPUT if source == INPUT else None


def _fetcher(trace: LayerTrace, index: int) -> int:
    """The call that fetches rows for this one: this one, or one before it whose input has fewer channels.

    Between the two stand only layers that work position by position, so the rows can go through them.
    """
    best, source = index, call_source(trace, index)
    while source >= 0 and _passes_through(trace, source):
        call = trace.calls[source]
        if call.kind == "Conv2d" and call.in_shape[1] < trace.calls[best].in_shape[1]:
            best = source
        source = call.source
    return best


def call_source(trace: LayerTrace, index: int) -> int:
    """Where a call's input comes from; `Upsample2D` interpolates before it calls its convolution."""
    call = trace.calls[index]
    upsamples = call.inside >= 0 and trace.calls[call.inside].kind == "Upsample2D"
    return call.inside if upsamples and call.source == UNKNOWN else call.source


def _gives_for_nothing(trace: LayerTrace, index: int, reach: Reach) -> bool:
    """Whether a convolution can compute rows beyond its band without another message or byte.

    It can where it reads the input, which every rank holds, and where it reads an upsampled picture whose
    halo, fetched before upsampling, reaches far enough.
    """
    call = trace.calls[index]
    if call.kind != "Conv2d" or call_window(call).stride != 1 or call_window(call).pointwise:
        return False
    source = call_source(trace, index)
    while source >= 0 and trace.calls[source].kind not in _GIVERS:
        if not _passes_through(trace, source):
            return False
        source = trace.calls[source].source
    if source < 0:
        return source == INPUT
    giver = trace.calls[source]
    if giver.kind not in ("Upsample", "Upsample2D"):
        return False
    factor, own = giver.out_shape[-2] // giver.in_shape[-2], call_window(call).reach
    return rows_before(own + reach, factor) == rows_before(own, factor)


def _passes_through(trace: LayerTrace, index: int) -> bool:
    """Whether a call works position by position: rows around its input become rows around its output."""
    call = trace.calls[index]
    if call.kind == "Conv2d":
        return call_window(call).pointwise
    leaf = all(other.inside != index for other in trace.calls[index + 1 :])
    return leaf and call.kind not in COVERING


def call_window(call: LayerCall) -> Window:
    """A traced convolution along its rows; its columns are alike, see `shard_layers`."""
    padding = call.setting("padding")[0]
    return Window(call.setting("kernel_size")[0], call.setting("stride")[0], padding, padding)


def _step(trace: LayerTrace, index: int, call: LayerCall, reach: Reach) -> ShardStep | None:
    """What a call exchanges, or None; `reach` is what it fetches itself."""
    scale = call_scale(trace, index)
    channels = call.in_shape[1] if reach else 0
    if call.kind == "GroupNorm":
        groups = int(call.setting("num_groups"))
        return ShardStep(
            name=call.name, kind="statistics", scale=scale, channels=channels, reach=reach, groups=groups
        )
    groups = _own_groups(trace, index)
    if groups:
        kind: StepKind = "statistics and positions"
        return ShardStep(name=call.name, kind=kind, scale=scale, groups=groups, width=call.in_shape[1])
    if call.kind == "Attention":
        width = 2 * int(call.setting("inner_kv_dim"))
        return ShardStep(name=call.name, kind="keys and values", scale=scale, width=width)
    if call.kind == "SanaMultiscaleLinearAttention":
        return ShardStep(name=call.name, kind="sums", scale=scale, sums=_linear_sums(trace, index))
    if reach:
        return ShardStep(name=call.name, kind="halo", scale=scale, channels=channels, reach=reach)
    return None


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
    shapes = (trace.calls[at].in_shape for at in (index, *_enclosing(trace, index)))
    rows = next(shape[-2] for shape in shapes if len(shape) == len(trace.in_shape))
    whole = trace.in_shape[-2]
    return Scale(rows // whole, 1) if rows >= whole else Scale(1, whole // rows)


def _moment(trace: LayerTrace, index: int) -> tuple[int, int]:
    """When a call exchanges: attention after the normalisation that it calls."""
    if trace.calls[index].kind not in COVERING:
        return index, -index
    inner = [at for at in range(index + 1, len(trace.calls)) if index in _enclosing(trace, at)]
    return max([index, *inner]), -index
