"""Row blocks of clips: several bands on each rank, which runs them in turn.

The row blocks of pictures run two or three layers on a block at a time, and store whole activations between
them. Video VAEs keep frames of every layer for the next ones, and are no straight sequence of layers. Bands
that stop at every exchange store what stands there, and one of them at a time is at its peak.
"""

from __future__ import annotations

import torch

from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.landing import Landed
from vaepp_sdk.vae.plan import Work
from vaepp_strategies.shard_grid import GridPlan, plan_grid, run_grid
from vaepp_strategies.shard_limit import RowBlocks, block_counts, shown_bytes
from vaepp_strategies.shard_plan import ShardPlan
from vaepp_strategies.shard_run import ShardStrategy

__all__ = ["BlockStrategy", "plan_clip_blocks"]


class BlockStrategy(ShardStrategy):
    """`shard` in row blocks, of pictures as of clips."""

    def plan(self, facts: VaeFacts, work: Work) -> ShardPlan | GridPlan:  # type: ignore[override]
        """See `Strategy.plan`."""
        if not facts.temporal_ratio or self._row_blocks is None:
            return super().plan(facts, work)
        return plan_clip_blocks(facts, work, self._row_blocks)

    def decode(
        self, adapter: VaeAdapter, latent: torch.Tensor, group: VaeGroup, plan: ShardPlan | GridPlan
    ) -> Landed:
        """See `Strategy.decode`."""
        if isinstance(plan, GridPlan):
            return run_grid(adapter, latent, group, plan)
        return super().decode(adapter, latent, group, plan)

    def encode(
        self, adapter: VaeAdapter, picture: torch.Tensor, group: VaeGroup, plan: ShardPlan | GridPlan
    ) -> Landed:
        """See `Strategy.encode`."""
        if isinstance(plan, GridPlan):
            return run_grid(adapter, picture, group, plan)
        return super().encode(adapter, picture, group, plan)


def plan_clip_blocks(facts: VaeFacts, work: Work, wanted: RowBlocks) -> GridPlan:
    """Give each rank as many bands as asked for, or the fewest that keep the limit.

    Args:
        facts: the VAE.
        work: what is asked.
        wanted: the options.

    Raises:
        UnsupportedError: as the plain mode; or no number of bands keeps the limit (the smallest that can be
            kept is named); or activations of clips are to be computed again.
    """
    if wanted.recompute == "always":
        raise UnsupportedError(f"recompute = 'always' takes pictures; {facts.vae_class} takes clips")
    if wanted.count:
        return plan_grid(facts, work, wanted.count * work.ranks)
    side = max(work.shape[-2:])
    most = max(1, side // (1 if work.direction == "decode" else facts.spatial_ratio) // work.ranks)
    least = None
    for count in block_counts(most):
        plan = plan_grid(facts, work, count * work.ranks)
        if max(plan.peak_bytes) <= wanted.limit:
            return plan
        least = min(max(plan.peak_bytes), least or max(plan.peak_bytes))
    raise UnsupportedError(
        f"strategy 'shard' cannot {work.direction} shape {work.shape} on {work.ranks} ranks within "
        f"peak_limit {shown_bytes(wanted.limit)}: the smallest that can be kept is {shown_bytes(least or 0)}"
    )
