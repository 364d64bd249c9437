"""Runs a patch plan: tensors and messages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed, land
from vaepp_sdk.vae.plan import Work
from vaepp_strategies.layers.attention import shared_attention
from vaepp_strategies.layers.exchange import Exchange
from vaepp_strategies.layers.inspect import refuse_unknown, unknown_layers
from vaepp_strategies.layers.norm import shared_group_norm
from vaepp_strategies.layers.swap import swapped
from vaepp_strategies.patch import Share
from vaepp_strategies.patch_plan import PatchPlan, plan_patches

__all__ = ["PatchStrategy"]

WindowCall = Callable[[torch.Tensor], torch.Tensor]


class PatchStrategy:
    """Decodes one band with a halo on each rank, with the whole picture's statistics and attention.

    Args:
        halo: context on each side of a core, in latent rows; None is what was measured for the VAE class.
        share: `statistics+kv`, or `none` for plain halos.
    """

    def __init__(self, halo: int | None = None, share: Share = "statistics+kv") -> None:
        self._halo = halo
        self._share: Share = share
        self._warned = False

    def plan(self, facts: VaeFacts, work: Work) -> PatchPlan:
        """See `Strategy.plan`."""
        return plan_patches(facts, work, self._halo, self._share)

    def check(self, adapter: VaeAdapter) -> None:
        """See `Strategy.check`: refuses layers that look further than their neighbourhood."""
        refuse_unknown("patch", adapter, unknown_layers)

    def decode(self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: PatchPlan) -> Landed:
        """See `Strategy.decode`."""

        def window_call(window: torch.Tensor) -> torch.Tensor:
            return adapter.finish_decode(adapter.decode_window(window))

        return self._run(adapter.vae, window_call, latent, group, plan)

    def encode(self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: PatchPlan) -> Landed:
        """See `Strategy.encode`."""
        return self._run(adapter.vae, adapter.encode_window, picture, group, plan)

    @torch.no_grad()
    def _run(
        self, vae: Any, window_call: WindowCall, value: torch.Tensor, group: VaeGroup, plan: PatchPlan
    ) -> Landed:
        self._warn(group)
        pieces = {}
        for window in plan.owned(group.rank):
            with swapped(_forwards(vae, group, plan)):
                result = window_call(value[(..., *window.source.slices)].contiguous())
            # A copy, so that the halo's output can be freed.
            pieces[window.index] = result[(..., *plan.crop(window))].clone()
            del result
            group.progress(1, 1)
        return land(pieces, group, plan, value.dtype, value.device)

    def _warn(self, group: VaeGroup) -> None:
        if self._share == "none" and group.rank == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "strategy 'patch' with share = 'none': each rank normalises its own patch, so the promise of "
                "a mean difference under 0.5 % does not hold",
                VaeppWarning,
                stacklevel=2,
            )


def _forwards(vae: Any, group: VaeGroup, plan: PatchPlan) -> Mapping[nn.Module, Callable[..., Any]]:
    """What the layers that exchange run instead of their own forward."""
    exchange = Exchange(group, plan.parts)
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for call in plan.shared:
        layer = vae.get_submodule(call.name)
        build = shared_group_norm if call.kind == "statistics" else shared_attention
        forwards[layer] = build(layer, exchange)
    return forwards
