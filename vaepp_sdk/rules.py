"""The kinds of rules in entries: a plugin's own functions, which decide alike wherever they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaepp_sdk.entries import Rung
    from vaepp_sdk.vae.facts import VaeFacts
    from vaepp_sdk.vae.plan import Work

__all__ = ["ConflictRule", "FactsRule", "LighterRule", "PickRule", "UnfitRule"]

ConflictRule = Callable[[Mapping[str, Any]], tuple[str, str] | None]
"""Says why options cannot be set together, as what was found and what would work, or None."""

FactsRule = Callable[[Mapping[str, Any]], "VaeFacts"]
"""Reads a VAE's facts from its `config.json`, as they are before anybody changes a setting."""

UnfitRule = Callable[[Mapping[str, Any], "VaeFacts"], tuple[str, str] | None]
"""Says why a strategy's options do not fit a VAE, as what was found and what would work, or None."""

LighterRule = Callable[[Mapping[str, Any], "VaeFacts", "Work"], Sequence["Rung"]]
"""Names the ways down from a strategy with these options: pure, from facts that every rank has."""

PickRule = Callable[["VaeFacts", "Work"], str]
"""Chooses a strategy by name for one piece of work, from facts that every rank has."""
