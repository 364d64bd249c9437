"""The `patch` strategy: disjoint cores with a halo, statistics and attention shared across the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vaepp_sdk import Option, StrategyEntry, hookimpl

VAEPP_API = 1

Share = Literal["statistics+kv", "none"]
"""What the ranks exchange while they decode or encode."""

_ENTRY = StrategyEntry(
    name="patch",
    factory="vaepp_strategies.patch_run:PatchStrategy",
    promise=(
        "mean difference from the untiled decode on one rank under 0.5 % of the output range, "
        "measured per allowlisted model"
    ),
    options=(
        Option(
            name="halo",
            kind="integer",
            minimum=0,
            help="Context on each side of a core, in latent rows: more is closer to the untiled decode, and "
            "costs memory and time. Unset, what was measured for the VAE class: 8 for the AutoencoderKL "
            "family, 12 for AutoencoderTiny.",
        ),
        Option(
            name="share",
            kind="string",
            default="statistics+kv",
            choices=("statistics+kv", "none"),
            help="What ranks exchange: normalisation statistics and attention's keys and values, or nothing, "
            "for which the promise does not hold.",
        ),
    ),
    lighter="vaepp_strategies.lighter:below_patch",
)


@hookimpl
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Register the strategy."""
    register(_ENTRY)
