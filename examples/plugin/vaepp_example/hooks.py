"""What the plugin adds. This module is imported before any rank starts, so it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

from vaepp_sdk import Option, StrategyEntry, hookimpl
from vaepp_sdk.events import StageEnd

VAEPP_API = 1


@hookimpl
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Add the strategy `whole`."""
    register(
        StrategyEntry(
            name="whole",
            factory="vaepp_example.whole:WholeStrategy",
            promise="bit-identical to the untiled decode on one rank",
            options=(Option(name="owner", kind="integer", default=0, minimum=0, help="the rank that works"),),
            validated_for=("AutoencoderKL", "ZImagePipeline"),
        )
    )


@hookimpl
def vaepp_on_stage_end(event: StageEnd) -> None:
    """Print how long each stage took on rank 0."""
    if event.rank == 0:
        print(f"vaepp-example: {event.stage} took {event.seconds:.2f} s", flush=True)
