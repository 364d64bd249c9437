"""How `deterministic = "reference"` runs each layer, from traces of the calls: pure arithmetic.

What leads to a decoder's attention is little work, and every rank holds the latent: it runs on the whole, on
every rank. So does all that follows the first attention of an encoder. Between them and the output, or the
input, stand the layers that run on bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs

from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Parts, Scale
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, NO_ROWS, Reach
from vaepp_strategies.reference_kernels import (
    Sizes,
    convolved_alike,
    even_values,
    exact_anywhere,
    normalised_alike,
    summed_alike,
)
from vaepp_strategies.shard_kinds import (
    ATTENTION,
    CLIP_CONVOLUTIONS,
    FRAME_NORMS,
    GUIDED_NORMS,
    PADDING_DOWNSAMPLES,
    PADS,
)
from vaepp_strategies.shard_steps import call_scale
from vaepp_strategies.shard_windows import call_window, calls_others, window_of

__all__ = ["ReferenceLayer", "ReferenceStep", "reference_layers", "reference_steps", "whole_side"]

How = Literal["split", "join", "whole", "channels", "rows", "even", "guided", "upsample"]

_COVERING: frozenset[How] = frozenset({"split", "join", "whole", "channels", "rows"})
"""Ways in which the layers that a layer calls run as they are."""

_ACTIVATIONS = ("GELU", "Mish", "SiLU")

_CHANNELS_LAST = ("Linear", "RMSNorm")


@attrs.frozen(kw_only=True)
class ReferenceLayer:
    """A layer that does not run on the band as it is.

    Attributes:
        name: the layer's name in the VAE.
        how: `split`: the last one that runs on the whole, which every rank holds. `join`: the first one that
            runs on the whole, as all after it do. `whole`: on the whole, on every rank. `channels`: on some
            channels of the whole. `rows`: on the band and the rows of `reach` around it. `even`: on the band,
            with the last values of the whole. `guided`: on the band, and the latent's band. `upsample`: on
            the band, in the memory format of the whole.
        scale: the resolution of its input.
        out_scale: the resolution of its output.
        reach: the rows that it reads of its neighbours; above, a multiple of its stride.
    """

    name: str
    how: How
    scale: Scale
    out_scale: Scale
    reach: Reach = NO_ROWS


@attrs.frozen(kw_only=True)
class ReferenceStep:
    """What one call of a layer exchanges.

    Attributes:
        layer: the layer.
        channels: channels of its input.
        frames: frames of its input; earlier ones that it is given once more do not count.
        groups: groups of channels that stay together.
    """

    layer: ReferenceLayer
    channels: int
    frames: int
    groups: int = 1

    @property
    def rounds(self) -> int:
        """How often ranks exchange messages."""
        how = self.layer.how
        if how == "channels":
            return 2
        return int(how in ("join", "whole") or (how == "rows" and bool(self.layer.reach)))


def _border(trace: LayerTrace, direction: Direction) -> int:
    """The call that splits a decode into bands, or joins those of an encode; -1 where none does.

    It is the last block of a decode, or the first of an encode, that has attention in it, or is the middle.
    """
    calls = trace.calls
    mixing = {call.inside for index, call in enumerate(calls) if _is_outer_attention(trace, index)}
    middle = [index for index, call in enumerate(calls) if "MidBlock" in call.kind]
    deepest = min((calls[index].in_shape[-2] for index in middle), default=0)
    mixing.update(index for index in middle if calls[index].in_shape[-2] == deepest)
    names = list(dict.fromkeys(calls[index].name for index in sorted(mixing)))
    if not names:
        return -1
    name = names[-1] if direction == "decode" else names[0]
    return next(index for index, call in enumerate(calls) if call.name == name)


def _is_outer_attention(trace: LayerTrace, index: int) -> bool:
    call = trace.calls[index]
    return call.kind in ATTENTION and trace.calls[call.inside].kind not in ATTENTION


def whole_side(trace: LayerTrace, direction: Direction) -> tuple[int, set[str]]:
    """The call at the border, or -1, and the layers on the whole's side of it, that one among them."""
    calls, at = trace.calls, _border(trace, direction)
    if at < 0:
        return at, set()
    if direction == "decode":
        within = calls[: _end(trace, at)]
        return at, {call.name for call in within if not calls[at].name.startswith(f"{call.name}.")}
    return at, {call.name for call in calls[at:]} - {call.name for call in calls[:at]}


def _end(trace: LayerTrace, index: int) -> int:
    """Behind the last call that a call makes."""
    name = trace.calls[index].name
    end = index + 1
    while end < len(trace.calls) and trace.calls[end].name.startswith(f"{name}."):
        end += 1
    return end


def reference_layers(
    traces: Sequence[LayerTrace], direction: Direction, parts: Parts, work: Work
) -> dict[str, ReferenceLayer]:
    """Decide how each layer runs, alike at every call; layers left out run as they are.

    Args:
        traces: all calls that there are, over all numbers of frames that are run at once.
        direction: decode or encode.
        parts: the bands.
        work: what is asked.
    """
    found: dict[str, ReferenceLayer] = {}
    for trace in traces:
        at, apart = whole_side(trace, direction)
        for index, call in enumerate(trace.calls):
            if index == at:
                how: How | None = "split" if direction == "decode" else "join"
            elif call.name in apart or len(call.in_shape) < 4:
                how = None  # on the whole's side, or it works on a timestep, which is every rank's
            else:
                how = _how(trace, index, _sizes(trace, index, parts, work))
            if how and getattr(found.get(call.name), "how", None) != "whole":
                found[call.name] = _layer(trace, index, how)
    covering = [f"{layer.name}." for layer in found.values() if layer.how in _COVERING]
    return {name: layer for name, layer in found.items() if not name.startswith(tuple(covering))}


def _layer(trace: LayerTrace, index: int, how: How) -> ReferenceLayer:
    scale, out_scale = call_scale(trace, index), _out_scale(trace, index)
    reach = _reach(trace, index) if how == "rows" else NO_ROWS
    # Bands start at whole strides; what is dropped above must, too.
    stride = max(1, scale.up * out_scale.down // (scale.down * out_scale.up))
    above = -(-reach.above // stride) * stride
    return ReferenceLayer(
        name=trace.calls[index].name,
        how=how,
        scale=scale,
        out_scale=out_scale,
        reach=attrs.evolve(reach, above=above),
    )


def reference_steps(trace: LayerTrace, layers: Mapping[str, ReferenceLayer]) -> tuple[ReferenceStep, ...]:
    """What the layers of a trace exchange, in order."""
    found = []
    for index, call in enumerate(trace.calls):
        layer = layers.get(call.name)
        if layer is None:
            continue
        channels, frames = _channels(trace, index)
        groups = _groups(trace, index) if layer.how == "channels" else 1
        found.append(ReferenceStep(layer=layer, channels=channels, frames=frames, groups=groups))
    return tuple(step for step in found if step.rounds)


def _channels(trace: LayerTrace, index: int) -> tuple[int, int]:
    """Channels and frames of a call's input; frames may be a batch of pictures."""
    shape = trace.calls[index].in_shape
    side = shape[-2]  # rows are as many as columns in a trace, wherever channels stand
    channels = shape[-1] if trace.calls[index].kind in _CHANNELS_LAST else shape[1]
    return channels, math.prod(shape) // (side * side * channels)


def _groups(trace: LayerTrace, index: int) -> int:
    call = trace.calls[index]
    norm = trace.calls[index + 1] if call.kind in FRAME_NORMS else call
    return int(norm.setting("num_groups"))


def _sizes(trace: LayerTrace, index: int, parts: Parts, work: Work) -> Sizes:
    scale, (channels, frames) = call_scale(trace, index), _channels(trace, index)
    return Sizes(
        lengths=tuple(parts.core_length(rank, scale) for rank in range(len(parts.parts))),
        across=parts.rows(work.shape[-1 if parts.axis == -2 else -2], scale),
        rows_split=parts.axis == -2,
        batch=work.shape[0],
        itemsize=work.itemsize,
        width=channels * frames,
        frames=frames,
    )


def _how(trace: LayerTrace, index: int, sizes: Sizes) -> How | None:
    """How a call on the bands' side runs; None where the band is all that it needs."""
    call = trace.calls[index]
    if call.kind in GUIDED_NORMS:
        return "guided"
    if call.kind == "Upsample2D":
        return "upsample"
    if _convolves(trace, index):
        return "rows" if convolved_alike(_convolution(trace, index), call, sizes) else "whole"
    if call.kind == "GroupNorm" or call.kind in FRAME_NORMS:
        alike = normalised_alike(sizes, call.in_shape[1], _groups(trace, index))
        return "channels" if alike else "whole"
    if "mean" in call.operators:
        # Sums of groups of channels, or of all of them.
        group = int(call.setting("group_size", _channels(trace, index)[0]))
        return None if summed_alike(group, sizes) else "whole"
    if calls_others(trace, index) or exact_anywhere(call.operators):
        return None
    if call.kind in _ACTIVATIONS:
        return None if even_values(sizes) else "even"
    return "whole"


def _convolves(trace: LayerTrace, index: int) -> bool:
    """Whether a call is a convolution, or a layer of one together with what stands in front of it."""
    kind = trace.calls[index].kind
    if kind in ("Conv2d", "Downsample2D", *CLIP_CONVOLUTIONS, *PADDING_DOWNSAMPLES):
        return True
    return kind == "Sequential" and calls_others(trace, index) and trace.calls[index + 1].kind in PADS


def _convolution(trace: LayerTrace, index: int) -> LayerCall:
    """The convolution itself of such a call."""
    return next(
        call
        for at, call in enumerate(trace.calls[index:], index)
        if "convolution" in call.operators and not calls_others(trace, at)
    )


def _reach(trace: LayerTrace, index: int) -> Reach:
    call = trace.calls[index]
    if call.kind == "Conv2d":
        return call_window(call).reach
    return window_of(trace, index).reach if call.kind in CLIP_CONVOLUTIONS else DOWNSAMPLE_WINDOW.reach


def _out_scale(trace: LayerTrace, index: int) -> Scale:
    return Scale.between(trace.in_shape[-2], trace.calls[index].out_shape[-2])
