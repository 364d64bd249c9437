"""The layers before the attention, which every rank may run on the whole picture: pure arithmetic.

Attention reads every position. What leads to it from the latent, which all ranks hold, is little work for
many bytes: ranks that run it on their peers' rows too need not send them. An upsampling behind the attention
is then run in less work, which pays for most of that or for more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal

import attrs

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.vae.plan import Work
from vaepp_sdk.vae.trace import LayerCall, LayerTrace
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reach import NO_ROWS, Reach
from vaepp_strategies.shard_stages import Stage, layer_sequence
from vaepp_strategies.shard_steps import ShardSteps

__all__ = ["Front", "Repeat", "layer_work", "plan_front", "with_front"]

Repeat = Literal["auto", "never", "always"]

_EXTRA_WORK = 0.045
"""What `auto` lets a rank's work grow by, as a share of it: enough for eight ranks at 1024 pixels."""

_SAVED = 5 / 9
"""The part of its work that `convolve_doubled` saves of a convolution."""


@attrs.frozen(kw_only=True)
class Front:
    """What is run on the whole picture by every rank, and what pays for it.

    Attributes:
        layers: the names of the layers before the attention.
        attention: the attention's name; it reads the whole picture, and gives this rank's band.
        doubled: the name of an upsampling behind it that runs in less work; empty without one.
    """

    layers: tuple[str, ...]
    attention: str
    doubled: str = ""


def plan_front(
    trace: LayerTrace, ranks: int, work: Work, repeat: Repeat, given: Mapping[str, Reach]
) -> Front | None:
    """Decide whether each rank runs the layers before the attention on its peers' rows too.

    Args:
        trace: the layers.
        ranks: how many ranks have a band.
        work: what is asked.
        repeat: `always`; `auto`: where it costs a small share of a rank's work at most; or `never`.
        given: rows around a layer's output that a later layer reads, by the layer's name.

    Returns:
        None where nothing is to be repeated.

    Raises:
        UnsupportedError: `always` is asked, and no attention follows a few layers at the latent's resolution.
    """
    if repeat == "never" or ranks == 1 or work.direction == "encode":
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
    front = Front(
        layers=tuple(name for stage in before for name in stage.names),
        attention=attention.names[0],
        doubled=_doubled(trace, work, given),
    )
    return front if repeat == "always" or _extra_work(front, trace, ranks, work) <= _EXTRA_WORK else None


def with_front(exchanges: ShardSteps, front: Front) -> ShardSteps:
    """What the layers exchange where those before the attention, and itself, need nothing of other ranks."""
    alone = (*front.layers, front.attention)
    return ShardSteps(
        steps=tuple(step for step in exchanges.steps if step.name not in alone),
        given=tuple((name, reach) for name, reach in exchanges.given if name not in alone),
        input_reach=NO_ROWS,
    )


def _extra_work(front: Front, trace: LayerTrace, ranks: int, work: Work) -> float:
    """What a rank computes more, as a share of its work; less than 0 where the upsampling saves more."""
    repeated = (ranks - 1) * layer_work(trace, work, front.layers)
    saved = _SAVED * layer_work(trace, work, (f"{front.doubled}.conv",))
    return (repeated - saved) / layer_work(trace, work)


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


def _doubled(trace: LayerTrace, work: Work, given: Mapping[str, Reach]) -> str:
    """Of the upsamplings that double and have a plain 3x3 convolution behind them, the one with most work."""
    layers = {call.name: call for call in trace.calls}
    found = {}
    for call in trace.calls:
        name = f"{call.name}.conv"
        if call.kind == "Upsample2D" and name in layers and _can_be_doubled(call, layers[name], given):
            found[call.name] = layer_work(trace, work, (name,))
    return max(found, key=found.__getitem__, default="")


def _can_be_doubled(upsampling: LayerCall, convolution: LayerCall, given: Mapping[str, Reach]) -> bool:
    """Whether `band_doubled_convolution` serves the two, which give a later layer a row at most."""
    if convolution.kind != "Conv2d" or upsampling.out_shape[-2] != 2 * upsampling.in_shape[-2]:
        return False
    sizes = [convolution.setting(what) for what in ("kernel_size", "stride", "padding")]
    gives = given.get(convolution.name, NO_ROWS)
    return sizes == [(3, 3), (1, 1), (1, 1)] and max(gives.above, gives.below) <= 1


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
