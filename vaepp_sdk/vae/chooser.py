"""Which strategy serves a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import attrs

from vaepp_sdk.entries import PickRule, Rung, load_object
from vaepp_sdk.entry_checks import AUTO
from vaepp_sdk.errors import PluginError, UnsupportedError
from vaepp_sdk.options import option_faults
from vaepp_sdk.registry import Registry
from vaepp_sdk.vae.adapter import VaeAdapter
from vaepp_sdk.vae.facts import VaeFacts
from vaepp_sdk.vae.plan import Work, WorkPlan
from vaepp_sdk.vae.strategy import Strategy

__all__ = ["StrategyChooser"]


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
    _plans: dict[tuple[str, VaeFacts, Work], tuple[Strategy[Any], WorkPlan]] = attrs.field(
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
    def serves_one_rank(self) -> bool:
        """Whether the named strategy and its options have work to do where one rank does all of the VAE's."""
        return self.name != AUTO and self.registry.strategy(self.name).serves_one_rank(self.options)

    @property
    def uses_tiling(self) -> bool:
        """Whether the VAE's own tiling must be on for a strategy this may choose."""
        names = self.allowed if self.name == AUTO else (self.name,)
        return any(self.registry.strategy(name).uses_tiling for name in names)

    def check(self, adapter: VaeAdapter) -> None:
        """Let a strategy that was named refuse the VAE now, and not at the first call.

        Raises:
            PluginError: the strategy's factory does not take the options that its entry declares.
            UnsupportedError: the VAE cannot be run so; on every rank alike.
        """
        if self.name != AUTO:
            self._strategy(Rung(self.name, self.options), adapter)

    def plan(self, adapter: VaeAdapter, facts: VaeFacts, work: Work) -> tuple[Strategy[Any], WorkPlan]:
        """The strategy and its plan for one piece of work; planned once per facts and work.

        Raises:
            UnsupportedError: this work or this VAE cannot be done; on every rank alike.
        """
        return self._planned(self.top(facts, work), adapter, facts, work)

    def top(self, facts: VaeFacts, work: Work) -> Rung:
        """The strategy that was asked for, or that the rule picks, with its options."""
        name = self.pick(facts, work) if self.name == AUTO else self.name
        return Rung(name, self.options)

    def lighter(self, rung: Rung, facts: VaeFacts, work: Work) -> list[Rung]:
        """The ways down that a strategy's entry names, as far as they are registered and validated here."""
        rule = self.registry.strategy(rung.strategy).lighter
        if rule is None:
            return []
        found = load_object(rule, f"strategy {rung.strategy!r}")(rung.options, facts, work)
        known = set(self.allowed) & set(self.registry.strategies)
        return [one for one in found if one.strategy in known]

    def plan_rung(
        self, rung: Rung, adapter: VaeAdapter, facts: VaeFacts, work: Work
    ) -> tuple[Strategy[Any], WorkPlan]:
        """As `plan`, with a named strategy; the VAE's tiling is on for one that works on tiles.

        Raises:
            UnsupportedError: this work or this VAE cannot be done so; on every rank alike.
        """
        entry = self.registry.strategy(rung.strategy)
        faults = option_faults(entry, rung.options, "options")
        if faults:
            raise UnsupportedError("\n".join(str(fault) for fault in faults))
        if entry.uses_tiling:
            facts = attrs.evolve(facts, use_tiling=True)
        return self._planned(rung, adapter, facts, work)

    def _planned(
        self, rung: Rung, adapter: VaeAdapter, facts: VaeFacts, work: Work
    ) -> tuple[Strategy[Any], WorkPlan]:
        key = (_name(rung), facts, work)
        if key not in self._plans:
            strategy = self._strategy(rung, adapter)
            self._plans[key] = (strategy, strategy.plan(facts, work))
        return self._plans[key]

    def _strategy(self, rung: Rung, adapter: VaeAdapter) -> Strategy[Any]:
        key = _name(rung)
        if key not in self._built:
            self._check_allowed(rung.strategy)
            entry = self.registry.strategy(rung.strategy)
            factory = load_object(entry.factory, f"strategy {rung.strategy!r}")
            try:
                inspect.signature(factory).bind(**rung.options)
            except TypeError as error:
                raise PluginError(
                    f"strategy {rung.strategy!r}", f"its factory does not take its options: {error}"
                ) from error
            strategy: Strategy[Any] = factory(**rung.options)
            strategy.check(adapter)
            self._built[key] = strategy
        return self._built[key]

    def _check_allowed(self, name: str) -> None:
        if name not in self.allowed:
            allowed = ", ".join(self.allowed) or "none"
            raise UnsupportedError(f"strategy {name!r} is not validated here; validated: {allowed}")


def _name(rung: Rung) -> str:
    """A strategy with its options, as a key."""
    return repr((rung.strategy, sorted(rung.options.items())))
