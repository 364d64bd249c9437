"""A strategy in full: one rank decodes or encodes everything, and the result lands where it was asked for.

It saves no time. It puts the memory peak on the rank of your choice, and it is the untiled reference that
other strategies are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vaepp_sdk import UnsupportedError
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed, land, landing_moves
from vaepp_sdk.vae.plan import Box, Window, Work, WorkPlan


class WholeStrategy:
    """Everything on one rank.

    Args:
        owner: the rank that works; it must be one of the VAE ranks.
    """

    def __init__(self, owner: int = 0) -> None:
        self.owner = owner

    def plan(self, facts: VaeFacts, work: Work) -> WorkPlan:
        """Deal one window to the owner.

        Raises:
            UnsupportedError: the owner is not one of the VAE ranks.
        """
        if self.owner >= work.ranks:
            raise UnsupportedError(f"owner is {self.owner}; it must be below the VAE PP size of {work.ranks}")
        shape = facts.out_shape(work.direction, work.shape)
        source = Box(0, 0, work.shape[-2], work.shape[-1])
        window = Window(0, self.owner, source, Box(0, 0, shape[-2], shape[-1]))
        nbytes = {0: work.landed_bytes(shape)}
        pixels = max(shape[-2] * shape[-1], source.area) * work.shape[0]
        peak = int(pixels * facts.peak_values_per_pixel * work.itemsize)
        return WorkPlan(
            strategy="whole",
            work=work,
            windows=(window,),
            out_shape=shape,
            moves=landing_moves((window,), nbytes, work.output, work.world_size, 0),
            peak_bytes=tuple(peak if rank == self.owner else 0 for rank in range(work.ranks)),
        )

    def check(self, adapter: VaeAdapter) -> None:
        """Every VAE can be run whole."""

    def decode(self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: WorkPlan) -> Landed:
        """Decode on the owner, then land."""
        return self._run(lambda z: adapter.finish_decode(adapter.decode_window(z)), latent, group, plan)

    def encode(self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: WorkPlan) -> Landed:
        """Encode on the owner, then land."""
        return self._run(adapter.encode_window, picture, group, plan)

    def _run(
        self,
        work_on: Callable[[torch.Tensor], torch.Tensor],
        value: torch.Tensor,
        group: VaeGroup,
        plan: WorkPlan,
    ) -> Landed:
        pieces = {0: work_on(value)} if group.rank == self.owner else {}
        return land(pieces, group, plan, value.dtype, value.device)
