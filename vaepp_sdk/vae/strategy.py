"""The protocol every strategy follows."""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

import torch

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed
from vaepp_sdk.vae.plan import Work, WorkPlan

__all__ = ["Strategy"]

PlanT = TypeVar("PlanT", bound=WorkPlan)


@runtime_checkable
class Strategy(Protocol[PlanT]):
    """How VAE work is cut, run and joined.

    An instance holds its options and nothing else: one instance serves many calls.
    """

    def plan(self, facts: VaeFacts, work: Work) -> PlanT:
        """Deal the work. Pure arithmetic: the same arguments give the same plan on every rank.

        Raises:
            UnsupportedError: this work cannot be done; raised on every rank alike, before any collective.
        """
        ...

    def check(self, adapter: VaeAdapter) -> None:
        """Refuse a VAE that this strategy cannot run, by naming the layer.

        Called on every rank before the first collective of a VAE object's first use.

        Raises:
            UnsupportedError: with the layer's name and class.
        """
        ...

    def decode(self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: PlanT) -> Landed:
        """Decode `latent`, the same on every rank, shape `plan.work.shape`, in the VAE's dtype and device.

        Called on every rank of the DiT group; ranks at or beyond `plan.work.ranks` only help it land.
        """
        ...

    def encode(self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: PlanT) -> Landed:
        """Encode `picture`, the same on every rank, into moments; otherwise as `decode`."""
        ...
