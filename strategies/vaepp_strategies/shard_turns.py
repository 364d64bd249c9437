"""Row blocks as bands: several on each rank, which runs them in turn.

Where a VAE is one straight sequence of layers, its row blocks run two or three layers on a block at a time,
and store whole activations between them. Other VAEs have shortcuts around many layers, or keep frames of
every layer for the next ones. Bands that stop at every exchange store what stands there, and one of them at a
time is at its peak.
"""

from __future__ import annotations

import itertools

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
from vaepp_strategies.shard_stages import is_straight
from vaepp_strategies.shard_steps import shard_steps

__all__ = ["BlockStrategy", "plan_turns"]


class BlockStrategy(ShardStrategy):
    """`shard` in row blocks, of any VAE."""

    def plan(self, facts: VaeFacts, work: Work) -> ShardPlan | GridPlan:  # type: ignore[override]
        """See `Strategy.plan`."""
        trace = None if facts.temporal_ratio else facts.layers(work.direction)
        if self._row_blocks is None or (trace is not None and is_straight(trace)):
            return super().plan(facts, work)
        return plan_turns(facts, work, self._row_blocks)

    def run(
        self, adapter: VaeAdapter, value: torch.Tensor, group: VaeGroup, plan: ShardPlan | GridPlan
    ) -> Landed:
        """See `ShardStrategy.run`."""
        if isinstance(plan, GridPlan):
            return run_grid(adapter, value, group, plan)
        return super().run(adapter, value, group, plan)


def plan_turns(facts: VaeFacts, work: Work, wanted: RowBlocks) -> GridPlan:
    """Give each rank as many bands as asked for, or the fewest that keep the limit.

    Where activations may be computed again, convolutions that follow one another exchange once: the first one
    computes what the next ones read beyond their band, so nothing of theirs stands while other bands run.

    Args:
        facts: the VAE.
        work: what is asked.
        wanted: the options.

    Raises:
        UnsupportedError: as the plain mode; or no number of bands keeps the limit (the smallest that can be
            kept is named); or nothing can be computed again, and that is asked for.
    """
    ways = _ways(facts, work, wanted)

    def plan_bands(count: int, chained: bool) -> GridPlan:
        # Whoever asks for row blocks is short of memory, not of time.
        return plan_grid(facts, work, count * work.ranks, chained, fewer_rounds=False)

    if wanted.count:
        return plan_bands(wanted.count, ways[0])
    side = max(work.shape[-2:])
    most = max(1, side // (1 if work.direction == "decode" else facts.spatial_ratio) // work.ranks)
    least = None
    for chained, count in itertools.product(ways, block_counts(most)):
        plan = plan_bands(count, chained)
        if max(plan.peak_bytes) <= wanted.limit:
            return plan
        least = min(max(plan.peak_bytes), least or max(plan.peak_bytes))
    raise UnsupportedError(
        f"strategy 'shard' cannot {work.direction} shape {work.shape} on {work.ranks} ranks within "
        f"peak_limit {shown_bytes(wanted.limit)}: the smallest that can be kept is {shown_bytes(least or 0)}"
    )


def _ways(facts: VaeFacts, work: Work, wanted: RowBlocks) -> tuple[bool, ...]:
    """Without and with rows that are computed again, as far as that is asked for and is another plan."""
    trace = None if facts.temporal_ratio else facts.layers(work.direction)
    able = trace is not None and shard_steps(trace, chained=True) != shard_steps(trace)
    if wanted.recompute == "always" and not able:
        raise UnsupportedError(
            f"recompute = 'always' has no effect on {work.direction} of {facts.vae_class}, whose row blocks "
            "run in turn: no convolution of a picture reads what another one gave; leave it out"
        )
    if wanted.recompute == "always":
        return (True,)
    return (False, True) if able and wanted.recompute == "auto" and wanted.limit else (False,)
