"""Attention, whose positions every rank holds, is never what a rank's peak comes from.

So keys and values that travel in a ring, of which a rank holds its own and a neighbour's only, would lower no
peak. Counted on shapes, as in `test_shard_cost`; all of it is linear in the pixels, but for blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from test_shard_cost import SilentGroup, flux_vae, work_of  # type: ignore[import-not-found]  # beside this
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_strategies import shard_blocks
from vaepp_strategies.shard_run import ShardStrategy

from vaepp_sdk.testing import LiveBytes

LIGHTEST = ShardStrategy(row_blocks=64, recompute="always")


class _BehindAttentionError(Exception):
    """The layer behind the attention was reached."""


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """As fused kernels do it: no matrix of scores in memory."""
    del key
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@contextmanager
def ending_behind_attention(vae: Any) -> Iterator[None]:
    """Leave the block when a decode has done its attention, with or without row blocks."""
    behind = vae.decoder.mid_block.resnets[1]
    run = shard_blocks._Runner.run

    def leave(*_: Any) -> None:
        raise _BehindAttentionError

    def stage(runner: Any, held: list[torch.Tensor]) -> torch.Tensor:
        if runner.stage.names[0] == "decoder.mid_block.resnets.1":
            leave()
        return run(runner, held)

    hook = behind.register_forward_pre_hook(leave)
    try:
        with patch.object(shard_blocks._Runner, "run", stage):
            yield
    except _BehindAttentionError:
        pass
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("pixels", "ranks", "strategy"),
    [(1024, 4, ShardStrategy()), (1024, 8, LIGHTEST)],
)
def test_attention_holds_less_than_the_largest_layer(pixels: int, ranks: int, strategy: Any) -> None:
    vae = flux_vae()
    adapter, work = KLAdapter(vae), work_of("decode", pixels, ranks)
    latent = torch.empty(work.shape, dtype=torch.bfloat16, device="meta")
    plan = strategy.plan(adapter.facts(), work)
    group = SilentGroup(None, 1, ranks, ranks, timedelta(seconds=1))
    peaks = []
    with torch.no_grad(), patch.object(F, "scaled_dot_product_attention", fused):
        with LiveBytes() as live:
            strategy.decode(adapter, latent, group, plan)
        peaks.append(live.peak)
        with LiveBytes() as live, ending_behind_attention(vae):
            strategy.decode(adapter, latent, group, plan)
        peaks.append(live.peak)
    everything, attention = peaks
    positions = 512 * (pixels // 8) ** 2 * 2
    assert positions < attention < 0.65 * everything
