"""The VAE classes vaepp serves, and the strategies validated for each."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_plugins.rules import tile_or_patch
from vaepp_sdk import VaeEntry, hookimpl
from vaepp_sdk.entries import PickRule
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work

VAEPP_API = 1


def _always_patch(facts: VaeFacts, work: Work) -> str:
    """The only validated strategy of classes whose own tiling is an algorithm of its own."""
    del facts, work
    return "patch"


def _entry(name: str, adapter: str, strategies: tuple[str, ...], pick: PickRule = tile_or_patch) -> VaeEntry:
    return VaeEntry(name=name, adapter=adapter, strategies=strategies, pick=pick)


@hookimpl
def vaepp_register_vaes(register: Callable[[VaeEntry], None]) -> None:
    """Register the first-party VAE classes."""
    register(_entry("AutoencoderKL", "vaepp_plugins.vae_kl:KLAdapter", ("tile", "patch", "shard")))
    register(_entry("AutoencoderKLFlux2", "vaepp_plugins.vae_kl:KLAdapter", ("tile", "patch", "shard")))
    register(
        _entry("AutoencoderTiny", "vaepp_plugins.vae_tiny:TinyAdapter", ("patch", "shard"), _always_patch)
    )
