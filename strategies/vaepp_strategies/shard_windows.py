"""Where the convolutions of a trace look around themselves, whichever layer keeps, pads or calls them."""

from __future__ import annotations

import attrs

from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.reach import Window
from vaepp_strategies.shard_kinds import CLIP_CONVOLUTIONS, HOLDING_CONVOLUTIONS, PADDING_DOWNSAMPLES, PADS

__all__ = ["call_window", "calls_others", "convolution_of", "holding_call", "padded_by", "window_of"]


def calls_others(trace: LayerTrace, index: int) -> bool:
    """Whether a call calls other layers."""
    return index + 1 < len(trace.calls) and trace.calls[index + 1].inside == index


def holding_call(trace: LayerTrace, index: int) -> int:
    """The call of the layer that keeps a called convolution in it, or the call itself."""
    inside = trace.calls[index].inside
    return inside if inside >= 0 and trace.calls[inside].kind in HOLDING_CONVOLUTIONS else index


def convolution_of(trace: LayerTrace, index: int) -> LayerCall:
    """The convolution itself of a call, which some classes keep in a layer of their own."""
    return trace.calls[index + 1] if calls_others(trace, index) else trace.calls[index]


def window_of(trace: LayerTrace, index: int) -> Window:
    """A traced convolution along its rows, padded by itself or by the layer in front of it."""
    call = trace.calls[index]
    if call.kind in CLIP_CONVOLUTIONS:
        inner = convolution_of(trace, index)
        kernel, stride = inner.setting("kernel_size")[1], inner.setting("stride")[1]
        padding = 0 if kernel == stride else kernel // 2
        return Window(kernel, stride, padding, padding)
    window, source = call_window(call), call.source
    if padded_by(trace, index):
        return attrs.evolve(window, trail=window.trail + 1)
    if source < 0 or trace.calls[source].kind not in PADS:
        return window
    _, _, lead, trail = trace.calls[source].setting("padding")
    return attrs.evolve(window, lead=window.lead + lead, trail=window.trail + trail)


def padded_by(trace: LayerTrace, index: int) -> bool:
    """Whether the layer around a convolution padded its input by a row and a column at the end."""
    inside = trace.calls[index].inside
    return inside >= 0 and trace.calls[inside].kind in PADDING_DOWNSAMPLES


def call_window(call: LayerCall) -> Window:
    """A traced convolution along its rows; its columns are alike, see `shard_layers`."""
    padding = call.setting("padding")[0]
    return Window(call.setting("kernel_size")[0], call.setting("stride")[0], padding, padding)
