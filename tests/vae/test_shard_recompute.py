"""Activations computed again instead of stored: the untiled result within lower limits, at a known price."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from shard_cases import Case, close, expect, prepared, whole
from test_shard_clip_cost import (  # type: ignore[import-not-found]  # likewise
    full,
    told_and_counted,
)
from test_shard_cost import (  # type: ignore[import-not-found]  # beside this file, not on mypy's path
    Cost,
    flux_vae,
    strategy_cost,
    untiled_cost,
    work_of,
)
from vaepp_plugins.vae_dc import DCAdapter
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_strategies.shard_modes import shard_strategy
from vaepp_strategies.shard_run import ShardStrategy

from vaepp_sdk import UnsupportedError, parallelize_vae
from vaepp_sdk.testing import LiveBytes
from vaepp_sdk.vae.facts import Direction

# As in the real VAE: widths fall where the picture grows, so shortcuts stand behind the upsamplings.
WIDTHS = {"widths": (8, 16, 32, 32)}
DECODE = Case((24, 16), build=WIDTHS, dtype=torch.float64, output="sharded")
ENCODE = Case((192, 128), build=WIDTHS, dtype=torch.float64, output="sharded", direction="encode")


@torch.no_grad()
def untiled_peak(case: Case) -> int:
    vae, value = prepared(case)
    with LiveBytes() as live:
        getattr(vae, case.direction)(value)
    return int(live.peak)


@pytest.mark.parametrize(
    ("case", "share", "again"),
    [
        (DECODE, 0.6, set()),
        (DECODE, 0.52, {"kept"}),
        (DECODE, 0.42, {"input"}),
        (DECODE, 0.36, {"input", "hidden"}),
        (ENCODE, 0.8, set()),
        (ENCODE, 0.6, {"hidden"}),
    ],
)
def test_every_step_of_a_falling_limit_gives_the_untiled_result(
    case: Case, share: float, again: set[str]
) -> None:
    vae, value = prepared(case)
    limit = int(untiled_peak(case) * share) // 1024
    wrapped = parallelize_vae(vae, strategy="shard", output=case.output, peak_limit=f"{limit}KiB")
    call = getattr(wrapped, case.direction)
    call(value)  # traces the layers, with tensors that have no memory
    with LiveBytes() as live:
        result = whole(call(value))
    plan = wrapped.last_plan
    assert {stage.recompute for stage in plan.blocks.sequence.stages} - {"nothing"} == again
    assert close(result, expect(case))
    assert live.peak <= plan.peak_bytes[0] <= limit * 1024


def test_the_option_is_refused_where_it_has_no_effect() -> None:
    with pytest.raises(UnsupportedError, match="recompute = 'always' has no effect without row blocks"):
        ShardStrategy(recompute="always")


def blocks_cost(direction: Direction, ranks: int, **options: Any) -> tuple[Cost, Any]:
    """What a rank in the middle costs, and the plan."""
    strategy, vae = ShardStrategy(**options), flux_vae()
    plan = strategy.plan(KLAdapter(vae).facts(), work_of(direction, 1024, ranks))
    return strategy_cost(strategy, vae, direction, 1024, ranks, ranks // 2), plan


# Blocks, recompute, ranks, peak, extra work: rows of the table in docs/shard.md.
TABLE: list[tuple[Direction, int, Any, int, float, float]] = [
    ("decode", 16, "never", 1, 0.557, 0.0),
    ("decode", 16, "always", 1, 0.314, 0.295),
    ("decode", 16, "always", 4, 0.081, 0.295),
    ("encode", 16, "never", 1, 0.426, 0.0),
    ("encode", 16, "always", 2, 0.150, 0.127),
]


@pytest.fixture(scope="module")
def untiled() -> dict[str, Cost]:
    vae = flux_vae()
    return {"decode": untiled_cost(vae, "decode", 1024), "encode": untiled_cost(vae, "encode", 1024)}


@pytest.mark.parametrize(("direction", "count", "recompute", "ranks", "peak", "extra"), TABLE)
def test_row_blocks_cost_what_is_said(
    untiled: dict[str, Cost],
    direction: Direction,
    count: int,
    recompute: Any,
    ranks: int,
    peak: float,
    extra: float,
) -> None:
    found, plan = blocks_cost(direction, ranks, row_blocks=count, recompute=recompute)
    whole = untiled[direction]
    assert found.peak / whole.peak == pytest.approx(peak, abs=0.0015)
    assert plan.blocks.extra_work == pytest.approx(extra, abs=0.001)
    # Bands repeat rows at their seams when they compute again: four of them, 0.4 %.
    assert found.work * ranks / whole.work == pytest.approx(1 + extra, abs=0.005)
    assert found.peak <= plan.peak_bytes[ranks // 2] <= 1.2 * found.peak


def test_a_limit_takes_the_least_work_that_keeps_it(untiled: dict[str, Cost]) -> None:
    facts, work = KLAdapter(flux_vae()).facts(), work_of("decode", 1024, 1)
    for share, extra in [(0.52, 0.0), (0.45, 0.118), (0.35, 0.236), (0.28, 0.295)]:
        limit = int(share * untiled["decode"].peak / 1024)
        plan = ShardStrategy(peak_limit=f"{limit}KiB").plan(facts, work)
        assert plan.peak_bytes[0] <= limit * 1024
        assert plan.blocks is not None
        assert plan.blocks.extra_work == pytest.approx(extra, abs=0.001)
    with pytest.raises(UnsupportedError, match="the smallest that can be kept is"):
        ShardStrategy(peak_limit=f"{limit}KiB", recompute="never").plan(facts, work)


HIGH = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
# What eight bands leave of the untiled peak on one rank at 1024 px, without and with rows computed again.
TURNS: dict[Direction, dict[str, float]] = {
    "decode": {"never": 0.477, "always": 0.3425},
    "encode": {"always": 0.392},
}


def test_bands_in_turn_cost_what_is_said() -> None:
    """The VAE of Sana, which is no straight sequence of layers."""
    sana = full(
        DCAdapter,
        diffusers.AutoencoderDC,
        encoder_block_types=HIGH,
        decoder_block_types=HIGH,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )
    for direction, peaks in TURNS.items():
        shape = (1, 32, 32, 32) if direction == "decode" else (1, 3, 1024, 1024)
        told, whole = told_and_counted(sana, direction, shape, 1)
        assert told == pytest.approx(1, abs=0.001)
        for recompute, peak in peaks.items():
            strategy = shard_strategy(row_blocks=8, recompute=recompute)
            told, counted = told_and_counted(sana, direction, shape, 1, strategy)
            assert counted / whole == pytest.approx(peak, abs=0.0015), (direction, recompute)
            assert 1 <= told <= 1.06, (direction, recompute, told)
