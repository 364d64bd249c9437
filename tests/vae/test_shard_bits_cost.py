"""Peak, work and bytes of `deterministic` at full width, counted on shapes; docs/shard.md has the figures."""

from __future__ import annotations

from typing import Any

import pytest
from test_shard_cost import (  # type: ignore[import-not-found]  # beside this file, not on mypy's path
    flux_vae,
    strategy_cost,
    untiled_cost,
)
from vaepp_strategies.shard_modes import Deterministic, shard_strategy

from vaepp_sdk.vae.facts import Direction

LIMITS: dict[Deterministic, tuple[float, float]] = {
    # Peak and work times the ranks, against the untiled run: four ranks.
    "reference": (2.9, 1.4),
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
