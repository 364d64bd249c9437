"""Plugins, the allowlist, and lookup.

Built-in strategies and pipelines come in through the same entry points and hooks as everyone else's. Two
environment variables choose plugins, each a comma-separated list of entry-point names:

* `VAEPP_PLUGINS_ONLY` loads these and no others;
* `VAEPP_PLUGINS_BLOCK` leaves these out.

`VAEPP_PLUGINS_TRACE=1` prints every hook call to stderr.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import attrs
import pluggy

from vaepp_sdk import hookspecs
from vaepp_sdk.entries import PipelineEntry, StrategyEntry, VaeEntry
from vaepp_sdk.errors import PluginError, UnsupportedError, UserError, VaeppWarning
from vaepp_sdk.events import StageEnd, StageStart
from vaepp_sdk.markers import API_VERSION, PROJECT
from vaepp_sdk.options import nearest
from vaepp_sdk.text import shown, told

__all__ = ["Plugin", "Registry", "default_registry"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


EntryT = TypeVar("EntryT", bound=_Named)
AllowT = TypeVar("AllowT", VaeEntry, PipelineEntry)


@attrs.frozen
class Plugin:
    """One plugin as found.

    Attributes:
        name: its entry-point name.
        distribution: the package and version that ships it.
        problem: why it is not in use, or None.
    """

    name: str
    distribution: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.name!r} (from {self.distribution})"


@attrs.define
class _Shelf(Generic[EntryT]):
    """Entries of one kind by name, and the plugin each came from."""

    noun: str
    entry_type: type[EntryT]
    entries: dict[str, EntryT] = attrs.field(factory=dict)
    sources: dict[str, Plugin] = attrs.field(factory=dict)

    def add(self, entry: EntryT, plugin: Plugin) -> None:
        if not isinstance(entry, self.entry_type):
            wanted = self.entry_type.__name__
            raise PluginError(str(plugin), f"registers {type(entry).__name__} where {wanted} is wanted")
        if entry.name in self.entries:
            other = self.sources[entry.name]
            raise PluginError(
                str(plugin),
                f"registers the {self.noun} {entry.name!r}, which plugin {other} already registers; "
                f"block one of them with VAEPP_PLUGINS_BLOCK={plugin.name} or {other.name}",
            )
        self.entries[entry.name] = entry
        self.sources[entry.name] = plugin


@attrs.define(eq=False)
class Registry:
    """Every plugin that loaded, and what they registered.

    Attributes:
        plugins: every plugin found, in order of name, those not in use with the reason.
    """

    plugins: list[Plugin] = attrs.field(factory=list)
    _manager: pluggy.PluginManager = attrs.field(factory=lambda: _new_manager())
    _strategies: _Shelf[StrategyEntry] = attrs.field(factory=lambda: _Shelf("strategy", StrategyEntry))
    _vaes: _Shelf[VaeEntry] = attrs.field(factory=lambda: _Shelf("VAE class", VaeEntry))
    _pipelines: _Shelf[PipelineEntry] = attrs.field(factory=lambda: _Shelf("pipeline", PipelineEntry))

    @classmethod
    def load(cls) -> Registry:
        """Find, import and register every plugin that the environment allows.

        Raises:
            PluginError: a plugin with a duplicate name, a hook that does not fit, another API version, or an
                entry that is registered twice. A plugin that raises while it is imported is set aside and
                named in `problems`.
        """
        registry = cls()
        for found in _allowed_entry_points():
            plugin = Plugin(found.name, _distribution(found))
            try:
                module = found.load()
            except (Exception, SystemExit) as error:
                problem = f"it cannot be imported: {told(error)}"
                registry.plugins.append(attrs.evolve(plugin, problem=problem))
                continue
            registry.add(plugin, module)
        return registry

    def add(self, plugin: Plugin, module: object) -> None:
        """Register one plugin module and what its hooks add.

        Raises:
            PluginError: as `load`.
        """
        _check_api(plugin, module)
        try:
            self._manager.register(module, name=plugin.name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(str(plugin), f"{error}; hooks stand in vaepp_sdk.hookspecs") from error
        self.plugins.append(plugin)
        self._call_one(plugin, "vaepp_register_strategies", self._strategies)
        self._call_one(plugin, "vaepp_register_vaes", self._vaes)
        self._call_one(plugin, "vaepp_register_pipelines", self._pipelines)

    @property
    def problems(self) -> list[str]:
        """One sentence for each plugin that was found and set aside."""
        return [
            f"plugin {plugin} is set aside: {plugin.problem}" for plugin in self.plugins if plugin.problem
        ]

    @property
    def strategies(self) -> Mapping[str, StrategyEntry]:
        """Strategies by name."""
        return MappingProxyType(self._strategies.entries)

    @property
    def vaes(self) -> Mapping[str, VaeEntry]:
        """VAE classes by name, each with every strategy validated for it."""
        return MappingProxyType({name: self._validated(entry) for name, entry in self._vaes.entries.items()})

    @property
    def pipelines(self) -> Mapping[str, PipelineEntry]:
        """Pipelines by diffusers class name, each with every strategy validated for it."""
        return MappingProxyType(
            {name: self._validated(entry) for name, entry in self._pipelines.entries.items()}
        )

    @property
    def allowlist(self) -> tuple[str, ...]:
        """The pipelines validated for VAE PP, sorted."""
        return tuple(sorted(name for name, entry in self.pipelines.items() if entry.strategies))

    def strategy(self, name: str) -> StrategyEntry:
        """Look a strategy up.

        Raises:
            UnsupportedError: there is none of that name; says what is known and which plugins are set aside.
        """
        if name not in self.strategies:
            raise UnsupportedError(self._missing("strategy", name, self.strategies))
        return self.strategies[name]

    def vae(self, vae_class: type) -> VaeEntry:
        """Look up the entry that serves a VAE class: its own, or that of a base whose methods it keeps.

        Raises:
            UnsupportedError: none serves it.
        """
        for base in vae_class.__mro__:
            if base.__name__ in self.vaes and _keeps_methods(vae_class, base):
                return self.vaes[base.__name__]
        raise UnsupportedError(self._missing("VAE class", vae_class.__name__, self.vaes))

    def stage_start(self, event: StageStart) -> None:
        """Tell every observer that a stage starts."""
        self._observe("vaepp_on_stage_start", event)

    def stage_end(self, event: StageEnd) -> None:
        """Tell every observer that a stage has ended."""
        self._observe("vaepp_on_stage_end", event)

    def _validated(self, entry: AllowT) -> AllowT:
        """An entry that also allows the strategies whose own entries name it."""
        added = tuple(
            strategy.name
            for strategy in self.strategies.values()
            if entry.name in strategy.validated_for and strategy.name not in entry.strategies
        )
        return attrs.evolve(entry, strategies=entry.strategies + added) if added else entry

    def _missing(self, noun: str, name: str, known: Mapping[str, Any]) -> str:
        problems = "".join(f"\n  {problem}" for problem in self.problems)
        return f"no plugin registers the {noun} {name!r}; {nearest(name, known)}{problems}"

    def _call_one(self, plugin: Plugin, hook: str, shelf: _Shelf[Any]) -> None:
        """Call one hook of one plugin, so that what it registers is known to be its own."""
        register: Callable[[Any], None] = functools.partial(shelf.add, plugin=plugin)
        try:
            made = _run(self._caller(hook, plugin.name)(register=register))
            if made:
                raise TypeError(f"it returns {shown(made[0])}; call register(entry) for each entry instead")
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(str(plugin), f"{hook} raised {told(error)}") from error

    def _caller(self, hook: str, name: str) -> pluggy.HookCaller:
        others = [other for other_name, other in self._manager.list_name_plugin() if other_name != name]
        return self._manager.subset_hook_caller(hook, others)

    def _observe(self, hook: str, event: StageStart | StageEnd) -> None:
        """Call every plugin's observer alone: one that raises is named, dropped, and the run goes on."""
        for name, _ in self._manager.list_name_plugin():
            try:
                _run(self._caller(hook, name)(event=event))
            except Exception as error:
                self._manager.unregister(name=name)
                problem = f"{hook} raised {told(error)}"
                warnings.warn(
                    f"plugin {name!r}: {problem}; it is told nothing more", VaeppWarning, stacklevel=2
                )


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    trace = os.environ.get("VAEPP_PLUGINS_TRACE", "")
    if trace not in ("", "0", "1"):
        raise UserError(f"VAEPP_PLUGINS_TRACE is {shown(trace)}; it must be 1, to print hook calls, or 0")
    if trace == "1":
        manager.trace.root.setwriter(lambda line: print(line, end="", file=sys.stderr))
        manager.enable_tracing()
    return manager


def _allowed_entry_points() -> list[EntryPoint]:
    """The entry points the environment allows, by name; two of one name are refused before any import."""
    only, blocked = _names("VAEPP_PLUGINS_ONLY"), _names("VAEPP_PLUGINS_BLOCK")
    for name in sorted(only & blocked):
        raise PluginError(repr(name), "VAEPP_PLUGINS_ONLY and VAEPP_PLUGINS_BLOCK both name it; keep one")
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=PROJECT):
        if (only and point.name not in only) or point.name in blocked:
            continue
        if point.name in found and _distribution(point) != _distribution(found[point.name]):
            both = f"{_distribution(found[point.name])} and {_distribution(point)}"
            raise PluginError(repr(point.name), f"{both} both ship it; uninstall one of them")
        found[point.name] = point
    known = {point.name for point in entry_points(group=PROJECT)}
    for variable, names in (("VAEPP_PLUGINS_ONLY", only), ("VAEPP_PLUGINS_BLOCK", blocked)):
        for name in sorted(names - known):
            raise PluginError(
                repr(name), f"{variable} names it and it is not installed; {nearest(name, known)}"
            )
    return [found[name] for name in sorted(found)]


def _names(variable: str) -> set[str]:
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


def _run(values: list[Any]) -> list[Any]:
    """What hooks return, but for what nobody runs.

    Raises:
        TypeError: a hook is a coroutine or a generator, so nothing of it was carried out.
    """
    for value in values:
        if inspect.iscoroutine(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            if inspect.iscoroutine(value):
                value.close()  # else Python warns of it, with a line of ours
            raise TypeError(f"it makes a {type(value).__name__}, which nobody runs; write a plain function")
    return values


def _check_api(plugin: Plugin, module: object) -> None:
    stated = getattr(module, "VAEPP_API", None)
    if stated is None:
        raise PluginError(
            str(plugin), f"it does not state its plugin API; write VAEPP_API = {API_VERSION} in it"
        )
    if stated != API_VERSION:
        raise PluginError(
            str(plugin),
            f"it is written for plugin API {stated!r} and this vaepp has {API_VERSION}; "
            f"install a matching release, or set VAEPP_PLUGINS_BLOCK={plugin.name}",
        )


def _keeps_methods(vae_class: type, base: type) -> bool:
    """Whether a subclass leaves the methods alone that an adapter reproduces."""
    methods = ("decode", "encode", "_decode", "_encode", "tiled_decode", "tiled_encode", "_tiled_encode")
    return all(getattr(vae_class, name, None) is getattr(base, name, None) for name in methods)


@functools.cache
def default_registry() -> Registry:
    """The registry of this process, loaded at first use."""
    return Registry.load()
