"""Runs `deterministic = "reference"`: the untiled decode or encode itself, bit by bit, on bands."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed, land
from vaepp_sdk.vae.plan import Window, Work
from vaepp_strategies.layers.even import even_activation
from vaepp_strategies.layers.inspect import refuse_unknown
from vaepp_strategies.layers.kernels import KernelCheck
from vaepp_strategies.layers.reference import (
    Forward,
    reference_group_norm,
    reference_guided,
    reference_join,
    reference_rows,
    reference_split,
    reference_upsample,
    reference_whole,
)
from vaepp_strategies.layers.swap import swapped
from vaepp_strategies.layers.whole import WholeBands
from vaepp_strategies.reference_layers import ReferenceLayer
from vaepp_strategies.shard_layers import refused_layers
from vaepp_strategies.shard_reference_plan import ReferencePlan, plan_reference
from vaepp_strategies.shard_run import WindowCall, window_call
from vaepp_strategies.shard_times import in_windows

__all__ = ["ReferenceStrategy"]


class ReferenceStrategy:
    """Decodes one band on each rank; every layer gives the bits that it gives on the whole."""

    def __init__(self) -> None:
        self._check = KernelCheck()

    def plan(self, facts: VaeFacts, work: Work) -> ReferencePlan:
        """See `Strategy.plan`."""
        return plan_reference(facts, work)

    def check(self, adapter: VaeAdapter) -> None:
        """See `Strategy.check`: refuses layers that this strategy does not know how to run on a band."""
        refuse_unknown("shard", adapter, refused_layers)

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
            piece = in_windows(self._on_band(adapter, group, plan, window), value, plan.times)
            pieces[window.index] = adapter.finish_decode(piece) if plan.work.direction == "decode" else piece
            group.progress(plan.exchanges + 1, plan.exchanges + 1)
        landed = land(pieces, group, plan, value.dtype, value.device)
        self._warn()
        return landed

    def _on_band(
        self, adapter: VaeAdapter, group: VaeGroup, plan: ReferencePlan, window: Window
    ) -> WindowCall:
        """Gives this rank's band of the output for a whole input, or for some frames of one."""
        run = window_call(adapter, plan.work.direction)
        if not plan.layers:
            return run
        bands, hows = WholeBands(group, plan.parts, plan.exchanges), {layer.how for layer in plan.layers}

        def on_band(value: torch.Tensor) -> torch.Tensor:
            start = value if "split" in hows else value[(..., *window.source.slices)].contiguous()
            with swapped(_forwards(adapter.vae, bands, plan, self._check)):
                result = run(start)
            return bands.own_rows(result, plan.parts.output) if "join" in hows else result

        return on_band

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
    vae: nn.Module, bands: WholeBands, plan: ReferencePlan, check: KernelCheck
) -> Mapping[nn.Module, Forward]:
    """What layers run instead of their own forward."""
    return {
        (module := vae.get_submodule(layer.name)): _forward(module, bands, layer, check)
        for layer in plan.layers
    }


def _forward(module: Any, bands: WholeBands, layer: ReferenceLayer, check: KernelCheck) -> Forward:
    scale, out_scale, name = layer.scale, layer.out_scale, layer.name
    match layer.how:
        case "split":
            return reference_split(module, bands, out_scale)
        case "join":
            return reference_join(module, bands, scale, name)
        case "whole":
            return reference_whole(module, bands, scale, out_scale, name)
        case "channels":
            by_frame = not isinstance(module, nn.GroupNorm)
            norm: nn.GroupNorm = module.norm_layer if by_frame else module
            return reference_group_norm(norm, bands, scale, name, check, by_frame=by_frame)
        case "rows":
            return reference_rows(module, bands, scale, out_scale, layer.reach, name, check)
        case "even":
            return even_activation(module, bands, scale)
        case "guided":
            return reference_guided(module, bands)
        case "upsample":
            return reference_upsample(module, bands, scale)
