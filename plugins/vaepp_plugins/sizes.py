"""Which sizes the pipelines can make: what their VAE compresses, times the transformer's patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vaepp_sdk import SizeRule

__all__ = ["PACKED", "Configs", "Step", "kl_scale", "sides"]

Configs = Callable[[str], Mapping[str, Any]]
"""Gives a component's `config.json`."""

Step = Callable[[Configs], int]


def kl_scale(config: Configs) -> int:
    """Pixels of a latent row of `AutoencoderKL`: each level but the last halves the sides."""
    scale: int = 2 ** (len(config("vae")["block_out_channels"]) - 1)
    return scale


def sides(step: Step, width: Step | None = None) -> tuple[SizeRule, SizeRule]:
    """The rules of height and width; one step counts for both where no other is given."""
    return SizeRule(argument="height", step=step), SizeRule(argument="width", step=width or step)


PACKED = sides(lambda config: 2 * kl_scale(config))
"""Of pipelines that pack the latents of `AutoencoderKL` into patches of 2 x 2; most would round down."""
