"""Peak, work and bytes of `deterministic` at full width, counted on shapes; docs/shard.md has the figures."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from test_shard_clip_cost import full  # type: ignore[import-not-found]  # beside this file, not on mypy's path
from test_shard_cost import (  # type: ignore[import-not-found]  # likewise
    adapter_cost,
    flux_vae,
    strategy_cost,
    untiled_adapter_cost,
    untiled_cost,
    work_on,
)
from vaepp_plugins.vae_wan import WanAdapter
from vaepp_strategies.shard_modes import Deterministic, shard_strategy

from vaepp_sdk.vae.facts import Direction

LIMITS: dict[Deterministic, tuple[float, float]] = {
    # Peak and work times the ranks, against the untiled run: four ranks.
    "reference": (2.9, 1.6),
    "ranks": (1.03, 1.03),
}


def bits_cost(vae: Any, mode: Deterministic, direction: Direction, pixels: int, ranks: int, rank: int) -> Any:
    strategy = shard_strategy(deterministic=mode)
    return strategy_cost(strategy, vae, direction, pixels, ranks, rank)


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


def test_a_clip_costs_what_is_said() -> None:
    adapter, shape = full(WanAdapter, diffusers.AutoencoderKLWan), (1, 16, 3, 60, 104)
    strategy = shard_strategy(deterministic="reference")
    whole = untiled_adapter_cost(adapter, "decode", shape)
    share = adapter_cost(strategy, adapter, "decode", shape, 4, 1)
    assert share.peak * 4 <= 1.3 * whole.peak, share.peak * 4 / whole.peak
    assert share.work * 4 <= 1.13 * whole.work, share.work * 4 / whole.work
    plan = strategy.plan(adapter.facts(), work_on("decode", shape, 4))
    assert 1 <= plan.peak_bytes[1] / share.peak <= 1.7, plan.peak_bytes[1] / share.peak
