"""Rules behind `strategy = "auto"`."""

from __future__ import annotations

from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work

__all__ = ["tile_or_patch"]


def tile_or_patch(facts: VaeFacts, work: Work) -> str:
    """`tile` where the VAE's own tiling fires for this shape, `patch` below it."""
    return "tile" if facts.tiling_fires(work.direction, work.shape) else "patch"
