"""Which strategy serves a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from vaepp_sdk.entries import PickRule, load_object
from vaepp_sdk.errors import UnsupportedError
from vaepp_sdk.options import option_faults
from vaepp_sdk.registry import Registry
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work, WorkPlan
from vaepp_sdk.vae.strategy import Strategy

__all__ = ["AUTO", "StrategyChooser"]

AUTO = "auto"
"""The strategy name that leaves the choice to the entry's rule, made anew for each shape."""


@attrs.define(eq=False)
class StrategyChooser:
    """Builds strategies by name and plans each piece of work once.

    Attributes:
        registry: where strategies are looked up.
        name: a strategy's name, or `auto`.
        allowed: the strategies validated for this VAE and pipeline.
        pick: the rule behind `auto`.
        options: the options of the named strategy.
    """

    registry: Registry
    name: str
    allowed: tuple[str, ...]
    pick: PickRule
    options: Mapping[str, Any] = attrs.field(factory=dict)
    _built: dict[str, Strategy[Any]] = attrs.field(factory=dict, init=False)
    _plans: dict[tuple[VaeFacts, Work], tuple[Strategy[Any], WorkPlan]] = attrs.field(
        factory=dict, init=False
    )

    def __attrs_post_init__(self) -> None:
        if self.name == AUTO:
            if self.options:
                names = ", ".join(sorted(self.options))
                raise UnsupportedError(f"strategy 'auto' takes no options (found {names}); name a strategy")
            return
        entry = self.registry.strategy(self.name)
        self._check_allowed(self.name)
        faults = option_faults(entry, self.options, "options")
        if faults:
            raise UnsupportedError("\n".join(str(fault) for fault in faults))

    @property
    def uses_tiling(self) -> bool:
        """Whether the VAE's own tiling must be on for a strategy this may choose."""
        names = self.allowed if self.name == AUTO else (self.name,)
        return any(self.registry.strategy(name).uses_tiling for name in names)

    def plan(self, adapter: VaeAdapter, facts: VaeFacts, work: Work) -> tuple[Strategy[Any], WorkPlan]:
        """The strategy and its plan for one piece of work; planned once per facts and work.

        Raises:
            UnsupportedError: this work or this VAE cannot be done; on every rank alike.
        """
        key = (facts, work)
        if key not in self._plans:
            name = self.pick(facts, work) if self.name == AUTO else self.name
            strategy = self._strategy(name, adapter)
            self._plans[key] = (strategy, strategy.plan(facts, work))
        return self._plans[key]

    def _strategy(self, name: str, adapter: VaeAdapter) -> Strategy[Any]:
        if name not in self._built:
            self._check_allowed(name)
            factory = load_object(self.registry.strategy(name).factory, f"strategy {name!r}")
            strategy: Strategy[Any] = factory(**self.options)
            strategy.check(adapter)
            self._built[name] = strategy
        return self._built[name]

    def _check_allowed(self, name: str) -> None:
        if name not in self.allowed:
            allowed = ", ".join(self.allowed) or "none"
            raise UnsupportedError(f"strategy {name!r} is not validated here; validated: {allowed}")
