"""The `shard` strategy: bands of rows without overlap; layers exchange what they need."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_sdk import Option, StrategyEntry, hookimpl
from vaepp_strategies.shard_options import shard_conflict

VAEPP_API = 1

_ENTRY = StrategyEntry(
    name="shard",
    factory="vaepp_strategies.shard_modes:shard_strategy",
    promise=(
        "equal up to rounding to the untiled decode or encode on one rank; no seam, next to no repeated work"
    ),
    options=(
        Option(
            name="deterministic",
            kind="string",
            default="off",
            choices=("off", "reference", "ranks"),
            help="Equal bits: `reference`, those of the untiled result on one rank; `ranks`, the same ones "
            "for every number of ranks.",
        ),
        Option(
            name="repeat",
            kind="string",
            default="auto",
            choices=("auto", "never", "always"),
            help="How many positions of a decoder's attention a rank computes for its peers, instead of "
            "receiving them: as many as little work allows, none, or all.",
        ),
        Option(
            name="row_blocks",
            kind="integer",
            default=1,
            minimum=1,
            help="Blocks of rows in which each rank runs its largest layers; more blocks lower the peak.",
        ),
        Option(
            name="peak_limit",
            kind="string",
            help='The most live bytes of a rank, weights excluded, as in "6GiB"; chooses row_blocks itself.',
        ),
        Option(
            name="recompute",
            kind="string",
            default="auto",
            choices=("auto", "never", "always"),
            help="Beside row blocks: activations are computed again instead of stored where peak_limit "
            "cannot be kept otherwise (`auto`), `never`, or wherever it lowers the peak (`always`).",
        ),
    ),
    single_rank_options=("row_blocks", "peak_limit", "recompute", "deterministic"),
    conflict=shard_conflict,
    lighter="vaepp_strategies.lighter:below_shard",
)


@hookimpl
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Register the strategy."""
    register(_ENTRY)
