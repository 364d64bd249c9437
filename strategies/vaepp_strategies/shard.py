"""The `shard` strategy: bands of rows without overlap; layers exchange what they need."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_sdk import StrategyEntry, hookimpl

VAEPP_API = 1

_ENTRY = StrategyEntry(
    name="shard",
    factory="vaepp_strategies.shard_run:ShardStrategy",
    promise=(
        "equal up to rounding to the untiled decode or encode on one rank; no seam and no repeated work"
    ),
)


@hookimpl
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Register the strategy."""
    register(_ENTRY)
