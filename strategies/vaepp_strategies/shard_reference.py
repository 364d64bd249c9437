"""Runs `deterministic = "reference"`: the untiled decode or encode itself, bit by bit, on bands."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from vaepp_sdk.errors import UnsupportedError, VaeppWarning
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed, land
from vaepp_sdk.vae.plan import Window, Work
from vaepp_strategies.layers.inspect import unknown_layers
from vaepp_strategies.layers.kernels import KernelCheck
from vaepp_strategies.layers.parts import Scale
from vaepp_strategies.layers.reference import (
    Forward,
    reference_group_norm,
    reference_rows,
    reference_upsample,
    reference_whole,
)
from vaepp_strategies.layers.swap import swapped
from vaepp_strategies.layers.whole import WholeBands
from vaepp_strategies.reference_layers import ReferenceLayer
from vaepp_strategies.shard_layers import SHARD_LAYERS
from vaepp_strategies.shard_reference_plan import ReferencePlan, plan_reference
from vaepp_strategies.shard_steps import call_scale, visible_calls

__all__ = ["ReferenceStrategy"]

_SERVED = (nn.Conv2d, nn.GroupNorm, nn.Upsample, Upsample2D, Downsample2D, Attention)


class ReferenceStrategy:
    """Decodes one band on each rank; every layer gives the bits that it gives on the whole picture."""

    def __init__(self) -> None:
        self._check = KernelCheck()

    def plan(self, facts: VaeFacts, work: Work) -> ReferencePlan:
        """See `Strategy.plan`."""
        return plan_reference(facts, work)

    def check(self, adapter: VaeAdapter) -> None:
        """See `Strategy.check`."""
        facts = adapter.facts()
        for direction in ("decode", "encode"):
            trace = facts.layers(direction)
            if trace is None:
                faults = ["its adapter does not say which layers are called"]
            else:
                visible = tuple(call for _, call in visible_calls(trace))
                known = {layer: SHARD_LAYERS[layer] for layer in _SERVED}
                faults = unknown_layers(attrs.evolve(trace, calls=visible), adapter.vae, known)
            if faults:
                raise UnsupportedError(
                    f"strategy 'shard' with deterministic = 'reference' cannot {direction} with this "
                    f"{facts.vae_class}:\n  " + "\n  ".join(faults)
                )

    def decode(
        self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: ReferencePlan
    ) -> Landed:
        """See `Strategy.decode`."""
        return self._run(adapter, latent, group, plan)

    def encode(
        self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: ReferencePlan
    ) -> Landed:
        """See `Strategy.encode`."""
        return self._run(adapter, picture, group, plan)

    @torch.no_grad()
    def _run(self, adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: ReferencePlan) -> Landed:
        pieces = {}
        # One rank's word is enough: all run the same kernels.
        self._check.active = group.rank == 0
        for window in plan.owned(group.rank):
            pieces[window.index] = self._band(adapter, value, group, plan, window)
            group.progress(plan.exchanges + 1, plan.exchanges + 1)
        landed = land(pieces, group, plan, value.dtype, value.device)
        self._warn()
        return landed

    def _band(
        self, adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: ReferencePlan, window: Window
    ) -> torch.Tensor:
        bands = WholeBands(group, plan.parts, plan.exchanges)
        alone = len(plan.windows) == 1
        band = value if alone else value[(..., *window.source.slices)].contiguous()
        bands.keep(band, value)
        with swapped({} if alone else _forwards(adapter, bands, plan, self._check)):
            if plan.work.direction == "encode":
                return adapter.encode_window(band)
            return adapter.finish_decode(adapter.decode_window(band))

    def _warn(self) -> None:
        failed, unchecked = self._check.failed, self._check.unchecked
        if failed:
            _tell(
                f"could not be kept on this device: {_some(failed)} gave other bits for a part of a picture"
            )
        if unchecked:
            _tell(f"could not be checked: {_some(unchecked)} needs more memory as a whole than there is")
        failed.clear()
        unchecked.clear()


def _tell(what: str) -> None:
    warnings.warn(f"deterministic = 'reference' {what}", VaeppWarning, stacklevel=2)


def _some(names: list[str]) -> str:
    others = len(names) - 1
    return f"{names[0]} (and {others} more)" if others else names[0]


def _forwards(
    adapter: VaeAdapter, bands: WholeBands, plan: ReferencePlan, check: KernelCheck
) -> Mapping[nn.Module, Forward]:
    """What layers run instead of their own forward."""
    trace = adapter.facts().layers(plan.work.direction)
    assert trace is not None, "a plan was made from the layers"
    found: dict[nn.Module, Forward] = {}
    for index, call in visible_calls(trace):
        if call.kind == "Upsample2D":
            block = adapter.vae.get_submodule(call.name)
            found[block] = reference_upsample(block, bands, call_scale(trace, index))
    calls: dict[nn.Module, list[Forward]] = {}
    for layer in plan.layers:
        module = adapter.vae.get_submodule(layer.name)
        calls.setdefault(module, []).append(_forward(module, bands, layer, check))
    return found | {module: _in_turn(forwards) for module, forwards in calls.items()}


def _in_turn(forwards: list[Forward]) -> Forward:
    """A layer that is called several times may run differently each time."""
    turns = iter(forwards)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return next(turns)(*args, **kwargs)

    return forward


def _forward(module: Any, bands: WholeBands, layer: ReferenceLayer, check: KernelCheck) -> Forward:
    scale, name = layer.scale, layer.name
    if layer.how == "band":
        return partial(type(module).forward, module)
    if layer.how == "whole":
        out: Scale = layer.out_scale
        return reference_whole(module, bands, scale, out, layer.known, layer.kept, name)
    if layer.how == "channels":
        return reference_group_norm(module, bands, scale, name, check)
    return reference_rows(module, bands, scale, layer.known, name, check)
