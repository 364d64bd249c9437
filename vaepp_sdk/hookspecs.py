"""Every hook a plugin can implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vaepp_sdk.markers import hookspec

if TYPE_CHECKING:
    from vaepp_sdk.entries import PipelineEntry, StrategyEntry, VaeEntry
    from vaepp_sdk.events import StageEnd, StageStart

__all__ = [
    "vaepp_on_stage_end",
    "vaepp_on_stage_start",
    "vaepp_register_pipelines",
    "vaepp_register_strategies",
    "vaepp_register_vaes",
]


@hookspec
def vaepp_register_strategies(register: Callable[[StrategyEntry], None]) -> None:
    """Add strategies; called once, when the registry is built, before any rank starts.

    Args:
        register: call it once per strategy.
    """


@hookspec
def vaepp_register_vaes(register: Callable[[VaeEntry], None]) -> None:
    """Add VAE classes; called once, when the registry is built, before any rank starts.

    Args:
        register: call it once per VAE class.
    """


@hookspec
def vaepp_register_pipelines(register: Callable[[PipelineEntry], None]) -> None:
    """Add pipelines; called once, when the registry is built, before any rank starts.

    Args:
        register: call it once per pipeline class.
    """


@hookspec
def vaepp_on_stage_start(event: StageStart) -> None:
    """Observe a stage that is about to run; called on every rank. An exception becomes a warning.

    Args:
        event: rank, stage and request.
    """


@hookspec
def vaepp_on_stage_end(event: StageEnd) -> None:
    """Observe a stage that has ended, well or not; called on every rank. An exception becomes a warning.

    Args:
        event: rank, stage and request, seconds, peak memory, and the error if there was one.
    """
