"""`shard` by its `deterministic` option: rounding may differ, or may not."""

from __future__ import annotations

from typing import Any, Literal

from vaepp_sdk.vae.strategy import Strategy
from vaepp_strategies.shard_grid import GridStrategy
from vaepp_strategies.shard_options import refuse_conflict
from vaepp_strategies.shard_reference import ReferenceStrategy
from vaepp_strategies.shard_run import ShardStrategy
from vaepp_strategies.shard_turns import BlockStrategy

__all__ = ["Deterministic", "shard_strategy"]

Deterministic = Literal["off", "reference", "ranks"]


def shard_strategy(deterministic: Deterministic = "off", **options: Any) -> Strategy[Any]:
    """The strategy for a set of options; see the entry of `shard` for what they mean.

    Raises:
        UnsupportedError: the options do not go together.
    """
    refuse_conflict(deterministic=deterministic, **options)
    if deterministic == "off":
        blocks = {"row_blocks", "peak_limit"} & options.keys()
        return BlockStrategy(**options) if blocks else ShardStrategy(**options)
    return ReferenceStrategy() if deterministic == "reference" else GridStrategy()
