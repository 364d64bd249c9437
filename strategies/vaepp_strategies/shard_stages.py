"""The straight sequence of layers that row blocks run through, from a trace of calls: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import DOWNSAMPLE_WINDOW, Window
from vaepp_strategies.shard_windows import call_window

__all__ = ["Recompute", "Sequence", "Stage", "is_straight", "layer_sequence"]

StageKind = Literal["convolution", "activated convolution", "residual", "upsample", "downsample", "attention"]

Recompute = Literal["nothing", "hidden", "kept", "input"]
"""What a residual block computes again instead of storing it.

Nothing; what its first convolution gives, twice in all, its output being written over its input (`hidden`);
its input, an upsampled picture, twice in all, with what the shortcut makes of it stored (`kept`); or its
input, three times in all.
"""

_KINDS: dict[str, StageKind] = {
    "Conv2d": "convolution",
    "GroupNorm": "activated convolution",
    "ResnetBlock2D": "residual",
    "Upsample2D": "upsample",
    "Downsample2D": "downsample",
    "Attention": "attention",
}

_REFUSAL = "strategy 'shard' cannot run row blocks"

_RESIDUAL = ("GroupNorm", "SiLU", "Conv2d", "GroupNorm", "SiLU", "Dropout", "Conv2d")
_ACTIVATED = ("GroupNorm", "SiLU", "Conv2d")


@attrs.frozen(kw_only=True)
class Stage:
    """One or more layers that run together, block by block.

    Attributes:
        kind: how they run.
        names: the names of the layers in the VAE, in the order in which they are called.
        scale: the resolution of the input.
        out_scale: that of the output.
        channels: channels of the input.
        out_channels: channels of the output.
        groups: groups of a normalisation; 0 without one.
        window: the widest convolution along the rows; None in attention.
        shortcut: whether a residual's input goes through a convolution of its own.
        alike: whether a residual's two convolutions look equally far.
        recompute: what a residual does not store.
        source: the upsampling that makes a residual's input, where that is not stored.
    """

    kind: StageKind
    names: tuple[str, ...]
    scale: Scale
    out_scale: Scale
    channels: int
    out_channels: int
    groups: int = 0
    window: Window | None = None
    shortcut: bool = False
    alike: bool = False
    recompute: Recompute = "nothing"
    source: Stage | None = None

    @property
    def in_place(self) -> bool:
        """Whether a residual's output can be written over its input."""
        return self.alike and not self.shortcut


@attrs.frozen(kw_only=True)
class Sequence:
    """Layers of which each reads the output of the one before, and nothing else does.

    Attributes:
        name: the module whose forward calls them all and does nothing besides.
        stages: the layers.
    """

    name: str
    stages: tuple[Stage, ...]


def layer_sequence(trace: LayerTrace) -> Sequence:
    """Find the sequence in a traced decode or encode.

    The trace proves it: the calls around the layers run no operator of their own, and each layer's input is
    the very output of the one before.

    Raises:
        UnsupportedError: the layers are no straight sequence, or one of them cannot be run block by block.
    """
    outer = [index for index, call in enumerate(trace.calls) if call.inside == -1 and _composes(trace, index)]
    if len(outer) != 1:
        raise UnsupportedError(f"{_REFUSAL}: no one module calls all layers in a straight sequence")
    leaves, stages, last = list(_leaves(trace, outer[0])), [], -1
    while leaves:
        run = leaves[: len(_ACTIVATED) if trace.calls[leaves[0]].kind == "GroupNorm" else 1]
        del leaves[: len(run)]
        for index in run:
            if last >= 0 and not _within(trace, trace.calls[index].source, last):
                raise _refusal(trace.calls[index], "it does not read the output of the layer before alone")
            last = index
        stages.append(_stage(trace, run))
    return Sequence(name=trace.calls[outer[0]].name, stages=tuple(stages))


def is_straight(trace: LayerTrace) -> bool:
    """Whether the layers are such a sequence, and all of them can be run block by block."""
    try:
        layer_sequence(trace)
    except UnsupportedError:
        return False
    return True


def _children(trace: LayerTrace, index: int) -> list[int]:
    return [at for at, call in enumerate(trace.calls) if call.inside == index]


def _composes(trace: LayerTrace, index: int) -> bool:
    """Whether a call does nothing but call other layers."""
    return not trace.calls[index].operators and bool(_children(trace, index))


def _leaves(trace: LayerTrace, index: int) -> Iterator[int]:
    """The calls inside one, down to those that are stages, or parts of one."""
    for child in _children(trace, index):
        if trace.calls[child].kind not in _KINDS and _composes(trace, child):
            yield from _leaves(trace, child)
        else:
            yield child


def _within(trace: LayerTrace, index: int, outer: int) -> bool:
    while index >= 0 and index != outer:
        index = trace.calls[index].inside
    return index == outer


def _refusal(call: LayerCall, reason: str) -> UnsupportedError:
    return UnsupportedError(f"{_REFUSAL}: {call.name} ({call.kind}): {reason}")


def _stage(trace: LayerTrace, run: list[int]) -> Stage:
    first, end = trace.calls[run[0]], trace.calls[run[-1]]
    if first.kind not in _KINDS:
        raise _refusal(first, "it is no layer of a residual network")
    kind = _KINDS[first.kind]
    if kind == "activated convolution" and tuple(trace.calls[index].kind for index in run) != _ACTIVATED:
        raise _refusal(first, "no activation and convolution follow it")
    inner = [trace.calls[index] for index in _children(trace, run[0])]
    calls = [trace.calls[index] for index in run] if len(run) > 1 else [first, *inner]
    if kind == "residual":
        _check_residual(first, inner)
    return Stage(
        kind=kind,
        names=tuple(call.name for call in calls),
        scale=_scale(trace, first.in_shape),
        out_scale=_scale(trace, end.out_shape),
        channels=first.in_shape[1],
        out_channels=end.out_shape[1],
        groups=next((int(call.setting("num_groups")) for call in calls if call.kind == "GroupNorm"), 0),
        window=_window(kind, calls),
        shortcut=kind == "residual" and len(inner) > len(_RESIDUAL),
        alike=kind == "residual" and call_window(inner[2]) == call_window(inner[len(_RESIDUAL) - 1]),
    )


def _check_residual(call: LayerCall, inner: list[LayerCall]) -> None:
    """Refuse a residual block that does anything but what `shard_blocks` runs in its stead."""
    kinds = tuple(layer.kind for layer in inner)
    if kinds[: len(_RESIDUAL)] != _RESIDUAL or set(call.operators) - {"add", "div"}:
        raise _refusal(call, f"it calls {', '.join(kinds)}")
    shortcut, dropout = inner[len(_RESIDUAL) :], inner[len(_RESIDUAL) - 2]
    if len(shortcut) > 1 or any(not call_window(layer).pointwise for layer in shortcut):
        raise _refusal(call, "its shortcut is no convolution of single positions")
    if any(call_window(layer).stride != 1 for layer in (inner[2], inner[-1 - len(shortcut)])):
        raise _refusal(call, "a convolution in it has a stride")
    if dropout.setting("p"):
        raise _refusal(call, "it drops values at random")


def _window(kind: StageKind, calls: list[LayerCall]) -> Window | None:
    if kind == "attention":
        return None
    if kind == "downsample":
        return DOWNSAMPLE_WINDOW
    windows = [call_window(call) for call in calls if call.kind == "Conv2d"]
    if not windows:
        raise _refusal(calls[0], "it has no convolution")
    return max(windows, key=lambda window: window.kernel)


def _scale(trace: LayerTrace, shape: tuple[int, ...]) -> Scale:
    return Scale.between(trace.in_shape[-2], shape[-2])
