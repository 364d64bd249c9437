"""The VAE classes vaepp serves, and the strategies validated for each."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_plugins.rules import tile_or_patch
from vaepp_plugins.vae_configs import kl_facts, qwen_image_facts, wan_facts
from vaepp_sdk import VaeEntry, hookimpl
from vaepp_sdk.entries import PickRule
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work

VAEPP_API = 1


def _always_patch(facts: VaeFacts, work: Work) -> str:
    """The only validated strategy of classes whose own tiling is an algorithm of its own."""
    del facts, work
    return "patch"


def _always_tile(facts: VaeFacts, work: Work) -> str:
    """The only strategy validated for classes whose tiles cover every input, as one tile if need be."""
    del facts, work
    return "tile"


_TILED = {
    "AutoencoderDC": "vae_dc:DCAdapter",
    "AutoencoderKLCogVideoX": "vae_cogvideox:CogVideoXAdapter",
    "AutoencoderKLHunyuanImage": "vae_hunyuan:HunyuanImageAdapter",
    "AutoencoderKLHunyuanVideo": "vae_hunyuan:HunyuanVideoAdapter",
    "AutoencoderKLHunyuanVideo15": "vae_hunyuan:HunyuanVideo15Adapter",
    "AutoencoderKLLTX2Video": "vae_ltx:LTX2VideoAdapter",
    "AutoencoderKLLTXVideo": "vae_ltx:LTXVideoAdapter",
    "AutoencoderKLMochi": "vae_mochi:MochiAdapter",
    "AutoencoderKLQwenImage": "vae_wan:QwenImageAdapter",
    "AutoencoderKLWan": "vae_wan:WanAdapter",
}
"""Classes beyond the KL family, each with its adapter."""

_SHARDED = (
    "AutoencoderDC",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLLTX2Video",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
)
"""Those of them that `shard` was validated for."""


_FACTS = {
    "AutoencoderKL": kl_facts,
    "AutoencoderKLFlux2": kl_facts,
    "AutoencoderKLQwenImage": qwen_image_facts,
    "AutoencoderKLWan": wan_facts,
}
"""What reads facts from a configuration, for the classes that pipelines on the allowlist have."""


def _entry(name: str, adapter: str, strategies: tuple[str, ...], pick: PickRule = tile_or_patch) -> VaeEntry:
    return VaeEntry(name=name, adapter=adapter, strategies=strategies, pick=pick, facts=_FACTS.get(name))


@hookimpl
def vaepp_register_vaes(register: Callable[[VaeEntry], None]) -> None:
    """Register the first-party VAE classes."""
    register(_entry("AutoencoderKL", "vaepp_plugins.vae_kl:KLAdapter", ("tile", "patch", "shard")))
    register(_entry("AutoencoderKLFlux2", "vaepp_plugins.vae_kl:KLAdapter", ("tile", "patch", "shard")))
    register(
        _entry("AutoencoderTiny", "vaepp_plugins.vae_tiny:TinyAdapter", ("patch", "shard"), _always_patch)
    )
    for name, adapter in _TILED.items():
        strategies = ("tile", "shard") if name in _SHARDED else ("tile",)
        register(_entry(name, f"vaepp_plugins.{adapter}", strategies, _always_tile))
