"""Peak, work and bytes of `deterministic` at full width, counted on shapes; docs/shard.md has the figures."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from test_shard_cost import (  # type: ignore[import-not-found]  # beside this file, not on mypy's path
    Cost,
    SilentGroup,
    _shape,
    cost,
    flux_vae,
    untiled_cost,
)
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_strategies.shard_modes import Deterministic, shard_strategy

from vaepp_sdk.vae.facts import Direction
from vaepp_sdk.vae.plan import Work

LIMITS: dict[Deterministic, tuple[float, float]] = {
    # Peak and work times the ranks, against the untiled run: four ranks.
    "reference": (2.9, 1.4),
    "ranks": (1.03, 1.03),
}


def bits_cost(
    vae: Any, mode: Deterministic, direction: Direction, pixels: int, ranks: int, rank: int
) -> Cost:
    adapter = KLAdapter(vae)
    strategy: Any = shard_strategy(deterministic=mode)
    value = torch.empty(_shape(direction, pixels), dtype=torch.bfloat16, device="meta")
    work = Work(
        direction=direction,
        shape=tuple(value.shape),
        itemsize=2,
        ranks=ranks,
        world_size=ranks,
        output="sharded",
    )
    plan = strategy.plan(adapter.facts(), work)
    group = SilentGroup(None, rank, ranks, ranks, timedelta(seconds=1))
    run = strategy.decode if direction == "decode" else strategy.encode

    def run_once() -> None:
        group.traffic.reset()
        run(adapter, value, group, plan)

    found = cost(run_once)
    assert group.traffic.nbytes == plan.bytes_sent(rank)
    return Cost(found.peak, found.work, group.traffic.nbytes)


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("mode", ["reference", "ranks"])
def test_equal_bits_cost_what_is_said(mode: Deterministic, direction: Direction) -> None:
    vae = flux_vae()
    whole = untiled_cost(vae, direction, 1024)
    peak_limit, work_limit = LIMITS[mode]
    for ranks in (2, 4):
        share = bits_cost(vae, mode, direction, 1024, ranks, 1)  # rank 0 checks kernels besides
        peak, work = share.peak * ranks / whole.peak, share.work * ranks / whole.work
        assert peak <= peak_limit, (ranks, peak)
        assert work <= work_limit, (ranks, work)
