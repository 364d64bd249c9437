"""Sharding trained autoencoders on photos: nothing shows at the seams."""

from __future__ import annotations

import pytest
import torch
from trained import RANGE, VAES, Untiled, load, needs_data, photo, untiled
from vaepp_plugins.vae_kl import KLAdapter
from vaepp_plugins.vae_tiny import TinyAdapter
from vaepp_strategies.shard_run import ShardStrategy

from vaepp_sdk.parallel.view import VaeGroup
from vaepp_sdk.testing import run_ranks
from vaepp_sdk.vae.plan import Work

Figures = dict[tuple[str, str], tuple[float, float, int]]
"""By photo and direction: the largest difference, that in 16 rows around each seam, and the ranks at work."""


@torch.no_grad()
def shard_photos(rank: int, name: str, photos: dict[str, Untiled]) -> Figures:
    vae = load(name)
    adapter = TinyAdapter(vae) if name == "taef2" else KLAdapter(vae)
    strategy, group = ShardStrategy(), VaeGroup.over(None, 3)
    strategy.check(adapter)
    figures = {}
    for picture, alone in photos.items():
        for direction in ("decode", "encode"):
            value = alone.latent if direction == "decode" else photo(picture)
            work = Work(
                direction=direction,
                shape=tuple(value.shape),
                itemsize=value.element_size(),
                ranks=3,
                world_size=3,
                output="all",
            )
            plan = strategy.plan(adapter.facts(), work)
            decoding = direction == "decode"
            found = (strategy.decode if decoding else strategy.encode)(adapter, value, group, plan).sample
            expected = alone.decoded if decoding else alone.moments
            assert found is not None
            apart = (found - expected).abs() / (RANGE if decoding else float(expected.abs().max()))
            axis = plan.parts.axis
            later = [window.target for window in plan.windows[1:]]
            starts = [box.top if axis == -2 else box.left for box in later]
            seams = [apart.narrow(axis, max(0, start - 8), 16).max().item() for start in starts]
            figures[picture, direction] = (apart.max().item(), max(seams), len(plan.windows))
    return figures


@needs_data
@pytest.mark.parametrize("name", VAES)
def test_no_photo_shows_a_seam(name: str) -> None:
    for figures in run_ranks(3, shard_photos, name, untiled(name), timeout=900):
        for case, (apart, seam, ranks) in figures.items():
            assert ranks == 3, case
            # Float32 rounding of some 60 layers; 8 bits of a picture show a share of 4e-3.
            assert apart <= 2e-5, (case, apart)
            assert seam <= 2e-5, (case, seam)
