"""The project's hook markers: the quick start for plugin authors.

A plugin is a module, named by an entry point of the group `vaepp_sdk`::

    # pyproject.toml
    [project.entry-points.vaepp_sdk]
    my_strategy = "vaepp_my_strategy"

    # vaepp_my_strategy.py
    from vaepp_sdk import StrategyEntry, hookimpl

    VAEPP_API = 1

    @hookimpl
    def vaepp_register_strategies(register):
        register(StrategyEntry(name="mine", factory="vaepp_my_strategy.core:MyStrategy", promise="..."))

Keep the module light: it is imported before any rank starts, and heavy imports belong in the module that
`factory` names. Every hook stands in `vaepp_sdk.hookspecs`.
"""

from __future__ import annotations

import pluggy

__all__ = ["API_VERSION", "PROJECT", "hookimpl", "hookspec"]

PROJECT = "vaepp_sdk"
"""The name of the plugin manager and of the entry-point group."""

API_VERSION = 1
"""The plugin API of this release. A plugin states the one it was written for as `VAEPP_API`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
